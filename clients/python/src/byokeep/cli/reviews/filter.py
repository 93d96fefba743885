"""Options that say which reviews."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from byokeep.cli.base.errors import CliError
from byokeep.orchestrator.v1 import review_pb2

_AGO = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class State(StrEnum):
    """States of a review."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


StateOption = Annotated[
    list[State] | None,
    typer.Option("--state", help="Only in this state; may be repeated.", show_default=False),
]
FailureOption = Annotated[
    list[str] | None,
    typer.Option("--failure", metavar="REASON", help="Only failed for this, such as rate-limited."),
]
RepoOption = Annotated[str, typer.Option(metavar="OWNER/NAME", help="Only of this repository.")]
PrOption = Annotated[int, typer.Option(min=0, max=2_147_483_647, help="Only of this pull request.")]
UserOption = Annotated[str, typer.Option(help="Only on this user's keys.")]
SinceOption = Annotated[
    str,
    typer.Option(metavar="TIME", help="Submitted then or later: 2h, 3d, 2026-11-29, or a time."),
]
BeforeOption = Annotated[
    str, typer.Option(metavar="TIME", help="Submitted before: 2h, 3d, 2026-11-29, or a time.")
]


@dataclass(frozen=True, slots=True)
class Given:
    """What was typed."""

    states: list[State]
    failures: list[str]
    repo: str
    pr: int
    user: str
    since: str
    before: str

    def message(self) -> review_pb2.ReviewFilter:
        """Return the filter. Raises CliError: a time or a reason that is none."""
        found = review_pb2.ReviewFilter(
            states=[
                review_pb2.ReviewState.Value(f"REVIEW_STATE_{state.upper()}")
                for state in self.states
            ],
            failures=[_failure(reason) for reason in self.failures],
            repository=self.repo,
            pull_request=self.pr,
            user=self.user,
        )
        for name, option, given in (
            ("submitted_after", "--since", self.since),
            ("submitted_before", "--before", self.before),
        ):
            if given:
                getattr(found, name).FromDatetime(_time(option, given))
        return found


def _failure(reason: str) -> review_pb2.FailureReason.ValueType:
    name = f"FAILURE_REASON_{reason.upper().replace('-', '_')}"
    known = set(review_pb2.FailureReason.keys()) - {"FAILURE_REASON_UNSPECIFIED"}
    if name not in known:
        names = ", ".join(
            sorted(one.removeprefix("FAILURE_REASON_").lower().replace("_", "-") for one in known)
        )
        raise CliError(f"--failure takes one of {names}")
    return review_pb2.FailureReason.Value(name)


def _time(option: str, given: str) -> datetime:
    """A moment: so long ago, or a date or time of ISO 8601, which is local where it has no zone."""
    if ago := _AGO.fullmatch(given):
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        return datetime.fromisoformat(given).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise CliError(f"{option} takes 30m, 2h, 3d, 1w, a date such as 2026-11-29, or a time")
