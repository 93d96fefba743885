"""The one exception that leaves a provider adapter, and its kinds.

A provider's own words never travel in it: error texts may echo a key whole.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from byokeep.orchestrator.v1 import key_pb2


class FailureKind(StrEnum):
    """What a failed call means for the key, the bill and whoever schedules another."""

    KEY_REJECTED = "key_rejected"
    KEY_RESTRICTED = "key_restricted"
    QUOTA_EXHAUSTED = "quota_exhausted"
    RATE_LIMITED = "rate_limited"
    PROVIDER_UNAVAILABLE = "provider_unavailable"
    REGION_REFUSED = "region_refused"
    CONTEXT_TOO_LONG = "context_too_long"
    BAD_REQUEST = "bad_request"
    MODEL_NOT_FOUND = "model_not_found"
    BAD_RESPONSE = "bad_response"
    TRUNCATED = "truncated"
    REFUSED = "refused"
    NETWORK_BEFORE_SEND = "network_before_send"
    AMBIGUOUS = "ambiguous"
    REDIRECTED = "redirected"


_SENTENCES: Final = {
    FailureKind.KEY_REJECTED: "The provider rejected the key.",
    FailureKind.KEY_RESTRICTED: "The key lacks a permission that this call needs.",
    FailureKind.QUOTA_EXHAUSTED: "The key's quota or credit with the provider is used up.",
    FailureKind.RATE_LIMITED: "The provider asks to slow down.",
    FailureKind.PROVIDER_UNAVAILABLE: "The provider could not serve the call.",
    FailureKind.REGION_REFUSED: (
        "The provider refuses the country, region or network that the runner calls from."
    ),
    FailureKind.CONTEXT_TOO_LONG: "The provider takes less at once than one call holds.",
    FailureKind.BAD_REQUEST: "The provider did not accept the request.",
    FailureKind.MODEL_NOT_FOUND: "The provider does not offer this model to this key.",
    FailureKind.BAD_RESPONSE: "The provider's answer was not usable.",
    FailureKind.TRUNCATED: "The model's answer was cut: it ran out of output tokens.",
    FailureKind.REFUSED: "The model declined to answer.",
    FailureKind.NETWORK_BEFORE_SEND: "The provider could not be reached; nothing was sent.",
    FailureKind.AMBIGUOUS: "The request was sent and its answer was lost.",
    FailureKind.REDIRECTED: "The provider answered with a redirect, which is never followed.",
}


class ProviderError(Exception):
    """A provider call failed.

    ``str()`` is a fixed sentence for each kind. ``retry_after_seconds`` is what the
    provider asked for, if it did; ``http_status`` is None when no answer came; ``cause`` is
    what was unreachable, if something was.
    """

    def __init__(
        self,
        kind: FailureKind,
        *,
        http_status: int | None = None,
        retry_after_seconds: float | None = None,
        cause: key_pb2.UnreachableCause.ValueType = key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED,
    ) -> None:
        """See the class."""
        super().__init__(_SENTENCES[kind])
        self.kind = kind
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
        self.cause = cause
