"""The parent's calls to keyvault. What passes here is sealed to a child."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.errors import ErrorInfo, error_info
from byokeep.keyvault.v1 import lease_pb2
from byokeep.keyvault.v1.lease_pb2_grpc import LeaseServiceStub
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common import background, logs, observe

if TYPE_CHECKING:  # only in its stubs
    from byokeep.keyvault.v1.lease_pb2_grpc import LeaseServiceAsyncStub

log = logging.getLogger(__name__)

_LEASE_SECONDS: Final = 5.0
_RELEASE_SECONDS: Final = 2.0
_RELEASE_TRIES: Final = 10
_MAX_BACKOFF_SECONDS: Final = 5.0
_DEAD_STATES: Final = ("REVOKED", "DESTROYED")


class LeaseRefusedError(Exception):
    """keyvault gave no lease; `outcome` is what the orchestrator is told."""

    def __init__(self, outcome: runner_pb2.Outcome) -> None:
        """Keep the outcome."""
        super().__init__(outcome.message)
        self.outcome = outcome


class Leases:
    """Redeems grants and releases leases."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Use a channel to keyvault that its owner closes."""
        self._stub: LeaseServiceAsyncStub = LeaseServiceStub(channel)
        self._releasing: set[asyncio.Task[None]] = set()

    async def lease(
        self, grant: options_pb2.SignedEnvelope, accepted: runner_pb2.Accepted
    ) -> lease_pb2.LeaseKeyResponse:
        """Redeem a grant for a child's public key. Raises LeaseRefusedError."""
        refusal = None
        try:
            return await self._stub.LeaseKey(
                lease_pb2.LeaseKeyRequest(
                    grant=grant, recipient_public_key=accepted.public_key, suite=accepted.suite
                ),
                timeout=_LEASE_SECONDS,
                metadata=observe.outgoing(),
            )
        except grpc.aio.AioRpcError as error:
            refusal = _refusal(error_info(error))
        raise LeaseRefusedError(refusal)

    async def release(
        self,
        lease_id: str,
        outcome: lease_pb2.LeaseOutcome.ValueType,
        report: lease_pb2.PlaintextReport,
    ) -> None:
        """Release a lease; what keyvault does not take quickly goes on in the background."""
        request = lease_pb2.ReleaseLeaseRequest(lease_id=lease_id, outcome=outcome, report=report)
        task = background.start("release", self._release(request))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        await asyncio.wait({task}, timeout=_RELEASE_SECONDS)

    async def close(self, seconds: float) -> None:
        """Give releases that still go on some time; a lease that stays ends by itself."""
        if self._releasing:
            _, left = await asyncio.wait(self._releasing, timeout=seconds)
            for task in left:
                task.cancel()

    async def _release(self, request: lease_pb2.ReleaseLeaseRequest) -> None:
        info = None
        for attempt in range(_RELEASE_TRIES):
            try:
                await self._stub.ReleaseLease(
                    request, timeout=_RELEASE_SECONDS, metadata=observe.outgoing()
                )
                return
            except grpc.aio.AioRpcError as error:
                info = error_info(error)
            if not _is_away(info):
                break
            await asyncio.sleep(min(0.1 * 2**attempt, _MAX_BACKOFF_SECONDS))
        logs.event(
            log,
            "lease_not_released",
            level=logging.WARNING,
            lease=request.lease_id,
            code=info.code.name if info else "",
        )


# What keyvault's reasons are called here. DATABASE_ROLLED_BACK: it gives no lease at all until an
# operator has looked, which is as good as away.
_REFUSED: Final = {
    "LEASE_CAP": (
        review_pb2.FAILURE_REASON_LEASE_CAP,
        "A lease cap held in keyvault is reached.",
    ),
    "TENANT_NOT_ACTIVE": (
        review_pb2.FAILURE_REASON_TENANT_SUSPENDED,
        "An operator holds the tenant's leases back.",
    ),
    "KEY_NEEDS_REKEY": (
        review_pb2.FAILURE_REASON_KEY_NEEDS_REKEY,
        "The provider rejected this version of the key before.",
    ),
    # A clock is off, an orchestrator's new key is not mounted yet, or the grant lay too long: the
    # next may be taken.
    "GRANT_REFUSED": (
        review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE,
        "keyvault did not believe the grant.",
    ),
    "DATABASE_ROLLED_BACK": (
        review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE,
        "keyvault gives no lease until an operator has looked.",
    ),
}
_AWAY: Final = (
    review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE,
    "keyvault, or its backend of key-encryption keys, does not answer.",
)
_DEAD: Final = (review_pb2.FAILURE_REASON_KEY_REVOKED, "The key was revoked or destroyed.")
_OTHER: Final = (review_pb2.FAILURE_REASON_LEASE_REFUSED, "keyvault refused the lease.")


def _is_away(info: ErrorInfo) -> bool:
    """Whether keyvault may answer the same call later."""
    busy = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return info.unanswered or info.code in busy


def _refusal(info: ErrorInfo) -> runner_pb2.Outcome:
    if info.reason in _REFUSED:
        failure, message = _REFUSED[info.reason]
    elif _is_away(info):
        failure, message = _AWAY
    else:
        failure, message = _DEAD if info.metadata.get("state") in _DEAD_STATES else _OTHER
    return runner_pb2.Outcome(
        failure=failure,
        message=message,
        retry_after_ms=round((info.retry_after_seconds or 0) * 1000),
    )
