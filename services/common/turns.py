"""Turns: so many at once for each of many keys (callers, tenants), the others in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Full(Exception):
    """As many run and wait for the key as may."""


class Turns:
    """Gives out turns. A key that nobody uses takes no memory."""

    def __init__(self, at_once: int, in_flight: int | None = None) -> None:
        """`at_once` of a key run; with those that wait there are at most `in_flight`."""
        self._at_once = at_once
        self._in_flight = in_flight
        self._lines: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    async def take(self, key: str) -> Callable[[], None]:
        """Wait for a turn; return what gives it back. Raises Full."""
        places, present = self._lines.setdefault(key, (asyncio.Semaphore(self._at_once), []))
        if self._in_flight is not None and len(present) >= self._in_flight:
            raise Full
        present.append(None)
        try:
            await places.acquire()
        except BaseException:
            self._leave(key)
            raise

        def give_back() -> None:
            places.release()
            self._leave(key)

        return give_back

    def _leave(self, key: str) -> None:
        present = self._lines[key][1]
        present.pop()
        if not present:
            del self._lines[key]
