"""Pages: a token is the last id of the page before; the protos have its form.

A page ends where it has as many rows as were asked for, or as many bytes as an answer may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

from services.orchestrator.policy.bounds import PAGE_BYTES

T = TypeVar("T")
M = TypeVar("M", bound=Message)
DEFAULT: Final = 50


def size(requested: int, default: int = DEFAULT) -> int:
    """Return the number of rows of a page."""
    return requested or default


def cut(
    rows: Sequence[T], limit: int, key: Callable[[T], str], make: Callable[[T], M]
) -> tuple[list[M], str]:
    """Return a page of what is made of rows, which were read with one more than the limit, and its
    next token."""
    page: list[M] = []
    room = PAGE_BYTES
    for row in rows[:limit]:
        page.append(make(row))
        room -= page[-1].ByteSize()
        if room < 0:
            break
    return page, key(rows[len(page) - 1]) if len(page) < len(rows) else ""
