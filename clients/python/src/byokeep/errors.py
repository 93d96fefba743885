"""byokeep's errors as a client meets them: a status code, a reason from one list, a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from byokeep import Error

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.key_pb2 import Key
    from byokeep.orchestrator.v1.review_pb2 import Review

DOMAIN = "byokeep.dev"
DETAILS_KEY = "grpc-status-details-bin"

#: Reason of a refusal that says nothing of the call, but that it came with too many others.
OVERLOADED: Final = "OVERLOADED"
#: Codes of a call that no service answered, where no reason came with them: none was there, time
#: was over, or one that ended cut what came in its last moment.
UNANSWERED: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
# With a reason they are a service's own defect; without, the connection broke: grpc.aio says so to
# whoever was writing, and so does what stands between.
_BROKEN: Final = (*UNANSWERED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

# Reason and sentence of a status that bears none of byokeep's.
_BARE: Final[Mapping[grpc.StatusCode, tuple[str, str]]] = {
    grpc.StatusCode.UNAVAILABLE: ("SERVICE_UNREACHABLE", "the service could not be reached"),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("NO_ANSWER", "the service did not answer in time"),
}
_UNEXPLAINED: Final = ("UNEXPLAINED", "the call failed, and the answer does not say why")


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What a failed call said. `reason` is a name of ErrorReason, or empty; `retry_after_seconds`
    is None where nothing was said of when to try again."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None

    @property
    def unanswered(self) -> bool:
        """Whether no service answered, so that none refused: each refusal bears a reason."""
        return not self.reason and self.code in _BROKEN


class CallError(Error, grpc.RpcError):
    """A call that failed: whatever went wrong, with a status code and a reason.

    `reason` is a name of ErrorReason (protos/byokeep/common/v1/error_reason.proto) without its
    prefix, never empty; `message` a sentence; `metadata` ids and limits;
    `retry_after_seconds` when to try again, None where nothing was said of it.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        """Read a failed call of gRPC's, sync or asyncio."""
        info = error_info(error)
        reason, message = info.reason, info.message
        if not reason:
            reason, sentence = _BARE.get(info.code, _UNEXPLAINED)
            message = f"{sentence}: {info.message}" if info.message else sentence
        super().__init__(f"{message} ({info.code.name}, {reason})")
        self.reason = reason
        self.message = message
        self.metadata = info.metadata
        self.retry_after_seconds = info.retry_after_seconds
        self._code = info.code
        self._details = info.message
        self._trailing = error.trailing_metadata()

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._code

    def details(self) -> str:
        """Return the text that travelled with the status."""
        return self._details

    def trailing_metadata(self) -> Any:
        """Return what `error_info` reads."""
        return self._trailing


class WatchTimeoutError(Error, TimeoutError):
    """The time to watch was over first. `latest` is what was seen last, None for nothing."""

    def __init__(self, seconds: float, latest: Any) -> None:
        """Say how long it took."""
        super().__init__(f"what was watched did not end within {seconds:g} s")
        self.latest = latest


class KeyNotUsableError(Error):
    """A key was stored, and no review can use it yet, or ever.

    `reason` is KEY_REJECTED (its provider refuses it; it is destroyed) or KEY_UNVALIDATED (the
    provider could not be asked yet: it stays PENDING and is asked again for 24 hours).
    """

    def __init__(self, reason: str, message: str, key: Key) -> None:
        """Keep the key as it was last seen."""
        super().__init__(f"{message} ({reason})")
        self.reason = reason
        self.message = message
        self.key = key


class ReviewFailedError(Error):
    """A review ended without being completed. `reason` is a name of FailureReason, or CANCELLED."""

    def __init__(self, reason: str, message: str, review: Review) -> None:
        """Keep the review as it ended."""
        super().__init__(f"{message} ({reason})")
        self.reason = reason
        self.message = message
        self.review = review


def error_info(error: grpc.RpcError) -> ErrorInfo:
    """Return code, sentence, reason, metadata and wait of a failed call."""
    said = ErrorInfo(error.code(), error.details() or "")
    metadata: Any = error.trailing_metadata() or ()
    for name, value in metadata:
        if name != DETAILS_KEY:
            continue
        status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                said = replace(said, reason=info.reason, metadata=dict(info.metadata))
            elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
                said = replace(said, retry_after_seconds=retry.retry_delay.ToMilliseconds() / 1000)
    return said
