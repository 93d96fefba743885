"""Builds images with the `docker` command, and says what is in one.

Two builds of one commit have the same tree: every path with its kind, mode, owner and content.
Their image ids differ, since layers hold times.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deploy.docker.layout import IMAGES, SBOM

CHECKOUT = Path(__file__).resolve().parents[2]
# What the engine puts into a container that is exported, whatever the image has.
_ENGINES = {".dockerenv", "dev", "proc", "sys", "etc/hostname", "etc/hosts", "etc/resolv.conf"}
_ENGINES |= {"etc/mtab"}


class ImageError(Exception):
    """The engine can't do what was asked; the text is its own."""


def reference(zone: str, tag: str) -> str:
    """Return an image's name. Raises ImageError for an unknown one."""
    if zone not in IMAGES:
        raise ImageError(f"no image {zone}: there are {', '.join(IMAGES)}")
    return f"byokeep/{zone}:{tag}"


def build(
    zone: str, tag: str, *, context: Path = CHECKOUT, cache: bool = True, base: str = ""
) -> str:
    """Build an image, on another base where one is given, and return its name.

    Raises ImageError with the end of the output.
    """
    name = reference(zone, tag)
    arguments = [f"--build-arg=ZONE={zone}", f"--build-arg=VERSION={tag}", f"--tag={name}"]
    arguments += [f"--build-arg=REVISION={_revision(context)}"]
    arguments += [] if cache else ["--no-cache"]
    arguments += [f"--build-arg=PYTHON={base}"] if base else []
    folder = context / "deploy/docker"
    own = folder / zone / "Dockerfile"
    file = own if own.exists() else folder / "Dockerfile"
    docker("build", *arguments, "--file", str(file), str(context))
    return name


def docker(*arguments: str) -> str:
    """Run the command and return its output. Raises ImageError."""
    try:
        done = subprocess.run(
            ["docker", *arguments],  # noqa: S607 found on PATH, as a user's is
            check=False,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise ImageError("there is no command `docker`") from None
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines()
        raise ImageError("\n".join([f"docker {arguments[0]} failed:", *output[-20:]]))
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Entry:
    """A path of an image; `content` is a file's SHA-256, or where a link leads."""

    path: str
    kind: str
    mode: int
    owner: tuple[int, int]
    content: str


@dataclass(frozen=True, slots=True)
class Tree:
    """Everything that is in an image."""

    entries: tuple[Entry, ...]
    sbom: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the tree, hexadecimal; times are no part of it."""
        lines = (f"{e.path}\0{e.kind}\0{e.mode:o}\0{e.owner}\0{e.content}\n" for e in self.entries)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def tree(image: str) -> Tree:
    """Read an image. Raises ImageError."""
    container = docker("create", image)
    try:
        with subprocess.Popen(
            ["docker", "export", container],  # noqa: S607
            stdout=subprocess.PIPE,
        ) as export:
            return _read(tarfile.open(fileobj=export.stdout, mode="r|"))
    finally:
        docker("rm", container)


def _read(archive: tarfile.TarFile) -> Tree:
    sbom = b""
    entries = list[Entry]()
    for member in archive:
        path = member.name.removeprefix("./").rstrip("/")
        if path in _ENGINES or path.partition("/")[0] in ("dev", "proc", "sys"):
            continue
        file = archive.extractfile(member) if member.isreg() else None
        data = b"" if file is None else file.read()
        if f"/{path}" == str(SBOM):
            sbom = data
        content = member.linkname if file is None else hashlib.sha256(data).hexdigest()
        kind = member.type.decode()
        entries.append(Entry(path, kind, member.mode, (member.uid, member.gid), content))
    return Tree(tuple(sorted(entries, key=lambda entry: entry.path)), sbom)


def distributions(found: Tree) -> Iterator[str]:
    """Name the Python packages in a tree, normalised as PEP 503 says."""
    for entry in found.entries:
        folder = PurePosixPath(entry.path)
        if folder.suffix in (".dist-info", ".egg-info"):
            # PEP 427: no hyphen in the name's part.
            yield re.sub(r"[_.]+", "-", folder.name.partition("-")[0]).lower()


def _revision(context: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(context), "rev-parse", "HEAD"],  # noqa: S607
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"
