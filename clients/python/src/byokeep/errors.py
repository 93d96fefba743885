"""Reading byokeep's errors: a status code, a reason from one list, a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "byokeep.dev"
DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What a failed call said. `reason` is a name of ErrorReason, or empty; `retry_after_seconds`
    is None where nothing was said of when to try again."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None


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
