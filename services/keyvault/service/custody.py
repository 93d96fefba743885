"""CustodyService."""

from __future__ import annotations

import hashlib
from typing import Any

from byokeep.keyvault.v1 import custody_pb2 as pb
from byokeep.keyvault.v1 import custody_pb2_grpc
from byokeep.names import (
    key_name,
    last_of,
    provider_id,
    tenant_of,
)

from services.common import authz
from services.keyvault import domain
from services.keyvault.custody import Custody, Decide, Origin, Request
from services.keyvault.domain import Key, Version
from services.keyvault.intake import IntakeKeys
from services.keyvault.staging import Order, Staging

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
        return pb.StageKeyResponse(key=key_message(key), version=version)

    async def PromoteKeyVersion(
        self, request: pb.PromoteKeyVersionRequest, context: Any
    ) -> pb.PromoteKeyVersionResponse:
        """Promote a version."""
        key = await self._change(
            request,
            lambda key, _: domain.promote(
                key, request.version, destroy_previous=request.destroy_previous
            ),
        )
        return pb.PromoteKeyVersionResponse(key=key)

    async def DestroyKeyVersion(
        self, request: pb.DestroyKeyVersionRequest, context: Any
    ) -> pb.DestroyKeyVersionResponse:
        """Destroy a version."""
        key = await self._custody.destroy_version(
            tenant_of(request.name),
            last_of(request.name),
            request.version,
            _origin(request),
            _asked(request),
        )
        return pb.DestroyKeyVersionResponse(key=key_message(key))

    async def RollBackKey(
        self, request: pb.RollBackKeyRequest, context: Any
    ) -> pb.RollBackKeyResponse:
        """Roll a key back."""
        key = await self._change(request, lambda key, head: domain.roll_back(key, head.now))
        return pb.RollBackKeyResponse(key=key)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        """Revoke a key."""
        key = await self._custody.revoke(
            tenant_of(request.name), last_of(request.name), _origin(request), _asked(request)
        )
        return pb.RevokeKeyResponse(key=key_message(key))

    async def DestroyKey(
        self, request: pb.DestroyKeyRequest, context: Any
    ) -> pb.DestroyKeyResponse:
        """Destroy a key."""
        key = await self._custody.destroy(
            tenant_of(request.name), last_of(request.name), _origin(request), _asked(request)
        )
        return pb.DestroyKeyResponse(key=key_message(key))

    async def GetKey(self, request: pb.GetKeyRequest, context: Any) -> pb.GetKeyResponse:
        """Return a key's metadata."""
        key = await self._custody.get(tenant_of(request.name), last_of(request.name))
        return pb.GetKeyResponse(key=key_message(key))

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        """List keys."""
        size = request.page_size or _DEFAULT_PAGE
        keys = await self._custody.page(
            tenant_of(request.parent),
            request.page_token,
            size + 1,
            destroyed=request.show_destroyed,
        )
        more = keys[size - 1].key_id if len(keys) > size else ""
        return pb.ListKeysResponse(
            keys=[key_message(key) for key in keys[:size]], next_page_token=more
        )

    async def _change(self, request: Any, decide: Decide) -> pb.ProviderKey:
        key = await self._custody.change(
            tenant_of(request.name),
            last_of(request.name),
            _origin(request),
            decide,
            _asked(request),
        )
        return key_message(key)


def key_message(key: Key) -> pb.ProviderKey:
    """Return a key as clients see it. A row that was forged has a message too, or it would keep
    all others from being listed."""
    current = key.current()
    active = [one.version for one in key.versions if one.state is domain.State.ACTIVE]
    message = pb.ProviderKey(
        name=key_name(key.tenant, key.key_id),
        provider=domain.provider_of(key.provider),
        owner=key.owner,
        display_name=key.display_name,
        state=pb.KeyVersionState.ValueType(current.state),
        hint=current.hint,
        active_version=max(active[0], 0) if active else 0,
        versions=[_version_message(one) for one in key.versions],
        etag=key.etag(),
    )
    message.create_time.FromDatetime(key.create_time)
    return message


def _version_message(version: Version) -> pb.KeyVersion:
    message = pb.KeyVersion(
        version=max(version.version, 0),
        state=pb.KeyVersionState.ValueType(version.state),
        hint=version.hint,
        kek_backend=version.kek_backend,
        kek_version=max(version.kek_version, 0),
    )
    message.create_time.FromDatetime(version.create_time)
    message.state_time.FromDatetime(version.state_time)
    return message


def _origin(request: Any) -> Origin:
    return Origin(authz.current().spiffe_id, request.actor)


def _asked(request: Any) -> Request:
    content = request.SerializeToString(deterministic=True)
    # A version's promotion or destruction says by its number what it is about.
    etag = getattr(request, "etag", "")
    method = request.DESCRIPTOR.name.removesuffix("Request")
    return Request(method, request.request_id, hashlib.sha256(content).digest(), etag)
