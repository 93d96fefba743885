"""Lease caps, held here so that a rogue orchestrator can't lift them, and grants' single use. Pure.

Windows are whole minutes and whole UTC days of this process's clock: counting is one addition,
whatever the cap. Around the turn of a window twice a cap may pass. What was counted stands under
the tenant's MAC, so that SQL can't reset it.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.keyvault.v1 import grant_pb2, state_pb2

from services.common.errors import ByokeepError

_MINUTE: Final = 60
_DAY: Final = 86_400
_DIGEST: Final = 16
_ENTRY: Final = _DIGEST + 4
_MOST_GRANTS: Final = 1_024


@dataclass(frozen=True, slots=True)
class Caps:
    """How many leases; 0 is no cap."""

    in_flight: int = 0
    per_minute: int = 0
    per_day: int = 0


def count(meter: state_pb2.Meter, now: datetime.datetime) -> None:
    """Count one lease. A clock that goes back opens no window anew."""
    roll(meter, now)
    meter.minute_count += 1
    meter.day_count += 1


def roll(meter: state_pb2.Meter, now: datetime.datetime) -> None:
    """Set counts of windows that are over to zero."""
    seconds = int(now.timestamp())
    if seconds // _MINUTE > meter.minute:
        meter.minute, meter.minute_count = seconds // _MINUTE, 0
    if seconds // _DAY > meter.day:
        meter.day, meter.day_count = seconds // _DAY, 0


def check(
    scope: str, caps: Caps, live: int, meter: state_pb2.Meter, now: datetime.datetime
) -> None:
    """Refuse one lease more where that is above a cap of `tenant` or `key`, of which so many live;
    the meter's windows are those of now.

    Raises:
        ByokeepError: LEASE_CAP, with the cap's name and when to try again.
    """
    seconds = now.timestamp()
    if 0 < caps.in_flight <= live:
        raise _cap(scope, "in_flight", caps.in_flight, "live at once", 1.0)
    if 0 < caps.per_minute <= meter.minute_count:
        raise _cap(scope, "per_minute", caps.per_minute, "in a minute", _left(seconds, _MINUTE))
    if 0 < caps.per_day <= meter.day_count:
        raise _cap(scope, "per_day", caps.per_day, "in a UTC day", _left(seconds, _DAY))


def used(usage: state_pb2.TenantUsage, grant: grant_pb2.Grant) -> bool:
    """Say whether a grant was redeemed, or can't be told from one that was."""
    if grant.expire_time.seconds <= usage.grants_floor:
        return True
    digest = grant_digest(grant)
    at = usage.grants.find(digest)
    while at % _ENTRY and at >= 0:
        at = usage.grants.find(digest, at + 1)
    return at >= 0


def redeem(
    usage: state_pb2.TenantUsage, grant: grant_pb2.Grant, now: datetime.datetime, skew_seconds: int
) -> None:
    """Note that a grant is redeemed. Those that are over are forgotten, and those that end first
    where there are too many: each that ends no later than one of them is refused from then on,
    whatever some clock says."""
    grants, ends = usage.grants, grant.expire_time.seconds
    at = len(grants)
    while at and _end(grants, at - _ENTRY) > ends:
        at -= _ENTRY
    grants = grants[:at] + grant_digest(grant) + ends.to_bytes(4, "big") + grants[at:]
    over, first = int(now.timestamp()) - 2 * skew_seconds, 0
    while first < len(grants) and (
        _end(grants, first) <= over or len(grants) - first > _MOST_GRANTS * _ENTRY
    ):
        usage.grants_floor = max(usage.grants_floor, _end(grants, first))
        first += _ENTRY
    usage.grants = grants[first:]


def grant_digest(grant: grant_pb2.Grant) -> bytes:
    """Return what a redeemed grant is known by."""
    return hashlib.sha256(grant.grant_id.encode()).digest()[:_DIGEST]


def _end(grants: bytes, at: int) -> int:
    return int.from_bytes(grants[at + _DIGEST : at + _ENTRY], "big")


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
