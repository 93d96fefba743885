"""ContentKeyService."""

from __future__ import annotations

from typing import Any

from byokeep.keyvault.v1 import content_pb2 as pb
from byokeep.keyvault.v1 import content_pb2_grpc
from byokeep.names import tenant_of

from services.keyvault.content import ContentKeys


class ContentKeyService(content_pb2_grpc.ContentKeyServiceServicer):
    """Serves the orchestrator."""

    def __init__(self, keys: ContentKeys) -> None:
        """Serve content keys."""
        self._keys = keys

    async def GetContentKey(
        self, request: pb.GetContentKeyRequest, context: Any
    ) -> pb.GetContentKeyResponse:
        """Return a tenant's content key of an epoch."""
        epoch, key = await self._keys.get(tenant_of(request.tenant), request.epoch)
        return pb.GetContentKeyResponse(epoch=epoch, key=key)
