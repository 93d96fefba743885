"""Calls to keyvault: its CustodyService and its ContentKeyService.

Its typed errors pass unchanged to our own caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc
from byokeep import ids, names
from byokeep.keyvault.v1 import content_pb2, content_pb2_grpc, custody_pb2, custody_pb2_grpc
from google.protobuf.message import Message

from services.common import deadline, observe
from services.common.errors import ByokeepError, from_rpc

T = TypeVar("T")
_SECONDS: Final = 10.0
_PAGE: Final = 500


class Keyvault:
    """What the orchestrator asks of keyvault."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Use a channel that presents our identity."""
        self._stub = custody_pb2_grpc.CustodyServiceStub(channel)
        self._content = content_pb2_grpc.ContentKeyServiceStub(channel)

    async def intake_key(
        self, request: custody_pb2.GetIntakeKeyRequest
    ) -> custody_pb2.GetIntakeKeyResponse:
        """Return the newest intake key's signed statement."""
        return await _told(self._stub.GetIntakeKey, request)

    async def stage(self, request: custody_pb2.StageKeyRequest) -> custody_pb2.StageKeyResponse:
        """Store a sealed key as a PENDING version."""
        return await _told(self._stub.StageKey, request)

    async def promote(
        self, name: str, version: int, actor: str, *, destroy_previous: bool
    ) -> custody_pb2.ProviderKey:
        """Make a version ACTIVE; repeating it changes nothing more."""
        request = custody_pb2.PromoteKeyVersionRequest(
            name=name,
            version=version,
            destroy_previous=destroy_previous,
            request_id=f"promote-{names.last_of(name)}-{version}",
            actor=actor,
        )
        return (await _told(self._stub.PromoteKeyVersion, request)).key

    async def destroy_version(self, name: str, version: int, actor: str) -> custody_pb2.ProviderKey:
        """Destroy a version that is not ACTIVE; repeating it changes nothing more."""
        request = custody_pb2.DestroyKeyVersionRequest(
            name=name,
            version=version,
            request_id=f"destroy-{names.last_of(name)}-{version}",
            actor=actor,
        )
        return (await _told(self._stub.DestroyKeyVersion, request)).key

    async def roll_back(self, request: custody_pb2.RollBackKeyRequest) -> custody_pb2.ProviderKey:
        """Make the version before ACTIVE again."""
        return (await _told(self._stub.RollBackKey, request)).key

    async def revoke(self, request: custody_pb2.RevokeKeyRequest) -> custody_pb2.ProviderKey:
        """Revoke a key."""
        return (await _told(self._stub.RevokeKey, request)).key

    async def destroy(self, request: custody_pb2.DestroyKeyRequest) -> custody_pb2.ProviderKey:
        """Destroy a key."""
        return (await _told(self._stub.DestroyKey, request)).key

    async def get(self, name: str) -> custody_pb2.ProviderKey:
        """Return a key's metadata."""
        request = custody_pb2.GetKeyRequest(name=name)
        return (await _told(self._stub.GetKey, request)).key

    async def page(self, request: custody_pb2.ListKeysRequest) -> custody_pb2.ListKeysResponse:
        """Return one page of a tenant's keys."""
        return await _told(self._stub.ListKeys, request)

    async def keys(self, tenant: str) -> list[custody_pb2.ProviderKey]:
        """Return all of a tenant's keys that are not destroyed, by id."""
        found: list[custody_pb2.ProviderKey] = []
        token = ""
        while True:
            page = await self.page(
                custody_pb2.ListKeysRequest(
                    parent=names.tenant_name(tenant), page_size=_PAGE, page_token=token
                )
            )
            found += page.keys
            token = page.next_page_token
            if not token:
                return found

    async def destroy_all(self, tenant: str, actor: str) -> int:
        """Destroy all of a deleted tenant's keys; return how many there were.

        Raises:
            ByokeepError: the first refusal, once all the others are destroyed.
        """
        keys = await self.keys(tenant)
        refused: list[ByokeepError] = []
        for key in keys:
            request = custody_pb2.DestroyKeyRequest(
                name=key.name, request_id=ids.new_id("req"), actor=actor
            )
            try:
                await self.destroy(request)
            except ByokeepError as error:
                refused.append(error)
        if refused:
            raise refused[0]
        return len(keys)

    async def content_key(self, tenant: str, epoch: str) -> content_pb2.GetContentKeyResponse:
        """Return a tenant's content key; an empty epoch is the current one."""
        request = content_pb2.GetContentKeyRequest(tenant=names.tenant_name(tenant), epoch=epoch)
        return await _told(self._content.GetContentKey, request)


async def _told(method: Callable[..., Awaitable[T]], request: Message) -> T:
    refused: ByokeepError
    try:
        return await method(request, timeout=deadline.left(_SECONDS), metadata=observe.outgoing())
    except grpc.RpcError as error:
        refused = from_rpc(error, "keyvault")
    raise refused
