"""LeaseService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from byokeep.keyvault.v1 import lease_pb2 as pb
from byokeep.keyvault.v1 import lease_pb2_grpc

from services.common import authz
from services.keyvault.lease import Leasing
from services.keyvault.release import Releases
from services.keyvault.revocations import Revocations


class LeaseService(lease_pb2_grpc.LeaseServiceServicer):
    """Serves runners."""

    def __init__(self, leasing: Leasing, releases: Releases, revocations: Revocations) -> None:
        """Serve leases and their revocations."""
        self._leasing = leasing
        self._releases = releases
        self._revocations = revocations

    async def LeaseKey(self, request: pb.LeaseKeyRequest, context: Any) -> pb.LeaseKeyResponse:
        """Redeem a grant."""
        return await self._leasing.lease(request, authz.current().spiffe_id)

    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: Any
    ) -> pb.ReleaseLeaseResponse:
        """End a lease."""
        await self._releases.release(
            request.lease_id, request.outcome, request.report, authz.current().spiffe_id
        )
        return pb.ReleaseLeaseResponse()

    async def WatchRevocations(
        self, request: pb.WatchRevocationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchRevocationsResponse]:
        """Stream revocations. `since` needs no special care: a resync says everything."""
        async for message in self._revocations.watch(authz.current().spiffe_id):
            yield message
