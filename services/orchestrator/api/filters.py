"""Which reviews a request is about."""

from __future__ import annotations

from datetime import UTC, datetime

from byokeep.orchestrator.v1 import review_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.orchestrator.policy import failures
from services.orchestrator.policy.refusals import unexpected
from services.orchestrator.policy.states import ReviewState
from services.orchestrator.store.reviews import ReviewFilter


def read(
    given: review_pb2.ReviewFilter,
    tenant: str,
    *,
    of_users: bool,
    states: frozenset[ReviewState] = frozenset(),
) -> ReviewFilter:
    """Return a filter for the store; `states`: of those alone, and not of all reviews by default.

    Raises:
        ByokeepError: INVALID_FIELD: a time that is none, none at all where `states` are given, or
            a state that no review of them has.
    """
    asked = {
        ReviewState(review_pb2.ReviewState.Name(state).removeprefix("REVIEW_STATE_"))
        for state in given.states
    }
    if states and not given.ListFields():
        raise unexpected("filter", "one field at least that says which reviews")
    if states and asked and not asked & states:
        raise unexpected("filter.states", f"some of {', '.join(sorted(states))}")
    return ReviewFilter(
        tenant,
        of_users,
        states=sorted(asked & states or states or asked),
        failures=sorted({failures.reason_of(reason) or "" for reason in given.failures}),
        repository=given.repository,
        pull_request=given.pull_request,
        owner=given.user,
        submitted_after=_time(given, "submitted_after"),
        submitted_before=_time(given, "submitted_before"),
    )


def _time(given: review_pb2.ReviewFilter, field: str) -> datetime | None:
    if not given.HasField(field):  # type: ignore[arg-type]
        return None
    stamp: Timestamp = getattr(given, field)
    try:
        return stamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        pass
    raise unexpected(f"filter.{field}", "a time between the years 1 and 9999")
