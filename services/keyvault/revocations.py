"""The revocation stream: one reader of the table, many watchers.

Numbers come from the database, so every replica tells the same story; a quarter of
a second is also the heartbeat that watchers rely on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from byokeep.keyvault.v1 import lease_pb2

from services.common import deadline
from services.keyvault.database import Database
from services.keyvault.sql import index

HEARTBEAT_SECONDS = 0.25
_REMEMBERED = 10_000
# Well below the 5 s after which runners kill what they could not be told of.
_READ_SECONDS = 1.5
Message = lease_pb2.WatchRevocationsResponse


class Revocations:
    """Reads revocations and tells every watcher."""

    def __init__(self, database: Database) -> None:
        """Read from a database."""
        self._database = database
        self._tick = asyncio.Condition()
        self._recent: deque[tuple[int, str, str]] = deque(maxlen=_REMEMBERED)
        self._sequence = 0
        self._alive = False

    async def start(self) -> None:
        """Begin with what is revoked from now on: a watcher's resync says the rest."""
        self._sequence = await index.newest(self._database)

    async def read(self) -> None:
        """Read what is new and wake the watchers; a heartbeat where it could be read."""
        self._alive = False
        try:
            with deadline.within(_READ_SECONDS):
                news = await index.news(self._database, self._sequence)
            for row in news:
                self._recent.append((row[0], row[1], row[2]))
                self._sequence = row[0]
            self._alive = True
        finally:
            async with self._tick:
                self._tick.notify_all()

    async def watch(self, holder: str) -> AsyncIterator[Message]:
        """Yield a resync, then revocations of a holder's leases and heartbeats."""
        # The number first: what is revoked while the live leases are read is told again.
        seen = await index.newest(self._database)
        live = await index.live(self._database, holder)
        yield Message(sequence=seen, resync=Message.Resync(live_lease_ids=live))
        while True:
            async with self._tick:
                await self._tick.wait()
            if not self._alive:
                continue  # no heartbeat: a watcher must not believe that all is told
            if self._recent and len(self._recent) == _REMEMBERED and self._recent[0][0] > seen + 1:
                seen = self._sequence
                live = await index.live(self._database, holder)
                yield Message(sequence=seen, resync=Message.Resync(live_lease_ids=live))
                continue
            mine = [one[1] for one in self._recent if one[0] > seen and one[2] == holder]
            seen = max(seen, self._sequence)
            if mine:
                yield Message(sequence=seen, revocation=Message.Revocation(lease_ids=mine))
            else:
                yield Message(sequence=seen, heartbeat=Message.Heartbeat())
