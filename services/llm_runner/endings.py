"""How attempts end, as the parent tells it: what the child said, or why it was killed."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from byokeep.keyvault.v1 import lease_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2


class Ending(enum.Enum):
    """Why the parent ended an attempt, or found it ended."""

    LOST = enum.auto()
    TIMEOUT = enum.auto()
    CANCELLED = enum.auto()
    KEY_REVOKED = enum.auto()
    KEYVAULT_LOST = enum.auto()
    ABANDONED = enum.auto()
    SHUTDOWN = enum.auto()


class _Telling(NamedTuple):
    reason: review_pb2.FailureReason.ValueType
    message: str
    lease: lease_pb2.LeaseOutcome.ValueType


_TELLINGS: Final = {
    Ending.LOST: _Telling(
        review_pb2.FAILURE_REASON_CHILD_LOST,
        "The child process died.",
        lease_pb2.LEASE_OUTCOME_CHILD_LOST,
    ),
    Ending.TIMEOUT: _Telling(
        review_pb2.FAILURE_REASON_TIMEOUT,
        "The attempt took longer than it may.",
        lease_pb2.LEASE_OUTCOME_FAILED,
    ),
    # Who cancels knows that it did; there is no reason of its own for it.
    Ending.CANCELLED: _Telling(
        review_pb2.FAILURE_REASON_CHILD_LOST,
        "The attempt was cancelled.",
        lease_pb2.LEASE_OUTCOME_CANCELLED,
    ),
    Ending.KEY_REVOKED: _Telling(
        review_pb2.FAILURE_REASON_KEY_REVOKED,
        "The key was revoked or destroyed while it was in use.",
        lease_pb2.LEASE_OUTCOME_CANCELLED,
    ),
    Ending.KEYVAULT_LOST: _Telling(
        review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE,
        "keyvault was out of reach, so that a revocation could not have been heard.",
        lease_pb2.LEASE_OUTCOME_CANCELLED,
    ),
    Ending.ABANDONED: _Telling(
        review_pb2.FAILURE_REASON_RUNNER_UNAVAILABLE,
        "The orchestrator did not come back for the attempt.",
        lease_pb2.LEASE_OUTCOME_CANCELLED,
    ),
    Ending.SHUTDOWN: _Telling(
        review_pb2.FAILURE_REASON_RUNNER_UNAVAILABLE,
        "The runner was shut down.",
        lease_pb2.LEASE_OUTCOME_CANCELLED,
    ),
}


def outcome(ending: Ending, *, call_in_flight: bool) -> runner_pb2.Outcome:
    """Return the outcome of an attempt whose child did not say how it ended.

    With a call in flight its answer is lost, so that the same call might be paid twice.
    """
    telling = _TELLINGS[ending]
    return runner_pb2.Outcome(
        failure=telling.reason,
        message=telling.message,
        ambiguous_call=call_in_flight,
    )


def lease_outcome(
    told: runner_pb2.Outcome | None, ending: Ending, verdict: key_pb2.ValidationVerdict.ValueType
) -> lease_pb2.LeaseOutcome.ValueType:
    """Return how the use of the lease ended: as the child told, else as the parent saw. The
    verdict is that of a validation."""
    if verdict == key_pb2.VALIDATION_VERDICT_INVALID:
        return lease_pb2.LEASE_OUTCOME_KEY_REJECTED
    if told is None:
        return _TELLINGS[ending].lease
    if told.failure == review_pb2.FAILURE_REASON_UNSPECIFIED:
        return lease_pb2.LEASE_OUTCOME_COMPLETED
    if told.failure == review_pb2.FAILURE_REASON_KEY_REJECTED:
        return lease_pb2.LEASE_OUTCOME_KEY_REJECTED
    return lease_pb2.LEASE_OUTCOME_FAILED
