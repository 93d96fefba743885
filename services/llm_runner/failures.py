"""What a failed provider call means for the attempt and for the key: one table."""

from __future__ import annotations

from typing import Final, NamedTuple

from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2

from services.llm_runner.providers import FailureKind, ProviderError


class _Meaning(NamedTuple):
    reason: review_pb2.FailureReason.ValueType
    verdict: key_pb2.ValidationVerdict.ValueType


_K: Final = FailureKind
_UNREACHABLE: Final = key_pb2.VALIDATION_VERDICT_UNREACHABLE
# fmt: off
_MEANINGS: Final = {
    _K.KEY_REJECTED: _Meaning(
        review_pb2.FAILURE_REASON_KEY_REJECTED, key_pb2.VALIDATION_VERDICT_INVALID),
    _K.KEY_RESTRICTED: _Meaning(
        review_pb2.FAILURE_REASON_KEY_RESTRICTED, key_pb2.VALIDATION_VERDICT_RESTRICTED),
    _K.QUOTA_EXHAUSTED: _Meaning(
        review_pb2.FAILURE_REASON_QUOTA_EXHAUSTED,
        key_pb2.VALIDATION_VERDICT_QUOTA_EXHAUSTED),
    _K.RATE_LIMITED: _Meaning(review_pb2.FAILURE_REASON_RATE_LIMITED, _UNREACHABLE),
    _K.PROVIDER_UNAVAILABLE: _Meaning(
        review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE, _UNREACHABLE),
    _K.REGION_REFUSED: _Meaning(review_pb2.FAILURE_REASON_REGION_REFUSED, _UNREACHABLE),
    _K.CONTEXT_TOO_LONG: _Meaning(review_pb2.FAILURE_REASON_CONTEXT_TOO_LONG, _UNREACHABLE),
    _K.BAD_REQUEST: _Meaning(review_pb2.FAILURE_REASON_BAD_REQUEST, _UNREACHABLE),
    _K.MODEL_NOT_FOUND: _Meaning(review_pb2.FAILURE_REASON_MODEL_NOT_FOUND, _UNREACHABLE),
    _K.BAD_RESPONSE: _Meaning(review_pb2.FAILURE_REASON_BAD_RESPONSE, _UNREACHABLE),
    _K.TRUNCATED: _Meaning(review_pb2.FAILURE_REASON_BAD_RESPONSE, _UNREACHABLE),
    _K.REFUSED: _Meaning(review_pb2.FAILURE_REASON_REFUSED, _UNREACHABLE),
    _K.NETWORK_BEFORE_SEND: _Meaning(review_pb2.FAILURE_REASON_NETWORK, _UNREACHABLE),
    _K.AMBIGUOUS: _Meaning(review_pb2.FAILURE_REASON_AMBIGUOUS, _UNREACHABLE),
    _K.REDIRECTED: _Meaning(review_pb2.FAILURE_REASON_BAD_RESPONSE, _UNREACHABLE),
}
# fmt: on


def failed(reason: review_pb2.FailureReason.ValueType, message: str) -> runner_pb2.Outcome:
    """Return the outcome of an attempt that failed in the child, and would again."""
    return runner_pb2.Outcome(failure=reason, message=message)


def provider_failed(error: ProviderError) -> runner_pb2.Outcome:
    """Return the outcome of an attempt whose provider call failed."""
    meaning = _MEANINGS[error.kind]
    return runner_pb2.Outcome(
        failure=meaning.reason,
        message=str(error),
        retry_after_ms=round((error.retry_after_seconds or 0) * 1000),
        ambiguous_call=error.kind is FailureKind.AMBIGUOUS,
        unreachable_cause=error.cause,
    )


def verdict(error: ProviderError) -> key_pb2.ValidationVerdict.ValueType:
    """Return what a failed model list says of the key."""
    return _MEANINGS[error.kind].verdict
