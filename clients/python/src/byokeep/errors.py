"""Reading byokeep's errors: a status code, a reason from one list, a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "byokeep.dev"
DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What a failed call said. `reason` is a name of ErrorReason, or empty."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def error_info(error: grpc.RpcError) -> ErrorInfo:
    """Return code, sentence, reason and metadata of a failed call."""
    code = error.code()
    message = error.details() or ""
    metadata: Any = error.trailing_metadata() or ()
    for name, value in metadata:
        if name != DETAILS_KEY:
            continue
        status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                return ErrorInfo(code, message, info.reason, dict(info.metadata))
    return ErrorInfo(code, message)
