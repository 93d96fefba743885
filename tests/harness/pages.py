"""The fenced blocks of our pages, and what marks them.

A block of commands or code has a line of its own before it: `<!-- tested: NAME -->` where a test
takes it from here and runs it, `<!-- untested: REASON -->` where none can.
`tests/unit/test_pages.py` fails on a block that has neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from docs import site

ROOT = site.CHECKOUT
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>tested|untested): (?P<says>[^\n]+) -->\n\n?)?"
    r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; ``mark`` is `tested`, `untested` or empty, ``says`` what follows it."""

    page: str
    language: str
    mark: str
    says: str
    text: str


def blocks() -> Iterator[Block]:
    """Yield every fenced block of every page."""
    for path in site.sources():
        page = str(path.relative_to(ROOT))
        for found in _FENCE.finditer(path.read_text()):
            mark, says = found["mark"] or "", found["says"] or ""
            yield Block(page, found["language"], mark, says, found["text"])


def block(page: str, name: str) -> str:
    """Return the text of a page's block of this name."""
    (found,) = (b.text for b in blocks() if (b.page, b.mark, b.says) == (page, "tested", name))
    return found


def spans(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield page and text of every inline code span that matches, outside of blocks."""
    for path in site.sources():
        text = _FENCE.sub("", path.read_text())
        # A line may end inside a span.
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
            joined = " ".join(span.split())
            if re.match(pattern, joined):
                yield str(path.relative_to(ROOT)), joined
