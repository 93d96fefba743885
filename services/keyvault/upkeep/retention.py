"""Retention: old events are dropped, and the chain says so.

An event RETENTION_PRUNED states up to which link events were dropped, and that link's hash; so
does the tenant's state. An export then starts after the dropped events, and is believed only with
that event in it. Events are evidence alone: keyvault needs none of them again, but those that lead
on from a head that no leaf of the log covers yet. So an event goes only where one does.
"""

from __future__ import annotations

import datetime
import hmac
from typing import Final

from byokeep.keyvault.v1 import audit_pb2

from services.common.background import each
from services.keyvault import clocks
from services.keyvault.database import Database
from services.keyvault.event import GENESIS, link_hash
from services.keyvault.heads import Heads
from services.keyvault.ledger import Ledger, Tenant
from services.keyvault.log import Log
from services.keyvault.sql import events
from services.keyvault.sql import ledger as ledger_sql

TICK_SECONDS: Final = 3600.0
#: Where a chain is cut off: number and hash of the last event that is dropped.
_Cut = tuple[int, bytes]


class Retention:
    """Drops events that are older than a number of days; 0 days: none, ever."""

    def __init__(
        self, database: Database, ledger: Ledger, heads: Heads, log: Log, days: int
    ) -> None:
        """Drop events of a ledger's tenants."""
        self._database = database
        self._ledger = ledger
        self._heads = heads
        self._log = log
        self._age = datetime.timedelta(days=days)

    async def tick(self) -> None:
        """Look at every chain once."""
        if not self._age or self._log.quiet or self._log.refusal() is not None:
            return
        if not await clocks.agree(self._database, self._ledger.now()):
            return
        async for names in ledger_sql.every_name(self._database):
            await each("retention", names, self._chain)

    async def _chain(self, name: str) -> None:
        tenant = await self._ledger.read(name)
        cut = await self._plan(tenant)
        before = tenant.state.pruned_sequence if cut is None else await self._cut(tenant, cut)
        while before and await events.drop(self._database, name, before):
            pass

    async def _plan(self, tenant: Tenant) -> _Cut | None:
        """Walk a chain link by link to its known head, and decide what is dropped.

        Raises LookupError where the links don't lead there: what somebody altered is not dropped
        with the trace of it.
        """
        cutoff = self._ledger.now() - self._age
        high = self._heads.logged(tenant.name).sequence
        at, digest = tenant.state.pruned_sequence, tenant.state.pruned_hash or GENESIS
        if high <= at:
            return None
        cut: _Cut | None = None
        young = False
        async for sequence, body, _ in events.links(self._database, tenant.name, at):
            if at == tenant.head.sequence:
                break
            if sequence != at + 1:
                raise LookupError("the chain does not verify")
            at, digest = sequence, link_hash(digest, body)
            young = young or at > high or _time(body) >= cutoff
            if not young:
                cut = at, digest
            elif cut is None:
                return None
        known = tenant.head
        if at != known.sequence or not hmac.compare_digest(digest, known.hash):
            raise LookupError("the chain does not verify")
        return cut

    async def _cut(self, tenant: Tenant, cut: _Cut) -> int:
        """Put a cut on record; return up to which event the chain is cut off by then."""
        before = tenant.state.pruned_sequence
        sequence, digest = cut
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED,
            pruned_sequence=sequence,
            pruned_hash=digest,
        )

        def prune(found: Tenant) -> int:
            # Not where another replica did so just now, elsewhere perhaps.
            if found.state.pruned_sequence == before:
                state = found.edit()
                state.pruned_sequence, state.pruned_hash = sequence, digest
                found.events.append(event)
            return int(found.state.pruned_sequence)

        pruned, head = await self._ledger.change(tenant.name, prune)
        # What is dropped can't be told again: no other branch may come first.
        await self._log.anchored(tenant.name, head)
        return pruned


def _time(body: bytes) -> datetime.datetime:
    return audit_pb2.AuditEvent.FromString(body).event_time.ToDatetime(datetime.UTC)
