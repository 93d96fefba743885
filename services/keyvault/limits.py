"""Lease caps, held here so that a rogue orchestrator can't lift them. Pure.

Windows are whole minutes and whole UTC days of the database's clock: counting is one
addition, whatever the cap. Around the turn of a window twice a cap may pass.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import grpc

from services.common.errors import ByokeepError

_MINUTE = 60
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Caps:
    """How many leases; 0 is no cap."""

    in_flight: int = 0
    per_minute: int = 0
    per_day: int = 0


@dataclass(slots=True)
class Meter:
    """What a tenant, or one key, has used. `minute` and `day` number the counted windows."""

    in_flight: int = 0
    minute: int = 0
    minute_count: int = 0
    day: int = 0
    day_count: int = 0

    def at(self, now: datetime.datetime) -> Meter:
        """Return it with counts of windows that are over at zero. A clock that goes back
        opens no window anew."""
        minute, day = windows(now)
        return Meter(
            self.in_flight,
            max(minute, self.minute),
            self.minute_count if self.minute >= minute else 0,
            max(day, self.day),
            self.day_count if self.day >= day else 0,
        )

    def add(self) -> None:
        """Count one lease."""
        self.in_flight += 1
        self.minute_count += 1
        self.day_count += 1


def windows(now: datetime.datetime) -> tuple[int, int]:
    """Return the numbers of the minute and the day that a time is in."""
    seconds = int(now.timestamp())
    return seconds // _MINUTE, seconds // _DAY


def check(scope: str, caps: Caps, meter: Meter, now: datetime.datetime) -> None:
    """Refuse one lease more where that is above a cap of `tenant` or `key`.

    Raises:
        ByokeepError: LEASE_CAP, with the cap's name and when to try again.
    """
    seconds = now.timestamp()
    if 0 < caps.in_flight <= meter.in_flight:
        raise _cap(scope, "in_flight", caps.in_flight, "live at once", 1.0)
    if 0 < caps.per_minute <= meter.minute_count:
        raise _cap(scope, "per_minute", caps.per_minute, "in a minute", _left(seconds, _MINUTE))
    if 0 < caps.per_day <= meter.day_count:
        raise _cap(scope, "per_day", caps.per_day, "in a UTC day", _left(seconds, _DAY))


def _left(seconds: float, window: int) -> float:
    return window - seconds % window


def _cap(scope: str, name: str, limit: int, sentence: str, retry_after: float) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "LEASE_CAP",
        f"{limit} leases of this {scope} {sentence} is the cap that keyvault holds;"
        " try again later, or ask an operator",
        retry_after_seconds=retry_after,
        cap=f"{scope}_{name}",
        limit=str(limit),
    )
