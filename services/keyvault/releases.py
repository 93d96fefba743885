"""The ends of leases: released by their holder, or expired; many in one transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import chain, domain
from services.keyvault.custody import Custody, Origin
from services.keyvault.database import Connection, Database
from services.keyvault.domain import Change, State
from services.keyvault.group import LARGEST, GroupCommit
from services.keyvault.redemption import lease_event
from services.keyvault.store import leases as store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _End:
    lease_id: str
    kind: audit_pb2.AuditEventType.ValueType
    outcome: lease_pb2.LeaseOutcome.ValueType
    report: lease_pb2.PlaintextReport | None
    holder: str | None  # None: keyvault itself

    def may_end(self, lease: store.Lease) -> bool:
        return self.holder in (None, lease.holder)

    def event(self, locked: store.LockedLease) -> audit_pb2.AuditEvent:
        event = lease_event(locked.lease, locked.provider, locked.owner, self.kind)
        event.outcome = self.outcome
        if self.report is not None:
            event.report.CopyFrom(self.report)
        return event


def _expiry(lease_id: str) -> _End:
    kind, outcome = audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED, lease_pb2.LEASE_OUTCOME_UNSPECIFIED
    return _End(lease_id, kind, outcome, report=None, holder=None)


class Releases:
    """Ends leases (see the module)."""

    def __init__(self, database: Database, custody: Custody, deployment: str) -> None:
        """End leases of a database."""
        self._database = database
        self._custody = custody
        self._deployment = deployment
        # Which chain a lease locks is known only to the database: one group at a time.
        self._group: GroupCommit[_End, None] = GroupCommit(self._close, lambda end: None)

    async def release(
        self,
        lease_id: str,
        outcome: lease_pb2.LeaseOutcome.ValueType,
        report: lease_pb2.PlaintextReport,
        holder: str,
    ) -> None:
        """End a lease; a second release changes nothing. Only its holder may.

        KEY_REJECTED by a validation, which asked for the provider's model list, marks an ACTIVE
        version NEEDS_REKEY in the same transaction, unless its key's rows were forged. By a review
        it is on record only: one rejected call may be the provider's passing fault.

        Raises:
            ByokeepError: NOT_FOUND, also for another identity's lease.
        """
        end = _End(lease_id, audit_pb2.AUDIT_EVENT_TYPE_RELEASED, outcome, report, holder)
        if outcome == lease_pb2.LEASE_OUTCOME_KEY_REJECTED:
            await self._reject(end)
        else:
            await self._group.do(end)

    async def expire(self) -> None:
        """End leases that were never released, on the record; one that can't be ended stays, and
        keeps no other from it."""
        last = store.OLDEST
        failures: list[Exception] = []
        while overdue := await store.overdue(self._database, last, LARGEST):
            ends = [_expiry(lease_id) for _, lease_id in overdue]
            results = await asyncio.gather(*map(self._group.do, ends), return_exceptions=True)
            failures += [one for one in results if isinstance(one, Exception)]
            last = overdue[-1]
        for failure in failures[:1]:
            logs.failure(log, "expiry_failed", failure, leases=len(failures))

    async def _close(self, ends: Sequence[_End]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        closed: dict[str, tuple[store.Lease, int, chain.Link]] = {}
        heads: dict[str, chain.Head] = {}
        async with self._database.pipelined() as connection:
            found = await store.lock_leases(connection, {end.lease_id for end in ends})
            for end in ends:
                locked = found.get(end.lease_id)
                if locked is None or not end.may_end(locked.lease):
                    outcomes.append(domain.not_found("lease"))
                    continue
                outcomes.append(None)
                if locked.released or end.lease_id in closed:
                    continue
                name = locked.head.chain
                head = heads.get(name, locked.head)
                heads[name], (link,) = chain.link(head, self._deployment, [end.event(locked)])
                closed[end.lease_id] = locked.lease, end.outcome, link
            if closed:
                await store.close_recorded(connection, closed.values())
        return outcomes

    async def _reject(self, end: _End) -> None:
        async with self._database.transaction() as connection:
            locked = (await store.lock_leases(connection, [end.lease_id])).get(end.lease_id)
            if locked is None or not end.may_end(locked.lease):
                raise domain.not_found("lease")
            if locked.released:
                return
            await store.close(connection, end.lease_id, end.outcome)
            event = end.event(locked)
            if locked.lease.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION and (
                locked.state is State.ACTIVE
            ):
                await self._mark(connection, locked, event)
            else:
                await chain.append(connection, locked.head, self._deployment, [event])

    async def _mark(
        self, connection: Connection, locked: store.LockedLease, event: audit_pb2.AuditEvent
    ) -> None:
        lease = locked.lease
        try:
            key = await self._custody.checked(connection, lease.tenant, lease.key_id)
        except ByokeepError:
            # Another of its rows was forged: no state follows then, but this lease has ended.
            await chain.append(connection, locked.head, self._deployment, [event])
            return
        changes = [Change(lease.version, audit_pb2.AUDIT_EVENT_TYPE_REJECTED)]
        origin = Origin(lease.holder, "")
        await self._custody.apply(connection, locked.head, key, changes, origin, before=(event,))
