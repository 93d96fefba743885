"""Retention: old events are dropped, and the chain says so.

An event RETENTION_PRUNED states up to which link events were dropped, that link's hash,
and a digest over what is kept of them: the last state of each key version, and what
froze one, which the reconcile pass needs for as long as the version is there. An
export then starts after the dropped events, and is believed only with that event in it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from byokeep.keyvault.v1 import audit_pb2

from services.keyvault import chain
from services.keyvault.background import each
from services.keyvault.database import Database, Row
from services.keyvault.domain import STATE_AFTER
from services.keyvault.following import (
    HOLDS,
    MISMATCH,
    Following,
    carried_digest,
    new_carried_digest,
)
from services.keyvault.store import reconcile as carried_store
from services.keyvault.store import retention as store

TICK_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept apart of a chain: sequences new there, those not needed any more, the digest."""

    new: Sequence[int]
    over: Sequence[int]
    digest: bytes


class Retention:
    """Drops events that are older than a number of days; 0 days: none, ever."""

    def __init__(
        self, database: Database, following: Following, deployment: str, days: int
    ) -> None:
        """Drop events that the reconcile pass has followed."""
        self._database = database
        self._following = following
        self._deployment = deployment
        self._age = datetime.timedelta(days=days)

    async def tick(self) -> None:
        """Look at every chain once."""
        if not self._age:
            return
        after = ""
        while found := await store.chains(self._database, after):
            await each("retention", found, self._chain)
            after = found[-1][0]

    async def _chain(self, row: Row) -> None:
        name, pruned, logged = row
        followed = self._following.chains.get(name)
        if followed is None or name in self._following.broken:
            return
        # Only what the log has taken in, and what was verified here.
        cutoff = datetime.datetime.now(datetime.UTC) - self._age
        end = await self._last_before(name, pruned, min(logged, followed.sequence), cutoff)
        if end > pruned:
            await self._prune(name, pruned, end)
        while await store.drop(self._database, name):
            pass

    async def _last_before(self, name: str, low: int, high: int, cutoff: datetime.datetime) -> int:
        """Return the number of the last event before a time: they are in the order of time."""
        while low < high:
            middle = (low + high + 1) // 2
            event, _ = await self._event(name, middle)
            if event.event_time.ToDatetime(datetime.UTC) < cutoff:
                low = middle
            else:
                high = middle - 1
        return low

    async def _prune(self, name: str, pruned: int, end: int) -> None:
        kept = await self._kept(name, pruned, end)
        _, digest = await self._event(name, end)
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED,
            pruned_sequence=end,
            pruned_hash=digest,
            carried_hash=kept.digest,
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            if await store.prune(connection, name, pruned, end, digest):
                await store.carry(connection, name, kept.new, kept.over)
                await chain.append(connection, head, self._deployment, [event])

    async def _kept(self, name: str, pruned: int, end: int) -> _Kept:
        digest, new, over = new_carried_digest(), list[int](), list[int]()
        async for sequence, body in carried_store.carried(self._database, name):
            if self._needed(name, sequence, body):
                carried_digest(digest, sequence, body)
            else:
                over.append(sequence)
        after = pruned
        while rows := await store.bodies(self._database, name, after, end):
            for sequence, body in rows:
                if self._needed(name, sequence, body):
                    carried_digest(digest, sequence, body)
                    new.append(sequence)
            after = rows[-1][0]
        return _Kept(new, over, digest.digest())

    def _needed(self, name: str, sequence: int, body: bytes) -> bool:
        event = audit_pb2.AuditEvent.FromString(body)
        if event.reason == MISMATCH:
            return True
        tenant, states = name.removeprefix("tenants/"), self._following.states
        if event.type in HOLDS:
            return self._following.holds.get(tenant, (False, 0))[1] <= sequence
        if event.type not in STATE_AFTER:
            return False
        version = states.fingerprint(tenant, event.key_id, event.key_version)
        return states.get(version)[1] <= sequence

    async def _event(self, name: str, sequence: int) -> tuple[audit_pb2.AuditEvent, bytes]:
        row = await store.event(self._database, name, sequence)
        if row is None:
            raise LookupError("an event is missing")
        return audit_pb2.AuditEvent.FromString(row[0]), row[1]
