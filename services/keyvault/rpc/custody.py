"""CustodyService."""

from __future__ import annotations

import hashlib
from typing import Any

from byokeep.keyvault.v1 import custody_pb2 as pb
from byokeep.keyvault.v1 import custody_pb2_grpc, state_pb2
from byokeep.names import (
    key_name,
    last_of,
    provider_id,
    provider_value,
    tenant_of,
)

from services.common import authz
from services.keyvault import lifecycle
from services.keyvault.custody import Custody, Decide, Key, Origin, Request
from services.keyvault.intake import IntakeKeys
from services.keyvault.lifecycle import State
from services.keyvault.stage import Order, Staging

_OPERATIONS = {pb.INTAKE_OPERATION_ADD: "add", pb.INTAKE_OPERATION_ROTATE: "rotate"}
_DEFAULT_PAGE = 50


class CustodyService(custody_pb2_grpc.CustodyServiceServicer):
    """Serves the orchestrator."""

    def __init__(self, custody: Custody, staging: Staging, intake: IntakeKeys) -> None:
        """Serve a custody."""
        self._custody = custody
        self._staging = staging
        self._intake = intake

    async def GetIntakeKey(
        self, request: pb.GetIntakeKeyRequest, context: Any
    ) -> pb.GetIntakeKeyResponse:
        """Return the newest intake key, signed."""
        return pb.GetIntakeKeyResponse(statement=await self._intake.statement(request.suite))

    async def StageKey(self, request: pb.StageKeyRequest, context: Any) -> pb.StageKeyResponse:
        """Stage a sealed key."""
        order = Order(
            tenant_of(request.name),
            last_of(request.name),
            provider_id(request.provider),
            request.owner,
            request.display_name,
            _OPERATIONS[request.operation],
            request.request_id,
            request.sealed_key,
            request.etag,
        )
        key, version = await self._staging.stage(order, _origin(request))
        return pb.StageKeyResponse(key=key_message(order.tenant, key), version=version)

    async def PromoteKeyVersion(
        self, request: pb.PromoteKeyVersionRequest, context: Any
    ) -> pb.PromoteKeyVersionResponse:
        """Promote a version."""
        key = await self._change(
            request,
            lambda key, _: lifecycle.promote(
                key, request.version, destroy_previous=request.destroy_previous
            ),
        )
        return pb.PromoteKeyVersionResponse(key=key)

    async def DestroyKeyVersion(
        self, request: pb.DestroyKeyVersionRequest, context: Any
    ) -> pb.DestroyKeyVersionResponse:
        """Destroy a version."""
        key = await self._change(
            request, lambda key, _: lifecycle.destroy_version(key, request.version)
        )
        return pb.DestroyKeyVersionResponse(key=key)

    async def RollBackKey(
        self, request: pb.RollBackKeyRequest, context: Any
    ) -> pb.RollBackKeyResponse:
        """Roll a key back."""
        key = await self._change(request, lambda key, tenant: lifecycle.roll_back(key, tenant.now))
        return pb.RollBackKeyResponse(key=key)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        """Revoke a key."""
        return pb.RevokeKeyResponse(key=await self._end(request, State.REVOKED))

    async def DestroyKey(
        self, request: pb.DestroyKeyRequest, context: Any
    ) -> pb.DestroyKeyResponse:
        """Destroy a key."""
        return pb.DestroyKeyResponse(key=await self._end(request, State.DESTROYED))

    async def GetKey(self, request: pb.GetKeyRequest, context: Any) -> pb.GetKeyResponse:
        """Return a key's metadata."""
        tenant = tenant_of(request.name)
        key = await self._custody.get(tenant, last_of(request.name))
        return pb.GetKeyResponse(key=key_message(tenant, key))

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        """List keys."""
        size = request.page_size or _DEFAULT_PAGE
        tenant = tenant_of(request.parent)
        keys = await self._custody.page(
            tenant, request.page_token, size + 1, destroyed=request.show_destroyed
        )
        more = keys[size - 1].key_id if len(keys) > size else ""
        return pb.ListKeysResponse(
            keys=[key_message(tenant, key) for key in keys[:size]], next_page_token=more
        )

    async def _change(self, request: Any, decide: Decide) -> pb.ProviderKey:
        tenant, key_id = tenant_of(request.name), last_of(request.name)
        key = await self._custody.change(tenant, key_id, _origin(request), decide, _asked(request))
        return key_message(tenant, key)

    async def _end(self, request: Any, after: State) -> pb.ProviderKey:
        tenant, key_id = tenant_of(request.name), last_of(request.name)
        key = await self._custody.end(tenant, key_id, _origin(request), _asked(request), after)
        return key_message(tenant, key)


def key_message(tenant: str, key: Key) -> pb.ProviderKey:
    """Return a tenant's key as clients see it."""
    current = lifecycle.current(key)
    active = [one.version for one in key.versions if lifecycle.state_of(one) is State.ACTIVE]
    message = pb.ProviderKey(
        name=key_name(tenant, key.key_id),
        provider=provider_value(key.provider),
        owner=key.owner,
        display_name=key.display_name,
        state=current.state,
        hint=current.hint,
        active_version=active[0] if active else 0,
        versions=[_version_message(one) for one in key.versions],
        etag=lifecycle.etag(key),
    )
    message.create_time.seconds = key.create_time
    return message


def _version_message(version: state_pb2.VersionState) -> pb.KeyVersion:
    message = pb.KeyVersion(
        version=version.version,
        state=version.state,
        hint=version.hint,
        kek_backend=version.kek_backend,
        kek_version=version.kek_version,
    )
    message.create_time.seconds = version.create_time
    message.state_time.seconds = version.state_time
    return message


def _origin(request: Any) -> Origin:
    return Origin(authz.current().spiffe_id, request.actor)


def _asked(request: Any) -> Request:
    content = request.SerializeToString(deterministic=True)
    # A version's promotion or destruction says by its number what it is about.
    etag = getattr(request, "etag", "")
    method = request.DESCRIPTOR.name.removesuffix("Request")
    return Request(method, request.request_id, hashlib.sha256(content).digest(), etag)
