"""AdminService: the admin role, which never unwraps a data key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from byokeep.keyvault.v1 import admin_pb2 as pb
from byokeep.keyvault.v1 import admin_pb2_grpc, audit_pb2
from byokeep.names import tenant_of

from services.common import authz
from services.keyvault import chain, kek
from services.keyvault.anchor import Anchor
from services.keyvault.custody import Custody, Origin
from services.keyvault.database import Database
from services.keyvault.domain import State, destroy
from services.keyvault.reconcile import Reconcile
from services.keyvault.service.audit import not_built
from services.keyvault.store import epochs as epoch_store
from services.keyvault.store import keys as key_store
from services.keyvault.store import leases as lease_store

_TENANTS = "SELECT count(*) FROM chain WHERE chain <> 'system'"


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Serves operators."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        custody: Custody,
        anchor: Anchor,
        reconcile: Reconcile,
        deployment: str,
    ) -> None:
        """Administer KEKs and keyvault's own state."""
        self._database = database
        self._backends = backends
        self._custody = custody
        self._anchor = anchor
        self._reconcile = reconcile
        self._deployment = deployment

    async def CreateTenantKey(
        self, request: pb.CreateTenantKeyRequest, context: Any
    ) -> pb.CreateTenantKeyResponse:
        """Create a tenant's KEK and its audit chain."""
        tenant = tenant_of(request.tenant)
        backend = self._backends.primary
        created = await backend.create(kek.tenant_kek(tenant))
        async with self._database.transaction() as connection:
            await chain.create(connection, request.tenant)
            head = await chain.lock(connection, request.tenant)
            if created or head.sequence == 0:
                event = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED)
                await chain.append(connection, head, self._deployment, [event])
        version = await backend.newest(kek.tenant_kek(tenant))
        return pb.CreateTenantKeyResponse(backend=backend.name, version=version, created=created)

    async def RotateTenantKey(
        self, request: pb.RotateTenantKeyRequest, context: Any
    ) -> pb.RotateTenantKeyResponse:
        """Answer UNIMPLEMENTED until rotation is built."""
        raise not_built("RotateTenantKey", "every key version already has a data key of its own")

    async def RewrapTenant(
        self, request: pb.RewrapTenantRequest, context: Any
    ) -> AsyncIterator[pb.RewrapTenantResponse]:
        """Answer UNIMPLEMENTED until rotation is built."""
        raise not_built("RewrapTenant", "it follows RotateTenantKey")
        yield pb.RewrapTenantResponse()

    async def ShredTenant(
        self, request: pb.ShredTenantRequest, context: Any
    ) -> pb.ShredTenantResponse:
        """Destroy every key of a tenant, then its KEK and its content keys."""
        tenant = tenant_of(request.tenant)
        origin = Origin(authz.current().spiffe_id, "")
        destroyed = 0
        async with self._database.transaction() as connection:
            keys = await key_store.of_tenant(connection, tenant)
        for key in keys:
            live = [one for one in key.versions if one.state is not State.DESTROYED]
            if live:
                await self._custody.change(tenant, key.key_id, origin, lambda one, _: destroy(one))
                destroyed += len(live)
        for backend in self._backends:
            await backend.destroy(kek.tenant_kek(tenant))
        shred = self._backends.primary.shred
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, request.tenant)
            await epoch_store.forget_tenant(connection, tenant)
            event = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED, shred=shred)
            await chain.append(connection, head, self._deployment, [event])
        return pb.ShredTenantResponse(destroyed_versions=destroyed, shred=shred)

    async def ResumeLeases(
        self, request: pb.ResumeLeasesRequest, context: Any
    ) -> pb.ResumeLeasesResponse:
        """Resume leases after a rollback was noticed."""
        await self._anchor.resume(authz.current().spiffe_id, request.reason)
        # What is taken for the truth now has not been compared yet.
        await self._reconcile.once()
        return pb.ResumeLeasesResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """Say how keyvault is."""
        refusal = self._anchor.refusal()
        backend = self._backends.primary
        health = await backend.health()
        tenants = await self._database.one(_TENANTS)
        status = pb.GetStatusResponse(
            deployment=self._deployment,
            kek_backend=backend.name,
            kek_backend_healthy=health.ok,
            shred=backend.shred,
            leases_allowed=refusal is None,
            refusal_reason=refusal.reason if refusal else "",
            frozen_keys=self._reconcile.frozen(),
            live_leases=await lease_store.live_count(self._database),
            tenants=tenants[0] if tenants else 0,
        )
        if self._reconcile.last is not None:
            status.reconcile_time.FromDatetime(self._reconcile.last)
        return status


def _event(kind: audit_pb2.AuditEventType.ValueType, shred: str = "") -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(type=kind, caller=authz.current().spiffe_id, shred=shred)
