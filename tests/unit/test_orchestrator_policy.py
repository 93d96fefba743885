"""Rules of the orchestrator that need neither socket nor database."""

from __future__ import annotations

import time

import pytest
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2, settings_pb2, tenant_pb2

from services.common import models
from services.common.config import ConfigError, load
from services.common.errors import ByokeepError
from services.common.models import MAX_LISTED, ModelRef
from services.orchestrator.api import paging
from services.orchestrator.api.access import tenant_of
from services.orchestrator.config import Settings
from services.orchestrator.custody.grants import GrantSigner
from services.orchestrator.policy import bounds
from services.orchestrator.policy.keys import (
    OPERATOR,
    Keys,
    RepositoryKey,
    keys_for,
    of_custody,
    validation_delay,
)
from services.orchestrator.policy.models import (
    Choice,
    KeyModels,
    Source,
    Use,
    Uses,
    choose_model,
    fallbacks,
    not_usable,
)
from services.orchestrator.policy.overrides import Override, override_of, overrides_for

CATALOG = models.load(None)
ACTIVE = custody_pb2.KEY_VERSION_STATE_ACTIVE


GEMINI = options_pb2.PROVIDER_GEMINI


def team(*keys: custody_pb2.ProviderKey) -> Keys:
    """The keys of a review that no user submits."""
    return keys_for(keys, user="", repository="acme/shop")


def key(
    number: int, provider=options_pb2.PROVIDER_OPENAI, state=ACTIVE, owner="", display_name=""
) -> custody_pb2.ProviderKey:
    return custody_pb2.ProviderKey(
        owner=owner,
        display_name=display_name,
        name=f"tenants/acme/providerKeys/key_{number:026}",
        provider=provider,
        state=state,
        active_version=1 if state == ACTIVE else 0,
    )


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        (("openai/a", "openai/b", "openai/c"), Choice(ModelRef("openai", "a"), Source.REVIEW)),
        (("", "openai/b", "openai/c"), Choice(ModelRef("openai", "b"), Source.OVERRIDE)),
        (("", "", "openai/c"), Choice(ModelRef("openai", "c"), Source.DEFAULT)),
        (("", "", ""), Choice(ModelRef("openai", "gpt-6.1-terra"), Source.PROVIDER)),
    ],
)
def test_the_nearest_choice_wins(candidates, chosen) -> None:
    named = dict(zip(Source, candidates, strict=False))
    assert choose_model(named, team(key(1)), CATALOG) == chosen


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([], "NO_ACTIVE_KEY"),
        ([key(1), key(2, options_pb2.PROVIDER_GEMINI)], "NO_MODEL"),
        ([key(1, state=custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY)], "KEY_NEEDS_REKEY"),
        ([key(1, state=custody_pb2.KEY_VERSION_STATE_PENDING)], "NO_ACTIVE_KEY"),
    ],
)
def test_nothing_to_choose_from(keys, reason) -> None:
    with pytest.raises(ByokeepError) as refused:
        choose_model({}, team(*keys), CATALOG)
    assert refused.value.reason == reason


def test_a_key_that_is_pending_and_none_at_all_are_two_sentences() -> None:
    """Shown to fail without the look at the state: whoever added a key is told to add one."""
    waiting = key(2, state=custody_pb2.KEY_VERSION_STATE_PENDING)
    revoked = key(1, state=custody_pb2.KEY_VERSION_STATE_REVOKED)
    told = {}
    for name, keys in {"none": [], "ended": [revoked], "pending": [revoked, waiting]}.items():
        with pytest.raises(ByokeepError) as refused:
            team(*keys).choose("openai")
        told[name] = refused.value
    assert {error.reason for error in told.values()} == {"NO_ACTIVE_KEY"}
    assert told["none"].message == told["ended"].message
    assert told["none"].message == "no active openai key: add one"
    assert "is PENDING" in told["pending"].message
    assert told["pending"].metadata["state"] == "PENDING"
    assert told["pending"].metadata["key"] == waiting.name.rsplit("/", 1)[1]


def test_a_user_without_a_key_is_told_to_add_one_of_that_user() -> None:
    """Another one of the tenant's would change nothing."""
    for choose in (
        lambda: choose_model({}, keys_for([], user="ann", repository="a/b"), CATALOG),
        lambda: keys_for([], user="ann", repository="a/b").choose("openai"),
    ):
        with pytest.raises(ByokeepError, match=r"of user ann.*: add one") as refused:
            choose()
        assert refused.value.metadata["user"] == "ann"


def test_oldest_usable_key_of_the_provider() -> None:
    keys = [
        key(3),
        key(2),
        key(1, state=custody_pb2.KEY_VERSION_STATE_REVOKED),
        key(0, options_pb2.PROVIDER_GEMINI),
    ]
    assert team(*keys).choose("openai") == key(2)


def test_the_order_says_whose_key_it_is_and_no_other_stands_in() -> None:
    """Shown to fail where a source whose key is not usable is passed over."""
    own, repo, third = key(3, owner="ann"), key(2, display_name="ci"), key(1)
    of_repositories = [
        RepositoryKey("acme/*", "openai", "key_none"),
        RepositoryKey("acme/shop", "openai", last_of(repo.name)),
    ]

    def chosen(user: str, *order: str, repository: str = "acme/shop", keys=(own, repo, third)):
        found = keys_for(
            keys, user=user, repository=repository, order=order, of_repositories=of_repositories
        )
        return found.choose("openai")

    everything = ("USER", "REPOSITORY", "TEAM")
    # Without an order: as it was before there was one.
    assert chosen("ann") == own
    assert chosen("") == repo
    assert chosen("", repository="other/web") == third
    with pytest.raises(ByokeepError, match="of user bob"):
        chosen("bob")
    # With one: the first that has any.
    assert chosen("ann", *everything) == own
    assert chosen("bob", *everything) == repo
    assert chosen("bob", *everything, repository="other/web") == third
    assert chosen("ann", "TEAM") == third
    assert chosen("ann", "REPOSITORY", "USER") == repo
    with pytest.raises(ByokeepError, match="no active openai key"):
        chosen("bob", "USER")
    # What is broken is not passed over, nor what was destroyed.
    broken = key(3, owner="ann", state=custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY)
    with pytest.raises(ByokeepError, match=r"rejected key_0*3: add a new version"):
        chosen("ann", *everything, keys=(broken, repo, third))
    with pytest.raises(ByokeepError, match=r"key_none is DESTROYED.*give the repository another"):
        chosen("", repository="acme/web")


def test_a_key_is_named_among_those_that_the_review_may_run_on() -> None:
    main, gemini = key(1, display_name="main"), key(2, GEMINI, display_name="g")
    revoked = key(3, display_name="old", state=custody_pb2.KEY_VERSION_STATE_REVOKED)
    keys = team(main, gemini, revoked, key(4, owner="ann", display_name="anns"))
    assert keys.called("main").choose("openai") == main
    assert keys.called(last_of(gemini.name)).choose("gemini") == gemini
    with pytest.raises(ByokeepError, match=r"may run on g \(gemini\), main \(openai\)") as refused:
        keys.called("anns")
    assert refused.value.metadata == {"resource": "providerKey", "field": "input.key"}
    with pytest.raises(ByokeepError, match="a key of the model's provider, openai"):
        keys.called("g").choose("openai")
    with pytest.raises(ByokeepError, match="REVOKED, for good; name another"):
        keys.called("old").choose("openai")
    # Settings' models of another provider say nothing of it.
    settings = {Source.OVERRIDE: "openai/a", Source.DEFAULT: "gemini/b"}
    assert choose_model(settings, keys.called("g"), CATALOG).model == ModelRef("gemini", "b")
    assert choose_model({}, keys.called("g"), CATALOG).source is Source.PROVIDER
    own = {Source.REVIEW: "openai/a"}
    assert choose_model(own, keys.called("g"), CATALOG).model == ModelRef("openai", "a")


@pytest.mark.parametrize(
    ("repository", "model"),
    [("acme/shop", "m2"), ("acme/web", "m1"), ("other/web", ""), ("acme/shop-x", "m1")],
)
def test_longest_pattern_wins(repository, model) -> None:
    overrides = [Override("acme/*", "", "m1"), Override("acme/shop", "", "m2")]
    assert override_of(overrides_for(repository, overrides), ()) == model


@pytest.mark.parametrize(
    ("repository", "paths", "model"),
    [
        ("acme/shop", {"README.md"}, "shop"),
        ("acme/shop", {"README.md", "pay/api/charge.py"}, "shop pay api"),
        ("acme/shop", {"pay/charge.py"}, "shop pay"),
        # The repository decides first, and one without a path ends what counts.
        ("acme/shop", {"deep/README.md"}, "shop"),
        ("acme/web", {"pay/charge.py"}, "web"),
        ("other/web", {"docs/a.md"}, "docs"),
        ("other/web", {"a.py"}, ""),
    ],
)
def test_the_longest_repository_wins_then_the_longest_path(repository, paths, model) -> None:
    """Shown to fail where paths are held against each other first."""
    overrides = [
        Override("*", "docs/*", "docs"),
        Override("*", "very/long/paths/in/a/repository/*", "long"),
        Override("acme/*", "", "web"),
        Override("acme/*", "deep/README.md", "deep"),
        Override("acme/shop", "", "shop"),
        Override("acme/shop", "pay/*", "shop pay"),
        Override("acme/shop", "pay/api/*", "shop pay api"),
    ]
    assert override_of(overrides_for(repository, overrides), paths) == model


TERRA = ModelRef("openai", "gpt-6.1-terra")


@pytest.mark.parametrize(
    ("keys", "use"),
    [
        ([], Use.NO_KEY),
        ([KeyModels("k", "gemini", ["gpt-6.1-terra"])], Use.NO_KEY),
        ([KeyModels("k", "openai")], Use.NOT_KNOWN),
        ([KeyModels("k", "openai", ["gpt-6-luna"])], Use.LACKING),
        ([KeyModels("k", "openai", ["m"] * (MAX_LISTED + 1))], Use.NOT_KNOWN),
        ([KeyModels("k", "openai", ["gpt-6.1-terra"])], Use.USABLE),
        ([KeyModels("k", "openai", ["gpt-6.1-terra-2026-10-26"])], Use.USABLE),
        ([KeyModels("k", "openai", ["x"]), KeyModels("l", "openai")], Use.NOT_KNOWN),
        ([KeyModels("k", "openai", ["x"]), KeyModels("l", "openai", ["y"])], Use.LACKING),
    ],
)
def test_a_model_is_lacking_only_where_every_list_is_whole(keys, use) -> None:
    assert Uses(keys).of(TERRA) is use


def test_a_thousand_models_are_held_against_many_lists_while_others_wait() -> None:
    """On the event loop. Shown to fail with each model held against each name: a minute."""
    keys = [
        KeyModels(f"k{at}", "openai", [f"gpt-{at}-{number}-2026-10-26" for number in range(1_000)])
        for at in range(bounds.LISTS)
    ]
    begun = time.thread_time()
    uses = Uses(keys)
    found = {uses.of(ModelRef("openai", f"gpt-{at}-7")) for at in range(1_000)}
    assert time.thread_time() - begun < 0.25
    assert found == {Use.USABLE, Use.LACKING}


def test_the_nearest_of_thousands_of_names_is_found_while_others_wait() -> None:
    """On the event loop. Shown to fail with all names compared: seconds."""
    names = [f"ft:gpt-{number:05}:" + "acme-" * 17 for number in range(1_000)]
    keys = [KeyModels(f"k{at}", "openai", [f"{name}{at}" for name in names]) for at in range(20)]
    begun = time.thread_time()
    error = not_usable(ModelRef("openai", f"ft:gpt-00042:{'acme-' * 17}x"), keys)
    assert time.thread_time() - begun < 0.25
    assert "ft:gpt-00042:" in error.metadata["nearest"].split(",")[0]


def test_what_no_key_can_use_is_refused_with_the_nearest_names() -> None:
    names = ["gpt-6.1-terra", "gpt-6-luna", "whisper-1"]
    error = not_usable(ModelRef("openai", "gpt-6.1-tera"), [KeyModels("k", "openai", names)])
    assert error.metadata["nearest"].split(",")[0] == "openai/gpt-6.1-terra"
    assert "whisper" not in error.metadata["nearest"]
    assert "key k can't use a model of that name" in error.message
    assert "openai/gpt-6.1-terra" in error.message
    far = not_usable(ModelRef("openai", "zzz"), [KeyModels("k", "openai", names)])
    assert far.metadata["nearest"] == ""
    assert "nearest" not in far.message


def test_validation_is_tried_ever_more_slowly() -> None:
    waits = [round(validation_delay(number) / 60, 1) for number in range(1, 7)]
    assert waits[:5] == sorted(waits[:5])
    assert waits[0] <= 0.1
    assert waits[5] >= 54


@pytest.mark.parametrize(
    "request_",
    [
        review_pb2.SubmitReviewRequest(parent="tenants/acme"),
        review_pb2.GetReviewRequest(name="tenants/acme/reviews/rev_1"),
        settings_pb2.SetPlanRequest(tenant="tenants/acme"),
        settings_pb2.UpdateSettingsRequest(settings={"name": "tenants/acme/settings"}),
        tenant_pb2.CreateTenantRequest(name="tenants/acme"),
    ],
)
def test_tenant_is_found_in_every_shape_of_request(request_) -> None:
    assert tenant_of(request_) == "acme"


@pytest.mark.parametrize("name", ["", "acme", "tenants/", "tenants/A", "x/tenants/acme"])
def test_malformed_names_have_no_tenant(name) -> None:
    with pytest.raises(ByokeepError) as refused:
        tenant_of(tenant_pb2.SuspendTenantRequest(name=name))
    assert refused.value.reason == "INVALID_FIELD"


def test_request_without_a_tenant_is_nobodys() -> None:
    with pytest.raises(StopIteration):
        tenant_of(tenant_pb2.ListTenantsRequest())


@pytest.mark.parametrize(
    ("rows", "page", "token"),
    [([], [], ""), (["a", "b"], ["a", "b"], ""), (["a", "b", "c"], ["a", "b"], "b")],
)
def test_pages(rows, page, token) -> None:
    made, following = paging.cut(rows, 2, str, lambda row: tenant_pb2.Tenant(name=row))
    assert ([one.name for one in made], following) == (page, token)


@pytest.mark.parametrize(("content", "mode"), [("no key", 0o600), ("", 0o644)])
def test_grant_key_must_be_private_and_ed25519(tmp_path, content, mode) -> None:
    file = tmp_path / "grant.pem"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"grant\.pem"):
        GrantSigner(file, "d", "default")


@pytest.mark.parametrize("name", ["concurrency", "max_diff_bytes", "drain_seconds"])
def test_zero_is_named_and_refused(name) -> None:
    with pytest.raises(ConfigError, match=f"BYOKEEP_{name.upper()}, .* must be 1 to "):
        load(Settings, {f"BYOKEEP_{name.upper()}": "0"})


def test_fallbacks_are_of_the_same_provider_and_not_known_to_be_lacking() -> None:
    listed = ["gemini/g", "openai/gpt-6.1-terra", "openai/a", "openai/b"]
    assert [str(one) for one in fallbacks(TERRA, listed, None)] == ["openai/a", "openai/b"]
    known = KeyModels("k", "openai", ["b"])
    assert [str(one) for one in fallbacks(TERRA, listed, known)] == ["openai/b"]
    assert fallbacks(TERRA, [], None) == []


def test_managed_keys_and_the_tenants_own_never_stand_in_for_each_other() -> None:
    """Shown to fail where either list has the other's keys."""
    own, users, managed = key(1), key(2, owner="ann"), key(3, owner=OPERATOR)

    def chosen(*keys: custody_pb2.ProviderKey, user: str = "", **values):
        return keys_for(keys, user=user, repository="a/b", **values).choose("openai")

    for user in ("", "ann"):
        assert chosen(own, users, managed, user=user, managed=True) == managed
        with pytest.raises(ByokeepError, match="no managed openai key is ACTIVE") as refused:
            chosen(own, users, user=user, managed=True)
        assert refused.value.reason == "NO_ACTIVE_KEY"
        assert chosen(own, users, managed, user=user) == (users if user else own)
    broken = key(3, owner=OPERATOR, state=custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY)
    with pytest.raises(ByokeepError, match="no managed openai key"):
        chosen(own, users, broken, managed=True)
    for order in ((), ("USER", "REPOSITORY", "TEAM")):
        with pytest.raises(ByokeepError, match="no active openai key"):
            chosen(managed, order=order)
    with pytest.raises(ByokeepError, match="no managed provider key"):
        choose_model({}, keys_for([own], user="", repository="a/b", managed=True), CATALOG)
    assert of_custody([own, users, managed], managed=False) == [own, users]
