"""Builds the documentation as a site: `make docs`, into build/site.

Pages stand where they are read in the checkout (README.md, SECURITY.md, docs/, the READMEs of
folders); here they are brought together, with the reference that `generate.py` makes of the code. A
link to a page is followed to where the page went; a link to a file that is no page becomes its
path; a link to nothing stops the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs import generate

CHECKOUT = Path(__file__).resolve().parent.parent
_WORK = CHECKOUT / "build" / "docs"
_SITE = CHECKOUT / "build" / "site"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_OUTSIDE = re.compile(r"^(https?:|mailto:|#)")
_CONFIG = """\
site_name: byokeep
docs_dir: {work}
site_dir: {site}
theme:
  name: material
  font: false
  features: [navigation.indexes, navigation.sections, content.code.copy, search.highlight]
  palette:
    - {{media: "(prefers-color-scheme: light)", scheme: default, primary: indigo}}
    - {{media: "(prefers-color-scheme: dark)", scheme: slate, primary: indigo}}
plugins: [search]
markdown_extensions:
  - tables
  - toc: {{permalink: true}}
  - pymdownx.superfences:
      custom_fences:
        - name: mermaid
          class: mermaid
          format: !!python/name:pymdownx.superfences.fence_code_format
"""


class BrokenLinkError(Exception):
    """A page links to something that is not there."""


def sources(checkout: Path = CHECKOUT) -> dict[Path, str]:
    """Return every page of the checkout, and where it goes in the site."""
    pages = {checkout / "README.md": "index.md"}
    for name in ("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        if (checkout / name).exists():
            pages[checkout / name] = name
    for page in sorted((checkout / "docs").rglob("*.md")):
        pages[page] = page.relative_to(checkout / "docs").as_posix()
    for folder in ("deploy", "clients"):
        for page in sorted((checkout / folder).rglob("README.md")):
            if not {"node_modules", "build"} & set(page.parts):
                pages[page] = page.relative_to(checkout).with_suffix("").as_posix() + ".md"
    return pages


def rewritten(page: Path, pages: dict[Path, str], checkout: Path = CHECKOUT) -> str:
    """Return a page with its links as they are in the site. Raises BrokenLinkError."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if _OUTSIDE.match(target):
            return found.group(0)
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        if not file.exists():
            raise BrokenLinkError(f"{page.relative_to(checkout)} links to {target}: not there")
        if file not in pages:
            return f"{text} (`{file.relative_to(checkout)}`)"
        up = "../" * pages[page].count("/")
        return f"[{text}]({up}{pages[file]}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, page.read_text())


def main() -> None:
    """Bring the pages together and build the site."""
    shutil.rmtree(_WORK, ignore_errors=True)
    pages = sources()
    for page, place in pages.items():
        target = _WORK / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(page, pages))
    for image in (CHECKOUT / "docs").glob("*.svg"):
        shutil.copy(image, _WORK)
    for name, text in generate.pages().items():
        target = _WORK / "reference" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    config = CHECKOUT / "build" / "mkdocs.yml"
    config.write_text(_CONFIG.format(work=_WORK, site=_SITE))
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    if built.returncode:
        sys.exit(built.returncode)
    print(f"{len(pages)} pages and the reference: {_SITE}/index.html")


if __name__ == "__main__":
    try:
        main()
    except BrokenLinkError as error:
        sys.exit(str(error))
