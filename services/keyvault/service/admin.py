"""AdminService: the admin role, which never unwraps a data key of a tenant."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2 as pb
from byokeep.keyvault.v1 import admin_pb2_grpc, audit_pb2
from byokeep.names import tenant_name, tenant_of

from services.common import authz
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain, kek, needed, system_keys
from services.keyvault.anchor import Anchor
from services.keyvault.custody import Custody, Origin, end_leases
from services.keyvault.database import Database
from services.keyvault.holds import Holds, Word
from services.keyvault.reconcile import Reconcile
from services.keyvault.rotation import Rotation
from services.keyvault.store import epochs as epoch_store
from services.keyvault.store import holds as hold_store
from services.keyvault.store import jobs as job_store
from services.keyvault.store import keys as key_store
from services.keyvault.store import leases as lease_store
from services.keyvault.store.jobs import Job, Order

_KINDS = {
    pb.SYSTEM_KEY_KIND_INTAKE_SIGNING: system_keys.INTAKE_SIGNING,
    pb.SYSTEM_KEY_KIND_AUDIT_LOG: system_keys.AUDIT_LOG,
}
_ROTATE = Order(rotate=True, rewrap=False, trim=False)
_PROGRESS_SECONDS = 0.3
# Named in an answer; all of them are in the job's table, and in the log.
_FAILURES = 100
_PAGE = 200
_MOST_HELD = 100
_TENANTS = "SELECT count(*) FROM chain WHERE chain <> 'system'"


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Serves operators."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        custody: Custody,
        rotation: Rotation,
        anchor: Anchor,
        reconcile: Reconcile,
        holds: Holds,
        retention: datetime.timedelta,
        deployment: str,
    ) -> None:
        """Administer KEKs and keyvault's own state."""
        self._database = database
        self._backends = backends
        self._custody = custody
        self._rotation = rotation
        self._anchor = anchor
        self._reconcile = reconcile
        self._holds = holds
        self._retention = retention
        self._deployment = deployment

    async def CreateTenantKey(
        self, request: pb.CreateTenantKeyRequest, context: Any
    ) -> pb.CreateTenantKeyResponse:
        """Create a tenant's KEK and its audit chain."""
        tenant = tenant_of(request.tenant)
        backend = self._backends.primary
        created = await backend.create(kek.tenant_kek(tenant))
        version = await backend.newest(kek.tenant_kek(tenant))
        async with self._database.transaction() as connection:
            await chain.create(connection, request.tenant)
            head = await chain.lock(connection, request.tenant)
            if created or head.sequence == 0:
                event = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED)
                await chain.append(connection, head, self._deployment, [event])
            await job_store.lower_minimum(connection, tenant, backend.name, version)
        return pb.CreateTenantKeyResponse(backend=backend.name, version=version, created=created)

    async def RotateTenantKey(
        self, request: pb.RotateTenantKeyRequest, context: Any
    ) -> pb.RotateTenantKeyResponse:
        """Make a new version of a tenant's KEK."""
        job = await self._rotation.order(
            tenant_of(request.tenant), request.request_id, authz.current().spiffe_id, _ROTATE
        )
        while job.phase in ("QUEUED", "START"):
            await asyncio.sleep(_PROGRESS_SECONDS)
            job = await self._rotation.get(job.job_id)
        return pb.RotateTenantKeyResponse(version=job.target_version)

    async def RewrapTenant(
        self, request: pb.RewrapTenantRequest, context: Any
    ) -> AsyncIterator[pb.RewrapTenantResponse]:
        """Queue a rewrap and stream its progress; it goes on without a listener."""
        primary = self._backends.primary.name
        if request.target_backend not in ("", primary):
            raise _other_backend(request.target_backend, primary)
        job = await self._rotation.order(
            tenant_of(request.tenant),
            request.request_id or new_id("req"),
            authz.current().spiffe_id,
            Order(rotate=False, rewrap=True, trim=request.trim),
        )
        while job.phase not in job_store.ENDED:
            yield _progress(job)
            await asyncio.sleep(_PROGRESS_SECONDS)
            job = await self._rotation.get(job.job_id)
        last = _progress(job)
        for one in await job_store.failures(self._database, job.job_id, _FAILURES):
            last.failures.add(key_id=one.key_id, version=one.version, reason=one.reason)
        yield last

    async def ListTenantKeys(
        self, request: pb.ListTenantKeysRequest, context: Any
    ) -> pb.ListTenantKeysResponse:
        """Say where each tenant's data keys are."""
        size = request.page_size or _PAGE
        rows = await job_store.tenant_keks(self._database, request.page_token, size)
        answer = pb.ListTenantKeysResponse()
        for tenant, group in itertools.groupby(rows, key=lambda row: row[0]):
            entry = answer.tenant_keys.add(tenant=tenant_name(tenant))
            for _, backend, oldest, newest, count in group:
                if backend is not None:
                    entry.holdings.add(
                        backend=backend, oldest_version=oldest, newest_version=newest, rows=count
                    )
        for entry in answer.tenant_keys:
            if not entry.holdings:
                entry.kek_destroyed = await self._destroyed(tenant_of(entry.tenant))
        if len(answer.tenant_keys) == size:
            answer.next_page_token = rows[-1][0]
        return answer

    async def _destroyed(self, tenant: str) -> bool:
        for backend in self._backends:
            try:
                await backend.newest(kek.tenant_kek(tenant))
            except kek.KekMissingError:
                continue
            except kek.KekUnavailableError:
                pass
            return False
        return True

    async def ListKekBackends(
        self, request: pb.ListKekBackendsRequest, context: Any
    ) -> pb.ListKekBackendsResponse:
        """Say what each backend holds, and until when it is needed."""
        found = await needed.needs(self._database, self._retention)
        configured = [backend.name for backend in self._backends]
        answer = pb.ListKekBackendsResponse()
        for name in sorted({*found, *configured}):
            need = found.get(name, needed.Need())
            one = answer.backends.add(
                backend=name,
                primary=name == self._backends.primary.name,
                configured=name in configured,
                data_keys=need.data_keys,
                tenants=need.tenants,
                system_keys=need.system_keys,
            )
            if need.epochs_end is not None:
                one.epochs_end_time.FromDatetime(need.epochs_end)
        return answer

    async def PrepareSystemKey(
        self, request: pb.PrepareSystemKeyRequest, context: Any
    ) -> pb.PrepareSystemKeyResponse:
        """Make a signing key that does not sign yet, and give its public part out."""
        key_id, public = await system_keys.prepare(
            self._database,
            self._backends,
            self._deployment,
            _KINDS[request.kind],
            authz.current().spiffe_id,
        )
        return pb.PrepareSystemKeyResponse(key_id=key_id, public_key=public)

    async def ActivateSystemKey(
        self, request: pb.ActivateSystemKeyRequest, context: Any
    ) -> pb.ActivateSystemKeyResponse:
        """Let a prepared key sign."""
        await system_keys.activate(
            self._database,
            self._deployment,
            _KINDS[request.kind],
            request.key_id,
            authz.current().spiffe_id,
        )
        return pb.ActivateSystemKeyResponse()

    async def ShredTenant(
        self, request: pb.ShredTenantRequest, context: Any
    ) -> pb.ShredTenantResponse:
        """Destroy every key of a tenant, then its KEK and its content keys."""
        tenant = tenant_of(request.tenant)
        stored = await self._destroy_all(tenant)
        for backend in self._backends:
            await backend.destroy(kek.tenant_kek(tenant))
        # A job of the tenant's that began meanwhile may have let keys in again; and what failed
        # once may not again.
        stored = await self._destroy_all(tenant) | stored
        shred = self._backends.primary.shred
        async with self._database.transaction() as connection:
            # By itself: what is dead already must not wait for a chain that takes no event.
            await key_store.erase(connection, tenant)
            await epoch_store.forget_tenant(connection, tenant)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, request.tenant)
            # Of keys that were hidden too.
            await end_leases(connection, tenant)
            event = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED, shred=shred)
            await chain.append(connection, head, self._deployment, [event])
            await job_store.cancel(connection, tenant)
        return pb.ShredTenantResponse(destroyed_versions=sum(stored.values()), shred=shred)

    async def _destroy_all(self, tenant: str) -> dict[str, int]:
        """Let no key be stored from now on, and destroy those that there are; return how many
        versions of each had ciphertext."""
        async with self._database.transaction() as connection:
            # Where a chain was taken away nothing is staged anyway.
            with contextlib.suppress(ByokeepError):
                await chain.lock(connection, chain.tenant_chain(tenant))
            for backend in self._backends:
                await job_store.raise_minimum(connection, tenant, backend.name, job_store.WHOLE)
        stored = await key_store.stored(self._database, tenant)
        origin = Origin(authz.current().spiffe_id, "")
        # Those too that have no ciphertext any more: their rows may say otherwise than DESTROYED.
        # One that can't be destroyed by itself is with the others, by its tenant's chain.
        await each("destroy", stored, lambda key: self._custody.destroy(tenant, key, origin))
        return stored

    async def ResumeLeases(
        self, request: pb.ResumeLeasesRequest, context: Any
    ) -> pb.ResumeLeasesResponse:
        """Resume leases after a rollback was noticed."""
        stopped = self._anchor.refusal() is not None
        await self._anchor.resume(authz.current().spiffe_id, request.reason)
        # What is taken for the truth now has not been compared yet.
        await self._reconcile.once()
        return pb.ResumeLeasesResponse(resumed=stopped)

    async def RevokeTenant(
        self, request: pb.RevokeTenantRequest, context: Any
    ) -> pb.RevokeTenantResponse:
        """End a tenant's leases, and hold back new ones."""
        word = Word(authz.current().spiffe_id, request.reason)
        ended = await self._holds.revoke_tenant(tenant_of(request.tenant), word)
        return pb.RevokeTenantResponse(ended_leases=ended)

    async def ResumeTenant(
        self, request: pb.ResumeTenantRequest, context: Any
    ) -> pb.ResumeTenantResponse:
        """Give leases to a tenant again."""
        word = Word(authz.current().spiffe_id, request.reason)
        resumed = await self._holds.resume_tenant(tenant_of(request.tenant), word)
        return pb.ResumeTenantResponse(resumed=resumed)

    async def RevokeLease(
        self, request: pb.RevokeLeaseRequest, context: Any
    ) -> pb.RevokeLeaseResponse:
        """End one lease."""
        word = Word(authz.current().spiffe_id, request.reason)
        return pb.RevokeLeaseResponse(ended=await self._holds.revoke_lease(request.lease_id, word))

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
            kek_backend_state=health.state,
            kek_backend_detail=health.detail,
            undecryptable_keys=await job_store.undecryptable(self._database),
            open_kek_jobs=await job_store.open_count(self._database),
            held_tenants=await hold_store.held(self._database, _MOST_HELD),
            contradicted_tenants=sorted(self._reconcile.differing_holds()),
            broken_tenants=self._reconcile.broken_tenants(),
        )
        if self._reconcile.last is not None:
            status.reconcile_time.FromDatetime(self._reconcile.last)
        return status


def _event(kind: audit_pb2.AuditEventType.ValueType, shred: str = "") -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(type=kind, caller=authz.current().spiffe_id, shred=shred)


def _progress(job: Job) -> pb.RewrapTenantResponse:
    return pb.RewrapTenantResponse(
        done=job.done,
        total=job.total or 0,
        failed=job.failed,
        phase=pb.KekJobPhase.Value(f"KEK_JOB_PHASE_{job.phase}"),
        backend=job.target_backend,
        version=job.target_version,
    )


def _other_backend(wanted: str, primary: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "KEK_BACKEND_NOT_PRIMARY",
        f"data keys are moved to the primary backend, which is {primary}; to move them to"
        f" {wanted}, set BYOKEEP_KEK_BACKEND={wanted} and keep {primary} in"
        " BYOKEEP_KEK_BACKENDS_READ",
        backend=primary,
    )
