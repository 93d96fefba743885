"""The end of a tenant: every key's versions, then its KEK in every backend, then what is stored.

The intent is anchored before anything is destroyed, so that no database that is put back has the
tenant live again; whoever finds a shredded tenant with a KEK left finishes it.
"""

from __future__ import annotations

from typing import Final

from byokeep.keyvault.v1 import audit_pb2

from services.common.errors import ByokeepError
from services.keyvault import custody, kek, lifecycle
from services.keyvault.custody import DAMAGED, Origin, Request
from services.keyvault.database import Database
from services.keyvault.event import SYSTEM
from services.keyvault.ledger import ALL, Ledger, Tenant, end_leases
from services.keyvault.lifecycle import WHOLE, State
from services.keyvault.log import Log
from services.keyvault.sql import epochs as epoch_sql
from services.keyvault.sql import ledger as sql
from services.keyvault.tenant_keys import untrimmed

#: The deployment's own row names at most so many tenants that were shredded while damaged.
_MOST_SHREDDED: Final = 10_000


class Shredding:
    """Destroys tenants (see the module); in the admin role."""

    def __init__(
        self, database: Database, ledger: Ledger, log: Log, backends: kek.Backends
    ) -> None:
        """Destroy a ledger's tenants."""
        self._database = database
        self._ledger = ledger
        self._log = log
        self._backends = backends

    async def shred(self, tenant: str, request: Request, caller: str) -> int:
        """Destroy a tenant with every key that it has; return how many versions died. By name also
        where its row is damaged.

        Raises:
            ByokeepError: TENANT_KEY_MISSING where there never was one; then its KEKs are destroyed
                all the same. REQUEST_ID_CONFLICT.
        """
        try:
            destroyed, head = await self._ledger.change(
                tenant, lambda found: self._shred(found, request, Origin(caller, "")), ALL
            )
            await self._log.anchored(tenant, head)
        except ByokeepError as error:
            if error.reason not in (*DAMAGED, "TENANT_KEY_MISSING"):
                raise
            failed = error
        else:
            await self.finish(tenant, caller)
            return destroyed
        if failed.reason in DAMAGED:
            await self._name_shredded(tenant, caller, failed)
        await self._destroy(tenant)
        if failed.reason not in DAMAGED:
            raise failed
        return 0

    async def finish(self, tenant: str, caller: str) -> None:
        """Destroy what is left of a shredded tenant, and say so. Its state is anchored."""
        await self._destroy(tenant)

        def done(found: Tenant) -> None:
            if not found.state.shredded or not untrimmed(found.state, self._backends):
                return
            for one in untrimmed(found.edit(), self._backends):
                one.trimming = one.trimmed = WHOLE
            found.events.append(
                audit_pb2.AuditEvent(
                    type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED,
                    caller=caller,
                    shred=self._backends.primary.shred,
                )
            )

        _, head = await self._ledger.change(tenant, done)
        await self._log.anchored(tenant, head)

    async def shred_named(self, tenant: str) -> None:
        """Shred a tenant whose row was damaged when that was asked, and is whole again."""
        origin = Origin("keyvault", "asked for while the tenant's row was damaged")
        _, head = await self._ledger.change(
            tenant, lambda found: self._shred(found, None, origin), ALL
        )
        await self._log.anchored(tenant, head)

    def _shred(self, found: Tenant, request: Request | None, origin: Origin) -> int:
        past = custody.done_before(found.state.requests, request) if request else None
        if past is not None:
            return past.version
        destroyed = 0
        for key in found.every_key():
            if changes := lifecycle.end(key, State.DESTROYED):
                destroyed += len(changes)
                custody.apply(found, key.key_id, changes, origin, self._backends)
        if found.state.shredded and not destroyed:
            return 0
        state = found.edit()
        state.shredded = True
        for backend in self._backends:
            lifecycle.edit_kek(state, backend.name)
        for one in state.keks:
            one.trimming = WHOLE
        end_leases(found)
        found.events.append(
            audit_pb2.AuditEvent(
                type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMING,
                caller=origin.caller,
                actor=origin.actor,
                detail="shred",
            )
        )
        if request is not None:
            custody.remember(state.requests, request.past(destroyed))
        return destroyed

    async def _destroy(self, tenant: str) -> None:
        for backend in self._backends:
            await backend.destroy(kek.tenant_kek(tenant))
        async with self._database.transaction() as connection:
            await sql.drop_all_secrets(connection, tenant)
            await epoch_sql.forget_tenant(connection, tenant)

    async def _name_shredded(self, tenant: str, caller: str, failed: ByokeepError) -> None:
        def name(system: Tenant) -> None:
            if tenant not in system.state.shredded:
                if len(system.state.shredded) >= _MOST_SHREDDED:
                    raise failed
                system.edit().shredded.append(tenant)
            system.events.append(
                audit_pb2.AuditEvent(
                    type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED,
                    caller=caller,
                    detail=tenant,
                    shred=self._backends.primary.shred,
                )
            )

        _, head = await self._ledger.change(SYSTEM, name)
        await self._log.anchored(SYSTEM, head)
