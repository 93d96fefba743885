"""The ends of leases: released by their holder, or expired; many in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2, state_pb2
from google.protobuf.message import DecodeError

from services.common.errors import ByokeepError
from services.keyvault import kek, lifecycle
from services.keyvault.custody import Origin, apply
from services.keyvault.database import Database
from services.keyvault.event import content_digest
from services.keyvault.group import GroupCommit
from services.keyvault.ledger import Ledger, Tenant, part_of
from services.keyvault.lifecycle import OVERDUE_SECONDS, Change, State
from services.keyvault.sql import index
from services.keyvault.sql.index import Place

_UNOPENED: Final = ("ROW_TAMPERED", "UNDECRYPTABLE")


@dataclass(frozen=True, slots=True)
class _End:
    lease_id: str
    outcome: lease_pb2.LeaseOutcome.ValueType
    report: lease_pb2.PlaintextReport
    holder: str


class Releases:
    """Ends leases (see the module)."""

    def __init__(self, database: Database, ledger: Ledger, backends: kek.Backends) -> None:
        """End leases of a ledger's tenants."""
        self._database = database
        self._ledger = ledger
        self._backends = backends
        # Whose lease it is only the index knows: one group at a time.
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
        version NEEDS_REKEY in the same transaction. By a review it is on record only: one rejected
        call may be the provider's passing fault.

        Raises:
            ByokeepError: NOT_FOUND, also for another identity's lease.
        """
        await self._group.do(_End(lease_id, outcome, report, holder))

    async def expire(self, name: str) -> None:
        """End a tenant's leases that were never released, on the record. Raises ByokeepError."""
        tenant = await self._ledger.read(name)
        places = await index.find(self._database, [one.lease_id for one in overdue(tenant)])

        def decide(found: Tenant) -> None:
            for lease in overdue(found):
                place = places.get(lease.lease_id)
                event = leased_event(lease, place.body if place else b"")
                event.type = audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED
                event.actor = ""
                _remove(found, lease.lease_id, event)

        await self._ledger.change(name, decide)

    async def _close(self, ends: Sequence[_End]) -> list[Exception | None]:
        places = await index.find(self._database, {end.lease_id for end in ends})
        parts: dict[str, set[int]] = {}
        for place in places.values():
            parts.setdefault(place.tenant, set()).add(part_of(place.key_id))

        def decide(found: Mapping[str, Tenant | ByokeepError]) -> list[Exception | None]:
            return [
                self._end(end, place, found[place.tenant])
                if (place := places.get(end.lease_id)) is not None
                else lifecycle.not_found("lease")
                for end in ends
            ]

        return await self._ledger.group(parts, (), decide) if parts else decide({})

    def _end(self, end: _End, place: Place, tenant: Tenant | ByokeepError) -> Exception | None:
        """End one lease of a tenant that is being changed. Returns why it can't be."""
        if isinstance(tenant, ByokeepError):
            return tenant
        lease = next((one for one in tenant.usage.leases if one.lease_id == end.lease_id), None)
        if (place.holder if lease is None else lease.holder) != end.holder:
            return lifecycle.not_found("lease")
        if lease is None:
            return None  # it was closed before
        event = leased_event(lease, place.body)
        event.type, event.actor = audit_pb2.AUDIT_EVENT_TYPE_RELEASED, ""
        event.outcome = end.outcome
        event.report.CopyFrom(end.report)
        _remove(tenant, end.lease_id, event)
        rejected = end.outcome == lease_pb2.LEASE_OUTCOME_KEY_REJECTED
        if rejected and event.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION:
            self._reject(tenant, event, end.holder)
        return None

    def _reject(self, tenant: Tenant, event: audit_pb2.AuditEvent, holder: str) -> None:
        part = tenant.parts.get(part_of(event.key_id))
        key = lifecycle.find(part.state.keys, event.key_id) if part is not None else None
        versions = {one.version: lifecycle.state_of(one) for one in key.versions} if key else {}
        if versions.get(event.key_version) is State.ACTIVE:
            changes = [Change(event.key_version, audit_pb2.AUDIT_EVENT_TYPE_REJECTED)]
            apply(tenant, event.key_id, changes, Origin(holder, ""), self._backends)


def ended_early(
    tenant: Tenant,
    lease: state_pb2.LiveLease,
    kind: audit_pb2.AuditEventType.ValueType,
    reason: str,
) -> None:
    """End a lease whose key could not be sealed, of a tenant that is being changed. A version that
    did not open is marked."""
    event = leased_event(lease, b"")
    event.type, event.reason = kind, reason
    event.outcome = lease_pb2.LEASE_OUTCOME_FAILED
    _remove(tenant, lease.lease_id, event)
    living = {(key.key_id, one.version) for key, one in tenant.living()}
    if reason in _UNOPENED and (lease.key_id, lease.version) in living:
        version = lifecycle.version_of(tenant.edit_key(lease.key_id), lease.version)
        version.unopened_time = int(tenant.now.timestamp())
        version.unopened_reason = reason


def overdue(tenant: Tenant) -> list[state_pb2.LiveLease]:
    """Return the leases that nobody released in time."""
    over = (tenant.now.timestamp() - OVERDUE_SECONDS) * 1_000
    return [one for one in tenant.usage.leases if one.expire_millis < over]


def _remove(tenant: Tenant, lease_id: str, event: audit_pb2.AuditEvent) -> None:
    usage = tenant.edit_usage()
    kept = [one for one in usage.leases if one.lease_id != lease_id]
    if len(kept) == len(usage.leases):
        return
    del usage.leases[:]
    usage.leases.extend(kept)
    tenant.events.append(event)
    tenant.closed.append(lease_id)


def leased_event(lease: state_pb2.LiveLease, body: bytes) -> audit_pb2.AuditEvent:
    """Return what the LEASED event of a lease says, for the event of its end: from that event where
    it is stored as keyvault wrote it, else from the lease alone."""
    leased = audit_pb2.AuditEvent()
    try:
        leased.ParseFromString(body)
    except DecodeError:
        leased.Clear()
    if content_digest(leased) == lease.event_digest:
        leased.ClearField("state_digest")
        return leased
    return audit_pb2.AuditEvent(
        key_id=lease.key_id,
        key_version=lease.version,
        lease_id=lease.lease_id,
        caller=lease.holder,
    )
