"""A chunk that a provider finds too long, in two halves."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

from services.common.chunks import MIN_CHUNK_TOKENS, SEPARATOR, Chunk, beginning, estimate_tokens


def halve(chunk: Chunk) -> tuple[Chunk, ...]:
    """Divide a chunk in two of about equal size; none if it is as small as chunks get.

    The border is a file's or a hunk's where one lies in the middle half of the text, else it is
    between two lines. Equal chunks have equal halves, so that one that was split in an earlier
    attempt is split alike in a later one.
    """
    lines = chunk.text.split("\n")
    cut = _border(lines) if chunk.estimated_tokens > MIN_CHUNK_TOKENS else None
    if cut is None:
        return ()
    first, second = lines[:cut], [beginning(lines, cut), *lines[cut + 1 :]]
    if second[0] == SEPARATOR:
        del second[0]
    if not second[0].startswith("### "):
        second = [*_header(first), *second]
    return _half(chunk, 0, first), _half(chunk, 1, second)


def was_split(chunk: Chunk, done: Collection[str]) -> bool:
    """Return whether a part of a chunk is among the chunks that are done."""
    return any(half.id in done or was_split(half, done) for half in halve(chunk))


def _half(chunk: Chunk, number: int, lines: list[str]) -> Chunk:
    text = "\n".join(lines)
    digest = hashlib.sha256(f"{chunk.id}:{number}".encode()).hexdigest()
    files = tuple(line[4:] for line in lines if line.startswith("### "))
    return Chunk(chunk.index, digest, text, files, estimate_tokens(text))


def _header(lines: list[str]) -> list[str]:
    """The header of the file that the lines end in."""
    start = max(number for number, line in enumerate(lines) if line.startswith("### "))
    end = start + 1
    while end < len(lines) and lines[end].startswith("#"):
        end += 1
    return lines[start:end]


def _border(lines: list[str]) -> int | None:
    """The number of the line that the second half begins with."""
    total = sum(len(line) + 1 for line in lines)
    best = None
    for number, rank, before in _borders(lines):
        off = abs(2 * before - total) / total
        found = (rank if off <= 0.5 else 3, off, number)
        best = min(best or found, found)
    return best[2] if best else None


def _borders(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """Where a second half may begin: line, rank of the border, characters before it."""
    before, content = 0, False
    for number, line in enumerate(lines):
        # Content has its number or blanks before its sign, so only a header begins with "#".
        header = line.startswith("#")
        if content and (not header or line.startswith("### ")):
            yield number, 0 if header else 1 if line == SEPARATOR else 2, before
        content = not header and line != SEPARATOR
        before += len(line) + 1
