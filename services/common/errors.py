"""The one typed error that crosses RPC.

Everything else that a handler raises becomes an opaque INTERNAL, so no text is
sent that nobody wrote for a caller.
"""

from __future__ import annotations

import grpc
from byokeep.common.v1 import error_reason_pb2
from byokeep.errors import DETAILS_KEY, DOMAIN, error_info
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

# gRPC's retry design (gRFC A6): a pushback that is negative says not to.
_NO_RETRY = ("grpc-retry-pushback-ms", "-1")


class ByokeepError(Exception):
    """A refusal or failure that a caller is told.

    `reason` is a name of ErrorReason without its prefix; `metadata` holds field
    names, ids and limits, never a value that a customer keeps secret.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        """Check that the reason is in the list: a typo is a defect, not a new reason."""
        super().__init__(message)
        error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.retry_after_seconds = retry_after_seconds
        #: Whether the caller's own gRPC may try again by itself.
        self.retried = True

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the rich status (google.rpc.Status) as gRPC carries it."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = any_pb2.Any()
        info.Pack(
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        )
        status.details.append(info)
        if self.retry_after_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_after_seconds * 1000))
            retry = any_pb2.Any()
            retry.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            status.details.append(retry)
        rich = (DETAILS_KEY, status.SerializeToString())
        return (rich,) if self.retried else (rich, _NO_RETRY)


def internal() -> ByokeepError:
    """Return the opaque error for whatever nobody foresaw."""
    return ByokeepError(
        grpc.StatusCode.INTERNAL, "INTERNAL", "internal error; the service's log has more"
    )


def from_rpc(error: grpc.RpcError, dependency: str) -> ByokeepError:
    """Turn the failure of a call to another byokeep service into what our own caller is told.

    A typed error passes unchanged; an untyped one says only which dependency failed.
    """
    info = error_info(error)
    if info.reason:
        known = ByokeepError(
            info.code, info.reason, info.message, retry_after_seconds=info.retry_after_seconds
        )
        known.metadata = info.metadata
        return known
    if info.unanswered:
        return ByokeepError(
            grpc.StatusCode.UNAVAILABLE,
            "DEPENDENCY_UNAVAILABLE",
            f"{dependency} does not answer; try again",
            dependency=dependency,
        )
    return internal()
