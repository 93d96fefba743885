"""Pages: a token is the last id of the page before; the protos have its form.

A page ends where it has as many rows as were asked for, or as many bytes as an answer may have.
Where a list has a filter, its token ends in a digest of it: a token of another list is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from services.orchestrator.policy.bounds import PAGE_BYTES
from services.orchestrator.policy.refusals import unexpected

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


def after(request: Any) -> str:
    """Return the last id of the page before, of a request with a filter; empty: the first page.

    Raises ByokeepError: INVALID_FIELD.
    """
    last, _, _ = request.page_token.partition(".")
    if request.page_token and request.page_token != following(request, last):
        raise unexpected("page_token", "next_page_token of a page with the same filter")
    return str(last)


def following(request: Any, last: str) -> str:
    """Return the token of the page after an id, for a request with a filter; empty after none."""
    named = request.DESCRIPTOR.full_name + request.parent
    asked = named.encode() + request.filter.SerializeToString(deterministic=True)
    return f"{last}.{hashlib.sha256(asked).hexdigest()[:16]}" if last else ""
