"""Retention: old events are dropped, and the chain says so.

An event RETENTION_PRUNED states up to which link events were dropped, that link's hash,
and a MAC over what is kept of them: the last state of each key version, which version of
a key was ACTIVE last, and what froze one, which the reconcile pass needs for as long as the
version is there. An export then starts after the dropped events, and is believed only with
that event in it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from byokeep.keyvault.v1 import audit_pb2

from services.common.background import each
from services.keyvault import chain
from services.keyvault.database import Database, Row
from services.keyvault.domain import HELD_AFTER, STATE_AFTER, WHOLE_AFTER, WHOLE_KEY, State
from services.keyvault.following import MISMATCH, PRUNED, Following
from services.keyvault.store import audit as audit_store
from services.keyvault.store import reconcile as carried_store
from services.keyvault.store import retention as store

TICK_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is dropped of a chain, up to a number and its hash; and what is kept apart: sequences
    new there, those not needed any more, the MAC."""

    end: int
    end_hash: bytes
    new: Sequence[int]
    over: Sequence[int]
    mac: bytes


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
        name, pruned = row
        followed = self._following.chains.get(name)
        if followed is None or name in self._following.broken:
            return
        # Only what the log has taken in, as was verified here.
        cutoff = datetime.datetime.now(datetime.UTC) - self._age
        prune = await self._plan(name, pruned, followed.logged, cutoff)
        if prune is not None:
            await self._prune(name, pruned, prune)
        while await store.drop(self._database, name):
            pass

    async def _plan(
        self, name: str, pruned: int, high: int, cutoff: datetime.datetime
    ) -> _Kept | None:
        """Walk a chain link by link to where it was followed to, and decide what is dropped.

        Raises LookupError where the links don't lead there: what somebody altered is not dropped
        with the trace of it.
        """
        first = await store.event(self._database, name, pruned + 1)
        if first is None or _time(_event(first[0])) >= cutoff:
            return None
        followed = self._following.chains[name]
        target, at = (followed.sequence, followed.hash), pruned
        digest = (await audit_store.pruned(self._database, name))[1] or chain.GENESIS
        end, end_digest, bodies = pruned, digest, list[tuple[int, bytes]]()
        before, stated = (pruned, digest), set[bytes]()
        young = False
        async for row in audit_store.links(self._database, name, pruned):
            if at == target[0]:
                break
            if not chain.continues(at, digest, row):
                raise LookupError("the chain does not verify")
            number, body, _, digest = row
            at = number
            event = _event(body)
            if event.type == PRUNED and (event.pruned_sequence, event.pruned_hash) == before:
                stated.add(event.carried_hash)
            young = young or number > high or _time(event) >= cutoff
            if not young:
                end, end_digest = number, digest
                if self._needed(name, number, event):
                    bodies.append((number, body))
        if (at, digest) != target:
            raise LookupError("the chain does not verify")
        if end == pruned or (pruned and not stated):
            return None  # nothing to drop; or another replica dropped just now
        was, kept = await self._kept(name, before, (end, end_digest), bodies)
        if pruned and was not in stated:
            raise LookupError("what was kept is not what was stated")
        return kept

    async def _prune(self, name: str, pruned: int, kept: _Kept) -> None:
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED,
            pruned_sequence=kept.end,
            pruned_hash=kept.end_hash,
            carried_hash=kept.mac,
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            if await store.prune(connection, name, pruned, kept.end, kept.end_hash):
                await store.carry(connection, name, kept.new, kept.over)
                await chain.append(connection, head, self._deployment, [event])

    async def _kept(
        self,
        name: str,
        before: tuple[int, bytes],
        after: tuple[int, bytes],
        bodies: list[tuple[int, bytes]],
    ) -> tuple[bytes, _Kept]:
        """Return the MAC over what is kept since `before`, as it is stored, and what will be."""
        was, kept = (self._following.carried(name, *end) for end in (before, after))
        over = list[int]()
        async for sequence, body in carried_store.carried(self._database, name):
            was.add(sequence, body)
            # What is not of before is somebody else's, above all where nothing was kept yet.
            if sequence <= before[0] and self._needed(name, sequence, _event(body)):
                kept.add(sequence, body)
            else:
                over.append(sequence)
        for sequence, body in bodies:
            kept.add(sequence, body)
        new = [sequence for sequence, _ in bodies]
        return was.digest(), _Kept(*after, new, over, kept.digest())

    def _needed(self, name: str, sequence: int, event: audit_pb2.AuditEvent) -> bool:
        if event.reason == MISMATCH:
            return True
        tenant, states = name.removeprefix(chain.TENANTS), self._following.states
        if event.type in HELD_AFTER:
            return self._following.holds.get(tenant, (False, 0))[1] <= sequence
        if event.type not in STATE_AFTER and event.type not in WHOLE_AFTER:
            return False
        if STATE_AFTER.get(event.type) is State.ACTIVE:
            # Whatever became of that version: the one before it is over.
            whole = states.fingerprint(tenant, event.key_id, WHOLE_KEY)
            if states.get(whole)[1] <= sequence:
                return True
        version = states.fingerprint(tenant, event.key_id, event.key_version)
        return states.get(version)[1] <= sequence


def _event(body: bytes) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent.FromString(body)


def _time(event: audit_pb2.AuditEvent) -> datetime.datetime:
    return event.event_time.ToDatetime(datetime.UTC)
