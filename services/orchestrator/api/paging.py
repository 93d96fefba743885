"""Pages: a token is the last id of the page before; the protos have its form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
DEFAULT: Final = 50


def size(requested: int, default: int = DEFAULT) -> int:
    """Return the number of rows of a page."""
    return requested or default


def cut(rows: Sequence[T], limit: int, key: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """Return a page of rows that were read with one more than the limit, and its next token."""
    if len(rows) <= limit:
        return rows, ""
    return rows[:limit], key(rows[limit - 1])
