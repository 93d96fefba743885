"""Split a diff into the texts of single provider calls, in the annotated format of the prompt.

    ### src/app.py
    #   renamed from src/main.py
        41  def total(items):
           -    return sum(items)
        42 +    return sum(item.price for item in items)
       ...
        90  context of a later hunk

A numbered line has its number in the new file (in a hunk that leaves no line, as of a deleted file,
in the old one) right-aligned in six columns, a blank, and its sign.
A long line is shown in pieces, one below the other: those after the first have `…` for a number.
A chunk that has a part of a hunk begins with a number whatever its first line is.
Content never starts before the sign and never breaks its line, so that it can't pass for a header.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Final

from services.common.diff import Diff, FileDiff, Hunk
from services.common.models import ModelLimits

BYTES_PER_TOKEN: Final = 3
"""No tokenizer counts more than a token for three bytes of real code by much: English and code
have about four bytes a token, Claude's newer tokenizer about three, CJK text three bytes a
character and about one token. Bytes rather than characters, so that such text isn't undercounted.
"""

MIN_CHUNK_TOKENS: Final = 1024
"""Smallest budget: a header with two paths of `MAX_PATH_BYTES` fits, with room for a line."""

MAX_LINE_BYTES: Final = 16_384
"""A longer line is generated, minified, or hides something at its end: it is shown in pieces."""

MAX_CHUNK_TOKENS: Final = 64_000
"""Attention thins out over long inputs, and some providers' long prompts cost double; 2 MiB of
diff still make fewer calls than the default ceiling of 20."""

MAX_OUTPUT_TOKENS: Final = 32_000
"""Models that think by default count their thinking as output."""

_MARGIN_TOKENS: Final = 1_000
SEPARATOR: Final = "   ..."
"""Stands between two hunks of a file."""

_CONTINUED: Final = "…"
_PIECE: Final = f"{_CONTINUED:>6}"
_NUMBERLESS: Final = (_PIECE, " " * 7)
_NUMBER: Final = re.compile(r"( *[0-9]+) ")
_WIDEST: Final = len("999999999 +")
_UNSAFE: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN_MODE: Final = "100644"
_NOTES: Final = {
    "added": "#   new file",
    "deleted": "#   deleted file",
    "renamed": "#   renamed from ",
    "copied": "#   copied from ",
}
_VISIBLE: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code != 0x09},
    0x7F: "\u2421",
    **dict.fromkeys([*range(0x80, 0xA0), 0x2028, 0x2029], "\N{REPLACEMENT CHARACTER}"),
}


class NoRoomError(Exception):
    """What stands around the diff leaves it no room in the model's context."""

    def __init__(self) -> None:
        """Say what to do about it."""
        super().__init__(
            "description, guidance and context files leave no room for the diff in this model's"
            " context; send less of them, or choose a model with a larger context"
        )


def output_tokens(limits: ModelLimits) -> int:
    """Return how many tokens a call's answer may have."""
    return min(limits.max_output_tokens, MAX_OUTPUT_TOKENS)


def room(limits: ModelLimits, frame_tokens: int) -> int:
    """Return the tokens of diff that one call has room for, beside a frame. Raises NoRoomError."""
    left = limits.context_tokens - output_tokens(limits) - frame_tokens - _MARGIN_TOKENS
    budget = min(left, MAX_CHUNK_TOKENS)
    if budget < MIN_CHUNK_TOKENS:
        raise NoRoomError
    return budget


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of a diff that one provider call reviews.

    `id` is a SHA-256 in hex of the caller's salt and the text, equal whenever both are; `files`
    are the paths shown, in order; `estimated_tokens` is for `text` alone.
    """

    index: int
    id: str
    text: str
    files: tuple[str, ...]
    estimated_tokens: int


def estimate_tokens(text: str) -> int:
    """Upper estimate of the tokens of a text: a third of its UTF-8 bytes, rounded up."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def plan(diff: Diff, max_tokens_per_chunk: int, *, salt: str) -> tuple[Chunk, ...]:
    """Divide a diff on file borders, then hunk borders, then between lines.

    Files are packed greedily in their order; only a file that fits no chunk is divided. Files
    without hunks (binary, mode or name only) are left out, so that there may be no chunk. `salt`
    is a digest of all that the answer depends on beside the text (model, guidance, prompt
    version), so that equal ids mean equal calls. Raises `ValueError` for a budget below
    `MIN_CHUNK_TOKENS`.
    """
    if max_tokens_per_chunk < MIN_CHUNK_TOKENS:
        raise ValueError(f"max_tokens_per_chunk: at least {MIN_CHUNK_TOKENS} expected")
    packer = _Packer(max_tokens_per_chunk * BYTES_PER_TOKEN)
    for file in diff.files:
        if file.hunks:
            packer.add(file)
    packer.flush()
    seen: Counter[str] = Counter()
    chunks = []
    for index, (text, files) in enumerate(packer.done):
        # A patch series can hold the same change twice; each call still needs an id of its own.
        identity = f"{len(salt)}:{salt}{seen[text]}:{text}"
        seen[text] += 1
        digest = hashlib.sha256(identity.encode()).hexdigest()
        chunks.append(Chunk(index, digest, text, files, estimate_tokens(text)))
    return tuple(chunks)


@dataclass(slots=True)
class _Packer:
    """Fills one text after the other, each up to `limit` bytes."""

    limit: int
    done: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)
    _files: dict[str, None] = field(default_factory=dict)
    _size: int = 0
    _header: list[str] | None = None

    def add(self, file: FileDiff) -> None:
        """Add a file, whole where one chunk can hold it."""
        header = _header(file)
        cap = min(MAX_LINE_BYTES, self.limit - _size(header) - _size([SEPARATOR]))
        hunks = [list(_render(hunk, cap)) for hunk in file.hunks]
        if self._size + _size(header) + sum(_size([SEPARATOR, *hunk]) for hunk in hunks) > (
            self.limit
        ):
            self.flush()
        for hunk in hunks:
            if self._put(file.path, header, hunk):
                continue
            self.flush()
            if self._put(file.path, header, hunk):
                continue
            for at, line in enumerate([beginning(hunk, 0), *hunk[1:]]):
                if not self._put(file.path, header, [line], same_hunk=True):
                    self.flush()
                    self._put(file.path, header, [beginning(hunk, at)], same_hunk=True)

    def flush(self) -> None:
        """Close the text at hand, if there is one."""
        if self._lines:
            self.done.append(("\n".join(self._lines), tuple(self._files)))
        self._lines, self._files, self._size, self._header = [], {}, 0, None

    def _put(
        self, path: str, header: list[str], lines: list[str], *, same_hunk: bool = False
    ) -> bool:
        """Append lines below their file's header; False, and no change, if there is no room."""
        if self._header is not header:
            lines = header + lines
        elif not same_hunk:
            lines = [SEPARATOR, *lines]
        size = _size(lines)
        if self._size + size > self.limit:
            return False
        self._lines += lines
        self._size += size
        self._files[path] = None
        self._header = header
        return True


def beginning(lines: Sequence[str], at: int) -> str:
    """Return a line as a part of a hunk begins with it: where it has no number of its own (a
    removed line, a later piece of a long one) it gets that of the nearest line that has one.
    Else a chunk might show no number, and no finding could name a line."""
    if not lines[at].startswith(_NUMBERLESS):
        return lines[at]
    beside = (_of_hunk(reversed(lines[:at])), _of_hunk(lines[at + 1 :]))
    number = next((found[1] for row in chain(*beside) if (found := _NUMBER.match(row))), " " * 6)
    return number + lines[at][6:]


def _of_hunk(rows: Iterable[str]) -> Iterator[str]:
    return takewhile(lambda row: row != SEPARATOR and not row.startswith("#"), rows)


def _size(lines: list[str]) -> int:
    """Bytes of the lines with their newlines."""
    return sum(len(line.encode()) + 1 for line in lines)


def _header(file: FileDiff) -> list[str]:
    lines = [f"### {file.path}"]
    if note := _NOTES.get(file.status):
        lines.append(note + (file.old_path or "" if note.endswith(" ") else ""))
    if file.new_mode and file.new_mode != _PLAIN_MODE:
        lines.append(f"#   mode {file.new_mode}")
    return lines


def _render(hunk: Hunk, cap: int) -> Iterator[str]:
    """Annotated lines of at most `cap` bytes, newline included."""
    # Where every line ends in CR it says nothing; where only some do, it is the change itself.
    crlf = all(line.text.endswith("\r") for line in hunk.lines)
    for line in hunk.lines:
        text = line.text.removesuffix("\r") if crlf else line.text
        if _UNSAFE.search(text):
            text = text.translate(_VISIBLE)
        shown = line.new_no if hunk.new_len else line.old_no
        number = "" if shown is None else shown
        yield from _pieces(f"{number:>6} {line.kind}", text, f"{_PIECE} {line.kind}", cap)


def _pieces(start: str, text: str, continued: str, cap: int) -> Iterator[str]:
    data = text.encode()
    room = cap - _WIDEST - 1
    if len(data) <= room:
        yield start + text
        return
    while data:
        piece = data[:room].decode(errors="ignore")
        yield start + piece
        data, start = data[len(piece.encode()) :], continued
