"""Plans: what each includes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc

from services.common.errors import ByokeepError


@dataclass(frozen=True, slots=True)
class Entitlements:
    """What a plan includes; `keys_per_provider` 0 is any number."""

    model_overrides: bool
    user_keys: bool
    keys_per_provider: int
    attempts_in_flight: int
    reviews_per_day: int


PLANS: Final[Mapping[str, Entitlements]] = {
    "STARTER": Entitlements(False, False, 1, 2, 200),
    "TEAM": Entitlements(True, True, 0, 16, 10_000),
    "ENTERPRISE": Entitlements(True, True, 0, 64, 100_000),
}


def plan_lacks(entitlement: str, sentence: str) -> ByokeepError:
    """Return the refusal of what a plan does not include."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION, "PLAN_LACKS", sentence, entitlement=entitlement
    )
