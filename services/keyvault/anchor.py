"""The anchor: what the log's size and root were, kept outside the database, written by
compare-and-set.

Replicas share one anchor. Each writes only over the version that it read before it looked at the
database, so that an older position never overwrites a newer one.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from byokeep.merkle import EMPTY

from services.common.config import ConfigError

_ABSENT: Final = ""


@dataclass(frozen=True, slots=True)
class Position:
    """A position of the log: how many leaves, and the root over them."""

    size: int = 0
    root: bytes = EMPTY
    #: How many operator's words there were: each makes the database, as it was, the truth.
    generation: int = 0
    #: When the last one was said, in seconds since 1970.
    resume_time: int = 0
    #: The database was found to contradict this, and no operator's word has ended that.
    distrusted: bool = False

    def text(self, deployment: str) -> str:
        """Return the anchor's text."""
        return json.dumps({"deployment": deployment, **asdict(self), "root": self.root.hex()})


def position(text: str | None, deployment: str) -> Position:
    """Return the position of an anchor's text; that of an empty log where there is none.

    Raises:
        ConfigError: it is no anchor, or another deployment's.
    """
    if text is None:
        return Position()
    try:
        data = json.loads(text)
        if data["deployment"] != deployment:
            raise ValueError
        return Position(
            int(data["size"]),
            bytes.fromhex(data["root"]),
            int(data["generation"]),
            int(data["resume_time"]),
            bool(data["distrusted"]),
        )
    except (ValueError, KeyError, TypeError):
        raise ConfigError("the anchor's text is not an anchor of this deployment") from None


@dataclass(frozen=True, slots=True)
class Stored:
    """The anchor's text, and the version that a write must name; `text` is None before the
    first write. The version is the store's own: nobody else reads meaning into it."""

    text: str | None
    version: str


class AnchorStore(Protocol):
    """Keeps one short text. Implementations raise ByokeepError (UNAVAILABLE) or OSError where
    the store does not answer; leases stop when that lasts."""

    async def read(self) -> Stored:
        """Return the text and its version."""

    async def write(self, text: str, after: Stored) -> bool:
        """Store a text durably over `after`; False, and nothing is written, where that is not
        the newest any more."""


class FileAnchor:
    """A file beside the keyring. Replicas that share it need a file system with locks."""

    def __init__(self, file: Path) -> None:
        """Keep the anchor in a file; a sibling `.lock` serializes writers."""
        self._file = file
        self._lock = file.with_suffix(".lock")

    async def read(self) -> Stored:
        """Return the file's text; None where there is no file."""
        return await asyncio.to_thread(self._read)

    async def write(self, text: str, after: Stored) -> bool:
        """Replace the file whole, if it still is what `after` says."""
        return await asyncio.to_thread(self._write, text, after)

    def _read(self) -> Stored:
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            return Stored(None, _ABSENT)
        return Stored(text, hashlib.sha256(text.encode()).hexdigest())

    def _write(self, text: str, after: Stored) -> bool:
        descriptor = os.open(self._lock, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._read().version != after.version:
                return False
            self._replace(text)
        return True

    def _replace(self, text: str) -> None:
        # Whole or not at all, and on the disk before anyone relies on it.
        temporary = self._file.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._file)
        folder = os.open(self._file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
