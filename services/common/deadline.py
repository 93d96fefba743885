"""How long a call may still take: what it waits for is given up in time to say so.

gRPC ends a call at its caller's deadline, and the caller never learns who did not answer. So a
handler's time ends a little before that, and whatever waits (for PostgreSQL, for another service)
asks here for how long it may.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

# What is kept for the answer's way back.
_MARGIN_SECONDS: Final = 0.75
_MARGIN: Final = 0.15

_end: ContextVar[float] = ContextVar("byokeep_deadline", default=math.inf)
_half: ContextVar[float] = ContextVar("byokeep_half", default=math.inf)


def enter(remaining: float | None) -> None:
    """Begin a call whose caller waits so many seconds more; None: for ever."""
    if remaining is None:
        return
    now = time.monotonic()
    _end.set(now + remaining - min(_MARGIN_SECONDS, remaining * _MARGIN))
    _half.set(now + remaining / 2)


def left(most: float) -> float:
    """Return how many seconds may be waited now, `most` at most."""
    return max(0.0, min(most, _end.get() - time.monotonic()))


def spent() -> bool:
    """Say whether more than half of the call's time is gone: a second try would not end in it."""
    return time.monotonic() > _half.get()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give what is done in the block so many seconds, and no more than there were before."""
    token = _end.set(time.monotonic() + left(seconds))
    try:
        yield
    finally:
        _end.reset(token)


@contextmanager
def lifted() -> Iterator[None]:
    """Start work in the block that others than this call wait for, too: it has its own limits."""
    token = _end.set(math.inf)
    try:
        yield
    finally:
        _end.reset(token)
