"""Who acts, as keyvault's audit is told."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.orchestrator.api.access import Rights
from services.orchestrator.policy.plans import parse
from services.orchestrator.server import BUILT_IN_PLANS
from services.orchestrator.store.tenants import TenantRow

PLANS = parse([("", BUILT_IN_PLANS.read_text())])
TENANT = TenantRow(
    "acme", "ACTIVE", "team", "", 0, 0, 0, 0, False, False, [], False, [], 0, datetime.now(UTC)
)


def actor(spiffe_id: str, user: str = "") -> str:
    return Rights(spiffe_id, TENANT, frozenset(), True, False, False, PLANS.of("team")).actor(user)


def test_actor_is_the_service_and_the_user_that_it_names() -> None:
    assert actor("spiffe://x/a") == "spiffe://x/a"
    assert actor("spiffe://x/a", "ann") == "spiffe://x/a#ann"
    assert actor("s" * 256) == "s" * 256


@pytest.mark.parametrize("user", ["", "u" * 128])
def test_long_actors_fit_and_stay_apart(user: str) -> None:
    """Was shown to fail with the whole cut at 256 characters."""
    one, other = (actor("spiffe://x/" + "s" * 400 + end, user) for end in ("1", "2"))
    assert len(one) == len(other) == 256
    assert one != other
    assert one.endswith(f"#{user}" if user else one[-32:])
    assert one.startswith("spiffe://x/sss")
