"""What a failed provider call means for the attempt: one table."""

from __future__ import annotations

from typing import Final, NamedTuple

from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2

from services.llm_runner.providers import FailureKind, ProviderError


class _Meaning(NamedTuple):
    reason: review_pb2.FailureReason.ValueType
    retryable: bool
    # How often one chunk may be tried in this attempt.
    tries: int
    verdict: key_pb2.ValidationVerdict.ValueType


_UNREACHABLE: Final = key_pb2.VALIDATION_VERDICT_UNREACHABLE
_MEANINGS: Final = {
    FailureKind.KEY_REJECTED: _Meaning(
        review_pb2.FAILURE_REASON_KEY_REJECTED, False, 1, key_pb2.VALIDATION_VERDICT_INVALID
    ),
    FailureKind.KEY_RESTRICTED: _Meaning(
        review_pb2.FAILURE_REASON_KEY_RESTRICTED, False, 1, key_pb2.VALIDATION_VERDICT_RESTRICTED
    ),
    FailureKind.QUOTA_EXHAUSTED: _Meaning(
        review_pb2.FAILURE_REASON_QUOTA_EXHAUSTED,
        False,
        1,
        key_pb2.VALIDATION_VERDICT_QUOTA_EXHAUSTED,
    ),
    FailureKind.RATE_LIMITED: _Meaning(
        review_pb2.FAILURE_REASON_RATE_LIMITED, True, 5, _UNREACHABLE
    ),
    FailureKind.PROVIDER_UNAVAILABLE: _Meaning(
        review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE, True, 3, _UNREACHABLE
    ),
    FailureKind.BAD_REQUEST: _Meaning(
        review_pb2.FAILURE_REASON_BAD_REQUEST, False, 1, _UNREACHABLE
    ),
    FailureKind.MODEL_NOT_FOUND: _Meaning(
        review_pb2.FAILURE_REASON_MODEL_NOT_FOUND, False, 1, _UNREACHABLE
    ),
    FailureKind.BAD_RESPONSE: _Meaning(
        review_pb2.FAILURE_REASON_BAD_RESPONSE, False, 1, _UNREACHABLE
    ),
    FailureKind.REFUSED: _Meaning(review_pb2.FAILURE_REASON_REFUSED, False, 1, _UNREACHABLE),
    FailureKind.NETWORK_BEFORE_SEND: _Meaning(
        review_pb2.FAILURE_REASON_NETWORK, True, 3, _UNREACHABLE
    ),
    FailureKind.AMBIGUOUS: _Meaning(review_pb2.FAILURE_REASON_AMBIGUOUS, False, 1, _UNREACHABLE),
    FailureKind.REDIRECTED: _Meaning(
        review_pb2.FAILURE_REASON_BAD_RESPONSE, False, 1, _UNREACHABLE
    ),
}


def failed(
    reason: review_pb2.FailureReason.ValueType, message: str, *, retryable: bool = False
) -> runner_pb2.Outcome:
    """Return the outcome of an attempt that failed in the child."""
    return runner_pb2.Outcome(failure=reason, message=message, retryable=retryable)


def provider_failed(error: ProviderError) -> runner_pb2.Outcome:
    """Return the outcome of an attempt whose provider call failed for good."""
    meaning = _MEANINGS[error.kind]
    return runner_pb2.Outcome(
        failure=meaning.reason,
        message=str(error),
        retryable=meaning.retryable,
        retry_after_ms=round((error.retry_after_seconds or 0) * 1000),
        ambiguous_call=error.kind is FailureKind.AMBIGUOUS,
    )


def verdict(error: ProviderError) -> key_pb2.ValidationVerdict.ValueType:
    """Return what a failed model list says of the key."""
    return _MEANINGS[error.kind].verdict


def tries(error: ProviderError) -> int:
    """Return how often a call that fails like this is made in one attempt."""
    return _MEANINGS[error.kind].tries
