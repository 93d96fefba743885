"""Holds: all of a tenant's leases end now, and none is given until an operator resumes.

A hold is reversible, so it touches no key version: what a tenant had is what it has when
it is resumed. It stands in the deployment's own row by name, and in the tenant's: either is enough
to give no lease. Where the tenant's row is damaged the first one holds, and what is owed to the
tenant's keys since (revoked or destroyed meanwhile) is carried out before the hold is lifted.
"""

from __future__ import annotations

from typing import Final

from byokeep.keyvault.v1 import audit_pb2

from services.common.errors import ByokeepError
from services.keyvault import custody, kek
from services.keyvault.custody import DAMAGED, Origin
from services.keyvault.database import Database
from services.keyvault.event import SYSTEM, Head
from services.keyvault.ledger import Ledger, Tenant, end_leases, part_of
from services.keyvault.lifecycle import ENDED_BY, State, not_found
from services.keyvault.log import Log
from services.keyvault.release import leased_event
from services.keyvault.sql import index

#: The deployment's own row names at most so many tenants that are held.
_MOST_HELD: Final = 10_000
_OWED: Final = Origin("keyvault", "asked for while the tenant's row was damaged")


class Holds:
    """Ends leases on an operator's word (see the module)."""

    def __init__(
        self, database: Database, ledger: Ledger, log: Log, backends: kek.Backends
    ) -> None:
        """Hold a ledger's tenants."""
        self._database = database
        self._ledger = ledger
        self._log = log
        self._backends = backends

    async def revoke_tenant(self, tenant: str, caller: str, reason: str) -> int:
        """End every lease of a tenant and give none until it is resumed; return how many ended.

        Said as often as it is asked: what lives by then ends.

        Raises:
            ByokeepError: TENANT_KEY_MISSING.
        """

        def hold(found: Tenant) -> int:
            found.edit().held = True
            ended = end_leases(found)
            found.events.append(_said(caller, held=True, detail=reason, count=ended))
            return ended

        head: Head | None = None
        try:
            ended, head = await self._ledger.change(tenant, hold)
        except ByokeepError as error:
            if error.reason not in DAMAGED:
                raise
        if head is None:
            ended = await self._end_indexed(tenant)
        await self._name(tenant, caller, ended, damaged=head is None)
        if head is not None:
            await self._log.anchored(tenant, head)
        return ended

    async def resume_tenant(self, tenant: str, caller: str, reason: str) -> bool:
        """Give leases to a tenant again; False where it was not held.

        Raises:
            ByokeepError: TENANT_KEY_MISSING; STATE_TAMPERED, ROLLED_BACK: its row is still damaged.
        """
        owed = await self.carry_out(tenant)

        def resume(found: Tenant) -> bool:
            if not found.state.held:
                return False
            found.edit().held = False
            found.events.append(_said(caller, held=False, detail=reason))
            return True

        def forget(system: Tenant) -> bool:
            if tenant not in system.state.held:
                return False
            system.edit().held.remove(tenant)
            system.events.append(_said(caller, held=False, detail=tenant))
            return True

        resumed, head = await self._ledger.change(tenant, resume)
        await self._log.anchored(tenant, head)
        named, head = await self._ledger.change(SYSTEM, forget)
        await self._log.anchored(SYSTEM, head)
        return owed or resumed or named

    async def revoke_lease(self, lease_id: str, caller: str, reason: str) -> bool:
        """End one lease; False where it had ended before. Raises ByokeepError: NOT_FOUND."""
        place = (await index.find(self._database, [lease_id])).get(lease_id)
        if place is None:
            raise not_found("lease")

        def end(found: Tenant) -> bool:
            leases = found.edit_usage().leases
            lease = next((one for one in leases if one.lease_id == lease_id), None)
            if lease is None or lease.ended:
                return False
            lease.ended = found.ends = True
            found.ended.append(lease_id)
            leased = leased_event(lease, place.body)
            event = audit_pb2.AuditEvent(
                type=audit_pb2.AUDIT_EVENT_TYPE_LEASE_REVOKED,
                key_id=lease.key_id,
                key_version=lease.version,
                lease_id=lease_id,
                grant_id=leased.grant_id,
                review_id=leased.review_id,
                attempt_id=leased.attempt_id,
                fence=leased.fence,
                caller=caller,
                detail=reason,
            )
            found.events.append(event)
            return True

        ended, head = await self._ledger.change(place.tenant, end)
        await self._log.anchored(place.tenant, head)
        return ended

    async def carry_out(self, tenant: str) -> bool:
        """Revoke or destroy what was to be while the tenant's row was damaged; False where nothing
        was. Raises ByokeepError: STATE_TAMPERED, ROLLED_BACK: it still is."""
        system = (await self._ledger.read(SYSTEM)).state
        owed = [one for one in system.owed if one.tenant == tenant]
        if not owed:
            return False

        def act(found: Tenant) -> None:
            for one in owed:
                if found.key(one.key_id) is not None:
                    after = State(one.state)
                    custody.finish(found, one.key_id, _OWED, self._backends, after)

        parts = {part_of(one.key_id) for one in owed}
        _, head = await self._ledger.change(tenant, act, parts)
        await self._log.anchored(tenant, head)

        def forget(found: Tenant) -> None:
            kept = [one for one in found.state.owed if one not in owed]
            done = [one for one in found.state.owed if one in owed]
            del found.edit().owed[:]
            found.state.owed.extend(kept)
            found.events += [
                audit_pb2.AuditEvent(
                    type=ENDED_BY[State(one.state)],
                    key_id=one.key_id,
                    caller=_OWED.caller,
                    detail=tenant,
                )
                for one in done
            ]

        _, head = await self._ledger.change(SYSTEM, forget)
        await self._log.anchored(SYSTEM, head)
        return True

    async def _name(self, tenant: str, caller: str, count: int, *, damaged: bool) -> None:
        """Hold a tenant by name in the deployment's own row."""

        def name(system: Tenant) -> None:
            named = tenant in system.state.held
            if not named and len(system.state.held) >= _MOST_HELD and not damaged:
                return  # its own row holds it
            if not named:
                system.edit().held.append(tenant)
            if damaged or not named:
                system.events.append(_said(caller, held=True, detail=tenant, count=count))

        _, head = await self._ledger.change(SYSTEM, name)
        await self._log.anchored(SYSTEM, head)

    async def _end_indexed(self, tenant: str) -> int:
        """End the leases of a tenant that the index knows, and tell the watchers."""
        self._ledger.ends[tenant] += 1
        async with self._database.transaction() as connection:
            lease_ids = await index.of_tenant(connection, tenant)
            if lease_ids:
                await index.end(connection, lease_ids)
        return len(lease_ids)


def _said(caller: str, *, held: bool, detail: str, count: int = 0) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(
        type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED
        if held
        else audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED,
        caller=caller,
        detail=detail,
        count=count,
    )
