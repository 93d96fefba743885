"""`services.orchestrator.policy.plans`: what a plan includes, as data."""

from __future__ import annotations

import grpc
import pytest

from services.common.errors import ByokeepError
from services.orchestrator.policy.plans import FEATURES, parse
from services.orchestrator.server import BUILT_IN_PLANS

BUILT_IN = ("plans.toml", BUILT_IN_PLANS.read_text())


def test_the_built_in_plans() -> None:
    plans = parse([BUILT_IN])
    assert plans.chosen("") == "team"
    assert plans.of("starter").keys_per_provider == 1
    assert plans.of("team").features == plans.of("enterprise").features == frozenset(FEATURES)
    assert plans.places() == ({"starter": 2, "team": 16, "enterprise": 64}, 16)


def test_an_operators_file_is_laid_over_field_by_field() -> None:
    own = """
        default = "pro"
        [plans.starter]
        reviews_per_day = 50
        [plans.pro]
        attempts_in_flight = 8
        reviews_per_day = 1000
        reviews_waiting = 100
        keys_per_provider = 3
        features = ["model-overrides"]
    """
    plans = parse([BUILT_IN, ("own.toml", own)])
    before = parse([BUILT_IN])
    assert plans.of("starter").reviews_per_day == 50
    assert plans.of("starter").attempts_in_flight == before.of("starter").attempts_in_flight
    assert plans.of("team") == before.of("team")
    assert plans.chosen("") == "pro"
    # One that is there no more: nobody's reviews stop.
    assert "gold" not in plans
    assert plans.of("gold") == plans.of("pro")


def test_an_unknown_plan_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ByokeepError, match="must be one of starter, team, enterprise") as refused:
        parse([BUILT_IN]).chosen("gold")
    assert (refused.value.reason, refused.value.metadata["field"]) == ("INVALID_FIELD", "plan")


def test_what_a_plan_lacks_is_named_with_the_plan() -> None:
    starter = parse([BUILT_IN]).of("starter")
    for feature in FEATURES:
        with pytest.raises(ByokeepError, match=f"starter, has no {FEATURES[feature]}") as refused:
            starter.require(feature)
        assert refused.value.code == grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.metadata == {"feature": feature, "plan": "starter"}
    starter.require_room(0)
    with pytest.raises(ByokeepError, match="one key per provider") as refused:
        starter.require_room(1)
    assert refused.value.metadata["feature"] == "keys-per-provider"
    parse([BUILT_IN]).of("team").require_room(10_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "own.toml: "),
        ("[starter]\n", "own.toml: 'default' and tables"),
        ("plans = 1\n", "own.toml: 'default' and tables"),
        ("default = 'gold'\n", "default: one of starter, team, enterprise"),
        ("default = []\n", "default: one of"),
        ("[plans.Gold]\n", "own.toml: a plan's name"),
        ("[plans.gold]\n", "plans.gold.attempts_in_flight: 1 to 10000"),
        ("[plans]\nstarter = 1\n", r"\[plans.starter\] has attempts_in_flight, features"),
        ("[plans.starter]\nplaces = 2\n", r"\[plans.starter\] has attempts_in_flight, features"),
        ("[plans.starter]\nattempts_in_flight = 0\n", "starter.attempts_in_flight: 1 to"),
        ("[plans.starter]\nreviews_per_day = true\n", "starter.reviews_per_day: 1 to"),
        ("[plans.starter]\nfeatures = 'user-keys'\n", "starter.features: a list of"),
        ("[plans.starter]\nfeatures = ['x']\n", "features: a list of model-overrides, user-keys"),
        ("[plans.starter]\nfeatures = [[]]\n", "features: a list of"),
    ],
)
def test_a_bad_file_is_refused_by_field(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([BUILT_IN, ("own.toml", text)])
