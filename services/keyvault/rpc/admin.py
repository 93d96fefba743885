"""AdminService: the admin role, which never unwraps a data key of a tenant."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
from byokeep.encoding import fields
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2 as pb
from byokeep.keyvault.v1 import admin_pb2_grpc, state_pb2
from byokeep.names import tenant_name, tenant_of

from services.common import authz
from services.common.errors import ByokeepError
from services.keyvault import kek, lifecycle, needed, system_keys
from services.keyvault.custody import DAMAGED, Request
from services.keyvault.database import Database
from services.keyvault.holds import Holds
from services.keyvault.ledger import ALL, Ledger
from services.keyvault.log import Log
from services.keyvault.shred import Shredding
from services.keyvault.sql import index
from services.keyvault.sql import ledger as sql
from services.keyvault.tenant_keys import TenantKeys
from services.keyvault.upkeep.progress import ENDED, progress
from services.keyvault.upkeep.work import Upkeep

_KINDS: Final = {
    pb.SYSTEM_KEY_KIND_INTAKE_SIGNING: system_keys.INTAKE_SIGNING,
    pb.SYSTEM_KEY_KIND_AUDIT_LOG: system_keys.AUDIT_LOG,
    pb.SYSTEM_KEY_KIND_STATE_MAC: system_keys.STATE_MAC,
}
_PROGRESS_SECONDS: Final = 0.3
_PAGE: Final = 200
_MOST_NAMED: Final = 100


@dataclass(frozen=True, slots=True)
class Administered:
    """What the service administers."""

    ledger: Ledger
    log: Log
    holds: Holds
    tenant_keys: TenantKeys
    shredding: Shredding
    system_keys: system_keys.Rotation
    upkeep: Upkeep


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Serves operators."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        administered: Administered,
        retention: datetime.timedelta,
        deployment: str,
    ) -> None:
        """Administer KEKs and keyvault's own state."""
        self._database = database
        self._backends = backends
        self._on = administered
        self._retention = retention
        self._deployment = deployment

    async def CreateTenantKey(
        self, request: pb.CreateTenantKeyRequest, context: Any
    ) -> pb.CreateTenantKeyResponse:
        """Create a tenant with its KEK and its audit chain."""
        aim = await self._on.tenant_keys.create(
            tenant_of(request.tenant), _request("create", request.request_id), _caller()
        )
        backend = self._backends.primary.name
        return pb.CreateTenantKeyResponse(backend=backend, version=aim.version, created=aim.made)

    async def RotateTenantKey(
        self, request: pb.RotateTenantKeyRequest, context: Any
    ) -> pb.RotateTenantKeyResponse:
        """Make a new version of a tenant's KEK."""
        version = await self._on.tenant_keys.rotate(
            tenant_of(request.tenant), _request("rotate", request.request_id), _caller()
        )
        return pb.RotateTenantKeyResponse(version=version)

    async def RewrapTenant(
        self, request: pb.RewrapTenantRequest, context: Any
    ) -> AsyncIterator[pb.RewrapTenantResponse]:
        """Have a tenant's data keys wrapped again and stream how far that is; it goes on without a
        listener."""
        primary = self._backends.primary.name
        if request.target_backend not in ("", primary):
            raise _other_backend(request.target_backend, primary)
        tenant = tenant_of(request.tenant)
        asked = _request("rewrap", request.request_id or new_id("req"), request.trim)
        await self._on.tenant_keys.rewrap(tenant, asked, _caller(), trim=request.trim)
        while True:
            read = await self._on.ledger.read(tenant, ALL)
            found = progress(read, self._backends, quiet=self._on.log.quiet)
            if found.phase in ENDED:
                yield found
                return
            del found.failures[:]
            yield found
            await asyncio.sleep(_PROGRESS_SECONDS)

    async def ListTenantKeys(
        self, request: pb.ListTenantKeysRequest, context: Any
    ) -> pb.ListTenantKeysResponse:
        """Say where each tenant's data keys are."""
        size = request.page_size or _PAGE
        async with self._database.transaction() as connection:
            names = list(await sql.names(connection, request.page_token, size))
        answer = pb.ListTenantKeysResponse()
        for name in names:
            entry = answer.tenant_keys.add(tenant=tenant_name(name))
            try:
                entry.holdings.extend(_holdings((await self._on.ledger.read(name)).state))
            except ByokeepError as error:
                if error.reason not in DAMAGED:
                    raise
                continue  # it is named by GetStatus
            if not entry.holdings:
                with suppress(kek.KekUnavailableError):
                    entry.kek_destroyed = not await self._backends.have(kek.tenant_kek(name))
        if len(names) == size:
            answer.next_page_token = names[-1]
        return answer

    async def ListKekBackends(
        self, request: pb.ListKekBackendsRequest, context: Any
    ) -> pb.ListKekBackendsResponse:
        """Say what each backend holds, and until when it is needed."""
        found = await needed.needs(self._database, self._on.ledger, self._retention)
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
        """Make a key of keyvault's own that is not used yet, and give its public part out."""
        key_id, public = await self._on.system_keys.prepare(_KINDS[request.kind], _caller())
        return pb.PrepareSystemKeyResponse(key_id=key_id, public_key=public)

    async def ActivateSystemKey(
        self, request: pb.ActivateSystemKeyRequest, context: Any
    ) -> pb.ActivateSystemKeyResponse:
        """Have a prepared key used."""
        await self._on.system_keys.activate(_KINDS[request.kind], request.key_id, _caller())
        return pb.ActivateSystemKeyResponse()

    async def ShredTenant(
        self, request: pb.ShredTenantRequest, context: Any
    ) -> pb.ShredTenantResponse:
        """Destroy every key of a tenant, then its KEK and its content keys."""
        destroyed = await self._on.shredding.shred(
            tenant_of(request.tenant), _request("shred", request.request_id), _caller()
        )
        shred = self._backends.primary.shred
        return pb.ShredTenantResponse(destroyed_versions=destroyed, shred=shred)

    async def ResumeLeases(
        self, request: pb.ResumeLeasesRequest, context: Any
    ) -> pb.ResumeLeasesResponse:
        """Resume leases after a rollback was noticed."""
        stopped = self._on.log.refusal() is not None
        await self._on.log.resume(_caller(), request.reason)
        return pb.ResumeLeasesResponse(resumed=stopped)

    async def RevokeTenant(
        self, request: pb.RevokeTenantRequest, context: Any
    ) -> pb.RevokeTenantResponse:
        """End a tenant's leases, and hold back new ones."""
        ended = await self._on.holds.revoke_tenant(
            tenant_of(request.tenant), _caller(), request.reason
        )
        return pb.RevokeTenantResponse(ended_leases=ended)

    async def ResumeTenant(
        self, request: pb.ResumeTenantRequest, context: Any
    ) -> pb.ResumeTenantResponse:
        """Give leases to a tenant again."""
        resumed = await self._on.holds.resume_tenant(
            tenant_of(request.tenant), _caller(), request.reason
        )
        return pb.ResumeTenantResponse(resumed=resumed)

    async def RevokeLease(
        self, request: pb.RevokeLeaseRequest, context: Any
    ) -> pb.RevokeLeaseResponse:
        """End one lease."""
        ended = await self._on.holds.revoke_lease(request.lease_id, _caller(), request.reason)
        return pb.RevokeLeaseResponse(ended=ended)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """Say how keyvault is."""
        log, upkeep = self._on.log, self._on.upkeep
        refusal = log.refusal()
        backend = self._backends.primary
        health = await backend.health()
        status = pb.GetStatusResponse(
            deployment=self._deployment,
            kek_backend=backend.name,
            kek_backend_healthy=health.ok,
            shred=backend.shred,
            leases_allowed=refusal is None,
            refusal_reason=refusal.reason if refusal else "",
            live_leases=await index.live_count(self._database),
            tenants=await sql.count(self._database),
            kek_backend_state=health.state,
            kek_backend_detail=health.detail,
            undecryptable_keys=sum(upkeep.undecryptable.values()),
            open_kek_jobs=len(upkeep.open),
            held_tenants=sorted(log.system.held)[:_MOST_NAMED],
            broken_tenants=sorted(upkeep.damaged)[:_MOST_NAMED],
        )
        # Infinite before the first tick.
        if log.age < datetime.timedelta.max.total_seconds():
            looked = self._on.ledger.now() - datetime.timedelta(seconds=log.age)
            status.reconcile_time.FromDatetime(looked)
        return status


def _caller() -> str:
    return authz.current().spiffe_id


def _request(method: str, request_id: str, *content: int) -> Request:
    """Return what a request is known by; the tenant is where it is kept."""
    return Request(method, request_id, hashlib.sha256(fields(*content)).digest(), "")


def _holdings(state: state_pb2.TenantState) -> list[pb.KekHolding]:
    found: dict[str, pb.KekHolding] = {}
    for one in lifecycle.holdings(state):
        if not one.living:
            continue
        new = pb.KekHolding(backend=one.backend, oldest_version=one.oldest)
        known = found.setdefault(one.backend, new)
        known.oldest_version = min(known.oldest_version, one.oldest)
        known.newest_version = max(known.newest_version, one.newest)
        known.rows += one.living
    return [found[backend] for backend in sorted(found)]


def _other_backend(wanted: str, primary: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "KEK_BACKEND_NOT_PRIMARY",
        f"data keys are moved to the primary backend, which is {primary}; to move them to"
        f" {wanted}, set BYOKEEP_KEK_BACKEND={wanted} and keep {primary} in"
        " BYOKEEP_KEK_BACKENDS_READ",
        backend=primary,
    )
