"""What the orchestrator alone counts (see services.common.metrics)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from prometheus_client import Counter, Gauge

from services.common.metrics import REGISTRY

#: Seconds between two looks at what waits.
LOOK_SECONDS: Final = 10.0
ATTEMPTS: Final = Counter(
    "byokeep_attempts",
    "Attempts that ended, by provider and FailureReason, or COMPLETED",
    ["kind", "provider", "outcome"],
    registry=REGISTRY,
)
_QUEUE_DEPTH: Final = Gauge(
    "byokeep_queue_depth",
    "Attempts of reviews that wait, by FailureReason; TURN: for nothing but a free place",
    ["reason"],
    registry=REGISTRY,
)
_QUEUE_AGE: Final = Gauge(
    "byokeep_queue_age_seconds",
    "How long the one has waited that has waited longest",
    ["reason"],
    registry=REGISTRY,
)


class Waiting(NamedTuple):
    """The attempts that wait for one reason, and for how long the first of them has."""

    reason: str
    attempts: int
    seconds: float


_shown: set[str] = {"TURN"}


def show_waiting(found: Iterable[Waiting]) -> None:
    """Show what waits; a reason that nothing waits for any more is shown as 0."""
    now = {one.reason: one for one in found}
    _shown.update(now)
    for reason in _shown:
        one = now.get(reason, Waiting(reason, 0, 0.0))
        _QUEUE_DEPTH.labels(reason).set(one.attempts)
        _QUEUE_AGE.labels(reason).set(one.seconds)
