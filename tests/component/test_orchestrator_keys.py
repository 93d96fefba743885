"""Keys: relayed, validated, promoted or destroyed, shown."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from byokeep import names
from byokeep.common.v1 import options_pb2
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2, grant_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2

from services.common.errors import ByokeepError
from tests.harness.orchestrator import (
    ACTIVE,
    DIFF,
    PENDING,
    Conversation,
    RunnerGone,
    Stack,
    add_key_request,
    fails,
    one_chunk,
    request_id,
    running,
    spiffe,
    verdict,
)

DESTROYED = custody_pb2.KEY_VERSION_STATE_DESTROYED
REVOKED = custody_pb2.KEY_VERSION_STATE_REVOKED
SUPERSEDED = custody_pb2.KEY_VERSION_STATE_SUPERSEDED


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path, intake_per_hour=5) as started:
        await started.tenant()
        yield started


def reason_of(refused: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> str:
    return error_info(refused.value).reason


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_valid_key_is_promoted_and_its_models_are_known(stack: Stack) -> None:
    added = await stack.add_key()
    assert added.provider_key.state == PENDING
    key = await stack.validated(added)
    assert key.provider_key.state == ACTIVE
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_VALID
    assert list(key.validation.models) == ["gpt-6.1-terra", "gpt-6-luna"]
    response = await stack.client("acme").settings.ListModels(
        settings_pb2.ListModelsRequest(parent="tenants/acme")
    )
    assert [(one.model, one.provider_default) for one in response.models] == [
        ("openai/gpt-6-luna", False),
        ("openai/gpt-6.1-terra", True),
    ]


async def test_a_list_of_models_without_end_is_cut_and_says_so(stack: Stack) -> None:
    """Was shown to fail with `listed` out of the orchestrator: all were stored."""
    many = [f"model-{number:06}" for number in range(5_000)] + ["no model", "x" * 101]
    stack.runner.default = verdict(key_pb2.VALIDATION_VERDICT_VALID, *many)
    key = await stack.validated(await stack.add_key())
    assert list(key.validation.models) == many[:1_000]
    assert key.validation.models_cut
    ((stored,),) = await stack.sql("SELECT models FROM key_validation")
    assert len(stored) == 1_001
    listing = await stack.client("acme").keys.ListKeys(
        key_pb2.ListKeysRequest(parent="tenants/acme")
    )
    assert [list(one.validation.models) for one in listing.keys] == [[]]
    models = await stack.client("acme").settings.ListModels(
        settings_pb2.ListModelsRequest(parent="tenants/acme", page_size=1_000)
    )
    assert len(models.models) == 1_000
    assert models.cut


async def test_two_tenants_may_choose_the_same_key_id(stack: Stack) -> None:
    """Was shown to fail without the tenant in the key of key_validation."""
    await stack.tenant("bolt")
    stack.runner.scripts = [
        verdict(key_pb2.VALIDATION_VERDICT_VALID, "gpt-6-luna"),
        verdict(key_pb2.VALIDATION_VERDICT_RESTRICTED),
    ]
    own = await stack.validated(await stack.add_key())
    key_id = names.last_of(own.provider_key.name)
    same = await stack.add_key("bolt", key_id=key_id, display_name="same")
    assert not same.HasField("validation") or not same.validation.attempts
    same = await stack.validated(same)
    own = (
        await stack.client("acme").keys.GetKey(key_pb2.GetKeyRequest(name=own.provider_key.name))
    ).key
    assert own.validation.verdict == key_pb2.VALIDATION_VERDICT_VALID
    assert same.validation.verdict == key_pb2.VALIDATION_VERDICT_RESTRICTED
    grants = [grant_pb2.Grant.FromString(one.proceed.grant.payload) for one in stack.runner.talks]
    assert [one.tenant for one in grants] == ["acme", "bolt"]
    models = {}
    for tenant in ("acme", "bolt"):
        response = await stack.client(tenant).settings.ListModels(
            settings_pb2.ListModelsRequest(parent=f"tenants/{tenant}")
        )
        models[tenant] = [one.model for one in response.models]
    assert models == {"acme": ["openai/gpt-6-luna"], "bolt": ["openai/gpt-6.1-terra"]}
    assert await stack.sql("SELECT action FROM key_validation") == [("",), ("",)]


async def test_validation_takes_a_grant_for_validation_alone(stack: Stack) -> None:
    key = await stack.validated(await stack.add_key())
    talk = stack.runner.talks[-1]
    grant = grant_pb2.Grant.FromString(talk.proceed.grant.payload)
    assert grant.purpose == talk.assign.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION
    assert (grant.review_id, grant.key_version) == ("", 1)
    assert grant.actor == spiffe("acme")
    assert not talk.assign.HasField("input")
    stage = stack.keyvault.asked(custody_pb2.StageKeyRequest)[0]
    assert (stage.actor, stage.name) == (spiffe("acme"), key.provider_key.name)


async def test_invalid_key_is_destroyed(stack: Stack) -> None:
    stack.runner.default = verdict(key_pb2.VALIDATION_VERDICT_INVALID)
    key = await stack.validated(await stack.add_key())
    assert key.provider_key.state == DESTROYED
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_INVALID


@pytest.mark.parametrize("told", ["RESTRICTED", "QUOTA_EXHAUSTED"])
async def test_key_that_works_in_part_is_promoted(stack: Stack, told: str) -> None:
    value = key_pb2.ValidationVerdict.Value(f"VALIDATION_VERDICT_{told}")
    stack.runner.default = verdict(value)
    key = await stack.validated(await stack.add_key())
    assert (key.provider_key.state, key.validation.verdict) == (ACTIVE, value)
    response = await stack.client("acme").settings.ListModels(
        settings_pb2.ListModelsRequest(parent="tenants/acme")
    )
    assert [one.model for one in response.models] == ["openai/gpt-6.1-terra"]


async def gone(talk: Conversation) -> None:
    await talk.accept()
    await talk.call("")
    raise RunnerGone


@pytest.mark.parametrize(
    "script",
    [
        verdict(key_pb2.VALIDATION_VERDICT_UNREACHABLE),
        fails(review_pb2.FAILURE_REASON_RATE_LIMITED),
        fails(review_pb2.FAILURE_REASON_LEASE_REFUSED),
        gone,
    ],
)
async def test_provider_that_cannot_be_asked_is_asked_later(stack: Stack, script) -> None:
    stack.runner.scripts = [script]
    added = await stack.add_key()
    name = key_pb2.GetKeyRequest(name=added.provider_key.name)
    async with asyncio.timeout(60):
        while not (key := (await stack.client("acme").keys.GetKey(name)).key).validation.attempts:
            await asyncio.sleep(0.02)
    assert key.provider_key.state == PENDING
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_UNREACHABLE
    wait = key.validation.retry_time.seconds - key.validation.check_time.seconds
    assert 3 <= wait <= 7
    # The next attempt is due then, and finds the key valid.
    assert await stack.sql("SELECT count(*) FROM attempt WHERE state = 'QUEUED'") == [(1,)]
    await stack.hurry()
    key = await stack.validated(key)
    assert (key.provider_key.state, key.validation.attempts) == (ACTIVE, 2)


async def test_after_a_day_the_version_is_destroyed(stack: Stack) -> None:
    stack.runner.default = verdict(key_pb2.VALIDATION_VERDICT_UNREACHABLE)
    added = await stack.add_key()
    await stack.until("SELECT 1 FROM key_validation WHERE attempts = 1")
    await stack.sql("UPDATE key_validation SET create_time = now() - interval '25 hours'")
    await stack.hurry()
    key = await stack.validated(added)
    assert key.provider_key.state == DESTROYED
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_UNREACHABLE


async def test_verdict_outlives_a_keyvault_that_is_away(stack: Stack) -> None:
    async def script(talk: Conversation) -> None:
        stack.keyvault.away = True
        await verdict(key_pb2.VALIDATION_VERDICT_VALID, "m")(talk)

    stack.runner.scripts = [script]
    added = await stack.add_key()
    await stack.until("SELECT 1 FROM key_validation WHERE action = 'PROMOTE'")
    stack.keyvault.away = False
    key = await stack.validated(added)
    assert key.provider_key.state == ACTIVE
    assert await stack.sql("SELECT action FROM key_validation") == [("",)]


async def test_older_version_does_not_replace_a_newer_one(stack: Stack) -> None:
    stack.runner.scripts = [verdict(key_pb2.VALIDATION_VERDICT_UNREACHABLE)]
    added = await stack.add_key()
    name = added.provider_key.name
    # The script is the older one's.
    await stack.until("SELECT 1 FROM attempt WHERE state NOT IN ('QUEUED', 'RUNNING')")
    rotated = await stack.client("acme").keys.RotateKey(rotate_request(name))
    key = await stack.validated(rotated.key)
    assert [one.state for one in key.provider_key.versions] == [PENDING, ACTIVE]
    # Only now is the older one found to be valid.
    await stack.hurry()
    await until(lambda: stack.keyvault.keys[name].versions[0].state == DESTROYED)
    assert stack.keyvault.keys[name].active_version == 2


def rotate_request(name: str, **values) -> key_pb2.RotateKeyRequest:
    chosen = {
        "name": name,
        "sealed_key": add_key_request().sealed_key,
        "request_id": request_id(),
    }
    return key_pb2.RotateKeyRequest(**(chosen | values))


async def test_rotate_keeps_the_key_and_passes_destroy_previous(stack: Stack) -> None:
    key = await stack.validated(await stack.add_key())
    request = rotate_request(
        key.provider_key.name, destroy_previous=True, etag=key.provider_key.etag
    )
    client = stack.client("acme").keys
    rotated = await client.RotateKey(request)
    await client.RotateKey(request)  # a retry, with the old etag
    key = await stack.validated(rotated.key)
    assert [one.state for one in key.provider_key.versions] == [SUPERSEDED, ACTIVE]
    promoted = stack.keyvault.asked(custody_pb2.PromoteKeyVersionRequest)
    assert [one.destroy_previous for one in promoted] == [False, True]
    stale = rotate_request(key.provider_key.name, etag="1")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.RotateKey(stale)
    assert reason_of(refused) == "ETAG_MISMATCH"


@pytest.mark.parametrize("call", ["Rotate", "Revoke", "Destroy", "RollBack"])
async def test_change_refused_for_its_etag_is_refused_again(stack: Stack, call) -> None:
    """The etag is keyvault's to compare. Shown to fail with an etag that is not passed on."""
    key = await stack.validated(await stack.add_key())
    name = key.provider_key.name
    if call == "Rotate":
        request = rotate_request(name, etag="1")
    else:
        make = getattr(key_pb2, f"{call}KeyRequest")
        request = make(name=name, request_id=request_id(), etag="1")
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(stack.client("acme").keys, f"{call}Key")(request)
        assert reason_of(refused) == "ETAG_MISMATCH"
    assert stack.keyvault.keys[name] == key.provider_key


@pytest.fixture
def held(stack: Stack, monkeypatch):
    """Hold up what is staged in keyvault; events: it is there, it may go on."""
    there, go_on = asyncio.Event(), asyncio.Event()
    heard = stack.keyvault._heard

    async def hold(request, context):
        if isinstance(request, custody_pb2.StageKeyRequest):
            there.set()
            await go_on.wait()
        return await heard(request, context)

    monkeypatch.setattr(stack.keyvault, "_heard", hold)
    return there, go_on


async def test_key_that_is_staged_while_its_tenant_is_deleted_is_destroyed(stack: Stack, held):
    """Its deletion found no such key. Shown to fail where `schedule` does not look at the tenant
    under its lock."""
    there, go_on = held
    adding = asyncio.create_task(stack.add_key())
    async with asyncio.timeout(60):
        await there.wait()
    deletion = tenant_pb2.DeleteTenantRequest(name="tenants/acme", request_id=request_id())
    deleted = await stack.client("operator").tenants.DeleteTenant(deletion)
    assert deleted.destroyed_keys == 0
    go_on.set()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await adding
    assert reason_of(refused) == "WRONG_STATE"
    assert [key.state for key in stack.keyvault.keys.values()] == [DESTROYED]
    assert await stack.sql("SELECT * FROM attempt") == []


async def test_key_that_outlived_its_tenant_is_destroyed(stack: Stack) -> None:
    """We stopped between the two steps of the test above."""
    deletion = tenant_pb2.DeleteTenantRequest(name="tenants/acme", request_id=request_id())
    await stack.client("operator").tenants.DeleteTenant(deletion)
    key_id = stack.keyvault.add("acme", state=PENDING)
    await stack.app.sweeper.deletions()
    assert stack.keyvault.keys[names.key_name("acme", key_id)].state == DESTROYED


async def test_key_that_can_not_be_destroyed_stops_no_other(stack: Stack, monkeypatch) -> None:
    """Neither the deleted tenant's keys after it, nor what another tenant waits for.

    Shown to fail where a refusal ends either loop.
    """
    await stack.tenant("aaa")
    deletion = tenant_pb2.DeleteTenantRequest(name="tenants/aaa", request_id=request_id())
    await stack.client("operator").tenants.DeleteTenant(deletion)
    refused, after = sorted(stack.keyvault.add("aaa", display_name=name) for name in "ab")
    waiting = stack.keyvault.add("acme", state=PENDING)
    pending = stack.keyvault.keys[names.key_name("acme", waiting)]
    pending.versions[0].create_time.seconds -= 1000
    heard = stack.keyvault._heard

    async def refuse(request, context):
        if isinstance(request, custody_pb2.DestroyKeyRequest) and request.name.endswith(refused):
            error = ByokeepError(grpc.StatusCode.DATA_LOSS, "STATE_TAMPERED", "altered")
            await context.abort(error.code, error.message, error.trailing_metadata())
        return await heard(request, context)

    monkeypatch.setattr(stack.keyvault, "_heard", refuse)
    await stack.app.sweeper.deletions()
    await stack.app.sweeper.unscheduled()
    assert stack.keyvault.keys[names.key_name("aaa", after)].state == DESTROYED
    assert await stack.sql("SELECT key_id FROM key_validation") == [(waiting,)]


@pytest.mark.parametrize(("method", "state"), [("RevokeKey", REVOKED), ("DestroyKey", DESTROYED)])
@pytest.mark.parametrize("reason", ["STATE_TAMPERED", "ROLLED_BACK", "NOT_FOUND"])
async def test_key_of_a_damaged_tenant_is_ended(stack: Stack, monkeypatch, reason, method, state):
    """keyvault is asked all the same: it keeps the end, and carries it out.

    Shown to fail where a key must be shown first.
    """
    key_id = stack.keyvault.add("acme")
    heard = stack.keyvault._heard

    async def refuse(request, context):
        if isinstance(request, custody_pb2.GetKeyRequest):
            error = ByokeepError(grpc.StatusCode.DATA_LOSS, reason, "altered")
            await context.abort(error.code, error.message, error.trailing_metadata())
        return await heard(request, context)

    monkeypatch.setattr(stack.keyvault, "_heard", refuse)
    name = names.key_name("acme", key_id)
    request = getattr(key_pb2, f"{method}Request")(name=name, request_id=request_id())
    end = getattr(stack.client("acme").keys, method)
    if reason == "NOT_FOUND":
        with pytest.raises(grpc.aio.AioRpcError):
            await end(request)
        assert stack.keyvault.asked(getattr(custody_pb2, f"{method}Request")) == []
    else:
        assert (await end(request)).key.provider_key.state == state


async def test_repeated_add_validates_once(stack: Stack) -> None:
    request = add_key_request()
    client = stack.client("acme").keys
    first = await client.AddKey(request)
    again = await client.AddKey(request)
    assert first.key.provider_key.name == again.key.provider_key.name
    await stack.validated(again.key)
    assert await stack.sql("SELECT count(*) FROM attempt") == [(1,)]


async def test_staged_version_without_a_validation_gets_one(stack: Stack) -> None:
    key_id = stack.keyvault.add("acme", state=PENDING)
    key = stack.keyvault.keys[names.key_name("acme", key_id)]
    await stack.app.sweeper.unscheduled()
    assert await stack.sql("SELECT * FROM key_validation") == []  # it may be on its way
    key.versions[0].create_time.seconds -= 100
    await stack.app.sweeper.unscheduled()
    await until(lambda: key.state == ACTIVE)


async def test_existing_name_is_refused_as_keyvault_says(stack: Stack) -> None:
    added = await stack.add_key()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.add_key()
    info = error_info(refused.value)
    assert (info.code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "KEY_EXISTS")
    assert info.metadata["key"] == names.last_of(added.provider_key.name)


async def test_keyvault_away_is_unavailable(stack: Stack) -> None:
    stack.keyvault.away = True
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.add_key()
    info = error_info(refused.value)
    assert (info.reason, info.metadata["dependency"]) == ("DEPENDENCY_UNAVAILABLE", "keyvault")


async def test_intake_is_capped(stack: Stack) -> None:
    for number in range(5):
        await stack.add_key(display_name=f"k{number}")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.add_key(display_name="one-more")
    assert reason_of(refused) == "INTAKE_LIMIT"
    assert len(stack.keyvault.asked(custody_pb2.StageKeyRequest)) == 5
    await stack.sql("UPDATE rate_bucket SET hour = hour - interval '2 hours'")
    await stack.add_key(display_name="one-more")


async def test_starter_plan_has_one_key_a_provider_and_none_of_users(stack: Stack) -> None:
    await stack.tenant("small", plan="starter")
    await stack.validated(await stack.add_key("small"))
    for values in ({"display_name": "second"}, {"user": "ann"}):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.add_key("small", **values)
        assert reason_of(refused) == "PLAN_LACKS_FEATURE"
    await stack.add_key("small", provider=options_pb2.PROVIDER_GEMINI, display_name="other")


@pytest.mark.parametrize(
    ("call", "state"),
    [("Revoke", custody_pb2.KEY_VERSION_STATE_REVOKED), ("Destroy", DESTROYED)],
)
async def test_revoke_and_destroy_work_for_a_suspended_tenant(stack: Stack, call, state) -> None:
    key = await stack.validated(await stack.add_key())
    operator = stack.client("operator").tenants
    await operator.SuspendTenant(
        tenant_pb2.SuspendTenantRequest(name="tenants/acme", request_id=request_id())
    )
    client = stack.client("acme").keys
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.add_key(display_name="new")
    assert reason_of(refused) == "TENANT_NOT_ACTIVE"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.RotateKey(rotate_request(key.provider_key.name))
    assert reason_of(refused) == "TENANT_NOT_ACTIVE"
    request = getattr(key_pb2, f"{call}KeyRequest")(
        name=key.provider_key.name, request_id=request_id(), etag=key.provider_key.etag
    )
    method = getattr(client, f"{call}Key")
    assert (await method(request)).key.provider_key.state == state
    assert (await method(request)).key.provider_key.state == state  # a retry, with the old etag


async def test_user_key_is_for_its_user_and_seen_by_who_speaks_for_users(stack: Stack) -> None:
    await stack.tenant(
        "duo", rights={"duo": ([1, 2], True), "plain": ([1, 2], False), "audit": ([3], False)}
    )
    key = await stack.validated(await stack.add_key("duo", user="ann"))
    assert key.provider_key.owner == "ann"
    request = key_pb2.ListKeysRequest(parent="tenants/duo")
    seen = {
        name: len((await stack.client(name).keys.ListKeys(request)).keys)
        for name in ("duo", "plain", "audit")
    }
    assert seen == {"duo": 1, "plain": 0, "audit": 1}
    review = await stack.submit("duo", user="ann")
    assert (await stack.ended(review)).key_id == names.last_of(key.provider_key.name)
    assert stack.keyvault.asked(custody_pb2.StageKeyRequest)[0].actor == f"{spiffe('duo')}#ann"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit("duo")  # the tenant has none of its own
    assert reason_of(refused) == "NO_ACTIVE_KEY"


async def test_who_names_no_user_acts_for_none(stack: Stack) -> None:
    """Was shown to fail with the key's owner given to Rights.actor."""
    key = await stack.validated(await stack.add_key(user="ann"))
    client, name = stack.client("acme").keys, key.provider_key.name
    rotated = await client.RotateKey(rotate_request(name))
    await stack.validated(rotated.key)
    for call in ("RollBack", "Revoke", "Destroy"):
        request = getattr(key_pb2, f"{call}KeyRequest")(name=name, request_id=request_id())
        await getattr(client, f"{call}Key")(request)
    actors = [one.actor for one in stack.keyvault.calls if hasattr(one, "actor")]
    user = f"{spiffe('acme')}#ann"
    assert actors == [user, user, *[spiffe("acme")] * 5]


async def test_uses_tell_who_held_the_key(stack: Stack) -> None:
    key = await stack.validated(await stack.add_key())
    review = await stack.ended(await stack.submit(pull_request=7))
    client = stack.client("acme").keys
    name = key.provider_key.name
    first = await client.ListKeyUses(key_pb2.ListKeyUsesRequest(name=name, page_size=1))
    second = await client.ListKeyUses(
        key_pb2.ListKeyUsesRequest(name=name, page_size=1, page_token=first.next_page_token)
    )
    assert second.next_page_token == ""
    validation, use = first.uses[0], second.uses[0]
    assert validation.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION
    assert (use.review_id, use.label) == (names.last_of(review.name), "acme/shop#7")
    assert (use.process_id, use.state, use.calls_started) == (4711, "COMPLETED", 1)
    assert use.lease_id.startswith("lea_")
    assert use.open_time.seconds
    assert use.close_time.seconds


async def test_a_rollback_tells_of_the_version_that_is_active_again(stack: Stack) -> None:
    """Its verdict, not the destroyed one's, which is named; then and afterwards.

    Shown to fail: with the newest version's validation in every answer.
    """
    key = await stack.validated(await stack.add_key())
    name, client = key.provider_key.name, stack.client("acme").keys
    rotated = await stack.validated((await client.RotateKey(rotate_request(name))).key)
    assert rotated.validation.version == 2
    answer = await client.RollBackKey(
        key_pb2.RollBackKeyRequest(name=name, request_id=request_id())
    )
    assert list(answer.destroyed_versions) == [2]
    assert (answer.key.provider_key.active_version, answer.key.validation.version) == (1, 1)
    later = await client.GetKey(key_pb2.GetKeyRequest(name=name))
    assert later.key.validation.version == 1


async def test_reviews_run_on_the_new_version_at_once(stack: Stack) -> None:
    key = await stack.validated(await stack.add_key())
    await stack.validated(
        (await stack.client("acme").keys.RotateKey(rotate_request(key.provider_key.name))).key
    )
    await stack.ended(await stack.submit())
    versions = await stack.sql("SELECT key_version FROM attempt WHERE kind = 'REVIEW'")
    assert versions == [(2,)]


async def set_default(stack: Stack, model: str) -> settings_pb2.Settings:
    response = await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", default_model=model),
            update_mask={"paths": ["default_model"]},
            request_id=request_id(),
        )
    )
    return response.settings


async def override(
    stack: Stack, model: str, repository: str = "acme/*", path: str = ""
) -> settings_pb2.Settings:
    response = await stack.client("acme").settings.SetModelOverride(
        settings_pb2.SetModelOverrideRequest(
            parent="tenants/acme",
            repository_pattern=repository,
            path_pattern=path,
            model=model,
            request_id=request_id(),
        )
    )
    return response.settings


async def dry_run(stack: Stack, model: str, **values) -> review_pb2.DryRunReviewResponse:
    chosen = {"repository": "acme/shop", "diff": DIFF} | values
    wanted = review_pb2.ReviewInput(**chosen, model=model)
    request = review_pb2.DryRunReviewRequest(parent="tenants/acme", input=wanted)
    return await stack.client("acme").reviews.DryRunReview(request)


async def test_a_model_that_the_key_can_not_use_is_refused_where_it_is_chosen(
    stack: Stack,
) -> None:
    """Shown to fail without each of the two checks."""
    await stack.validated(await stack.add_key())
    asked = len(stack.runner.talks)
    wrong = "openai/gpt-6.1-tera"
    for field, choose in (
        ("input.model", lambda: stack.submit(model=wrong)),
        ("input.model", lambda: dry_run(stack, wrong)),
        ("settings.default_model", lambda: set_default(stack, wrong)),
        ("model", lambda: override(stack, wrong)),
    ):
        with pytest.raises(
            grpc.aio.AioRpcError, match=r"nearest: openai/gpt-6\.1-terra"
        ) as refused:
            await choose()
        info = error_info(refused.value)
        assert info.reason == "MODEL_NOT_USABLE"
        assert info.metadata["nearest"].split(",")[0] == "openai/gpt-6.1-terra"
        assert (info.metadata["model"], info.metadata["field"]) == (wrong, field)
    right = "openai/gpt-6-luna"
    assert (await set_default(stack, right)).default_model_use == settings_pb2.MODEL_USE_USABLE
    (entry,) = (await override(stack, right)).model_overrides
    assert entry.use == settings_pb2.MODEL_USE_USABLE
    assert len(stack.runner.talks) == asked  # no provider was asked


async def test_a_model_is_taken_where_it_is_not_known_who_can_use_it(stack: Stack) -> None:
    first = await set_default(stack, "openai/gpt-4711")
    assert first.default_model_use == settings_pb2.MODEL_USE_NO_KEY
    stack.keyvault.add("acme")  # of which no list is known
    assert (await dry_run(stack, "")).model == "openai/gpt-4711"
    unknown = await set_default(stack, "openai/gpt-4712")
    assert unknown.default_model_use == settings_pb2.MODEL_USE_UNSPECIFIED
    stack.keyvault.away = True
    request = settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
    shown = (await stack.client("acme").settings.GetSettings(request)).settings
    assert shown.default_model == "openai/gpt-4712"


async def test_a_default_that_its_key_has_lost_is_said_and_refused(stack: Stack) -> None:
    await set_default(stack, "openai/gpt-4711")
    await stack.validated(await stack.add_key())
    request = settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
    shown = (await stack.client("acme").settings.GetSettings(request)).settings
    assert shown.default_model_use == settings_pb2.MODEL_USE_LACKING
    with pytest.raises(grpc.aio.AioRpcError, match="the tenant's default: key key_") as refused:
        await stack.submit()
    assert error_info(refused.value).metadata.get("field") is None


async def check(stack: Stack, name: str, **values) -> key_pb2.Key:
    chosen = {"name": name, "request_id": request_id()} | values
    return (await stack.client("acme").keys.CheckKey(key_pb2.CheckKeyRequest(**chosen))).key


async def test_a_key_is_checked_now_and_its_models_are_as_new(stack: Stack) -> None:
    """Shown to fail where WatchKey looks at the newest version's state alone."""
    key = await stack.validated(await stack.add_key())
    seen = asyncio.Event()

    async def answer(talk: Conversation) -> None:
        await seen.wait()
        await verdict(key_pb2.VALIDATION_VERDICT_VALID, "gpt-7")(talk)

    stack.runner.default = answer
    name, same = key.provider_key.name, request_id()
    checked = await check(stack, name, request_id=same)
    assert checked.check.open
    seen.set()
    checked = await stack.validated(checked)
    assert (checked.check.open, checked.check.failure) == (False, 0)
    assert list(checked.validation.models) == ["gpt-7"]
    asked = [one.assign.purpose for one in stack.runner.talks]
    assert asked == [grant_pb2.LEASE_PURPOSE_VALIDATION] * 2
    await check(stack, name, request_id=same)  # a retry asks nobody
    assert await stack.sql("SELECT count(*) FROM attempt WHERE kind = 'CHECK'") == [(1,)]
    assert (await stack.submit(model="openai/gpt-7")).model == "openai/gpt-7"


async def test_the_models_of_a_key_in_use_are_asked_for_once_a_day(stack: Stack) -> None:
    """Shown to fail where keys are asked for that no review runs on, and where one whose check
    failed is asked again at once."""
    used = await stack.validated(await stack.add_key())
    await stack.validated(await stack.add_key(display_name="unused"))
    await stack.ended(await stack.submit(key="main"))
    checks = "SELECT key_id FROM attempt WHERE kind = 'CHECK'"
    await stack.app.sweeper.model_lists()
    assert await stack.sql(checks) == [], "it was asked when it was added"
    old = "UPDATE key_validation SET check_time = check_time - interval '30 hours'"
    await stack.sql(old)
    stack.runner.default = fails(review_pb2.FAILURE_REASON_RATE_LIMITED)
    for _ in range(2):
        await stack.app.sweeper.model_lists()
        await stack.until(f"SELECT 1 WHERE NOT EXISTS ({checks} AND end_time IS NULL)")
    key_id = names.last_of(used.provider_key.name)
    assert await stack.sql(checks) == [(key_id,)]
    await stack.sql("UPDATE attempt SET create_time = create_time - interval '30 hours'")
    stack.runner.default = verdict(key_pb2.VALIDATION_VERDICT_VALID, "gpt-7")
    await stack.app.sweeper.model_lists()
    key = await stack.validated(used)
    assert list(key.validation.models) == ["gpt-7"]
    await stack.app.sweeper.model_lists()
    assert len(await stack.sql(checks)) == 2


async def test_a_check_that_can_not_ask_ends_and_changes_nothing(stack: Stack) -> None:
    """One that was asked for by hand; what reviews wait for goes on (test_orchestrator_waits)."""
    key = await stack.validated(await stack.add_key())
    stack.runner.default = fails(review_pb2.FAILURE_REASON_RATE_LIMITED)
    checked = await stack.validated(await check(stack, key.provider_key.name))
    assert checked.check.failure == review_pb2.FAILURE_REASON_RATE_LIMITED
    assert checked.validation.verdict == key_pb2.VALIDATION_VERDICT_VALID
    assert checked.validation.check_time == key.validation.check_time
    assert checked.provider_key.state == ACTIVE
    assert await stack.sql("SELECT 1 FROM attempt WHERE state = 'QUEUED'") == []


async def test_a_key_that_a_check_finds_rejected_waits_for_a_new_one(stack: Stack) -> None:
    key = await stack.validated(await stack.add_key())
    stack.runner.default = verdict(key_pb2.VALIDATION_VERDICT_INVALID)
    checked = await stack.validated(await check(stack, key.provider_key.name))
    assert checked.validation.verdict == key_pb2.VALIDATION_VERDICT_INVALID
    assert await stack.sql("SELECT reason FROM pause") == [("KEY_NEEDS_REKEY",)]


async def test_checks_are_capped_and_take_an_active_version(stack: Stack) -> None:
    """Shown to fail without the count. Keys can be added all the same."""
    pending = stack.keyvault.add("acme", state=PENDING, display_name="new")
    with pytest.raises(grpc.aio.AioRpcError, match="is PENDING until"):
        await check(stack, names.key_name("acme", pending))
    key = await stack.validated(await stack.add_key())
    for _ in range(5):
        await stack.validated(await check(stack, key.provider_key.name))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await check(stack, key.provider_key.name)
    assert reason_of(refused) == "INTAKE_LIMIT"
    await stack.add_key(display_name="another")


async def assign(stack: Stack, pattern: str, key_id: str) -> settings_pb2.Settings:
    response = await stack.client("acme").settings.SetRepositoryKey(
        settings_pb2.SetRepositoryKeyRequest(
            parent="tenants/acme", repository_pattern=pattern, key=key_id, request_id=request_id()
        )
    )
    return response.settings


async def order(stack: Stack, *sources: str) -> settings_pb2.Settings:
    wanted = [settings_pb2.KeySource.Value(f"KEY_SOURCE_{one}") for one in sources]
    response = await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", key_order=wanted),
            update_mask={"paths": ["key_order"]},
            request_id=request_id(),
        )
    )
    return response.settings


async def test_a_review_runs_on_the_key_that_it_names_and_says_which(stack: Stack) -> None:
    stack.keyvault.add("acme", display_name="main")
    added = await stack.validated(await stack.add_key(display_name="ci"))
    named = names.last_of(added.provider_key.name)
    stack.runner.default = one_chunk
    submitted = await stack.submit(key="ci")
    ended = await stack.ended(submitted)
    for review in (submitted, ended):
        assert (review.key_id, review.key_version, review.key_hint) == (named, 1, "sk-...AbCd")
    grant = grant_pb2.Grant.FromString(stack.runner.talks[-1].proceed.grant.payload)
    assert grant.key_id == named
    with pytest.raises(grpc.aio.AioRpcError, match=r"may run on ci \(openai\), main"):
        await stack.submit(key="prod")


async def test_a_retry_stays_on_the_key_that_was_named(stack: Stack) -> None:
    """Shown to fail without `named_key`: the oldest key is taken."""
    _, named = sorted(stack.keyvault.add("acme", display_name=name) for name in "ab")
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_REFUSED)]
    review = await stack.ended(await stack.submit(key=named))
    again = await stack.client("acme").reviews.RetryReview(
        review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
    )
    ended = await stack.ended(again.review)
    assert (ended.state, ended.key_id) == (review_pb2.REVIEW_STATE_COMPLETED, named)


async def test_whose_key_it_is_follows_the_tenants_order(stack: Stack) -> None:
    """Grants name the key's owner, who is not always the submitter. Shown to fail where the grant
    has the review's user."""
    # Ids of one millisecond are in no order.
    third, repo = sorted(stack.keyvault.add("acme", display_name=name) for name in "ab")
    own = stack.keyvault.add("acme", owner="ann", display_name="anns")
    settings = await assign(stack, "acme/*", repo)
    assert [one.key_id for one in settings.repository_keys] == [repo]

    async def ran(**values) -> tuple[str, str, str]:
        review = await stack.ended(await stack.submit(**values))
        grant = grant_pb2.Grant.FromString(stack.runner.talks[-1].proceed.grant.payload)
        assert grant.key_id == review.key_id
        return grant.key_id, grant.owner, grant.actor.partition("#")[2]

    assert await ran() == (repo, "", "")
    assert await ran(repository="other/web") == (third, "", "")
    assert await ran(user="ann") == (own, "ann", "ann")
    assert len((await order(stack, "REPOSITORY", "USER")).key_order) == 2
    assert await ran(user="ann") == (repo, "", "ann")
    assert await ran(user="ann", repository="other/web") == (own, "ann", "ann")
    await order(stack, "TEAM")
    assert await ran(user="bob") == (third, "", "bob")
    await order(stack)
    with pytest.raises(grpc.aio.AioRpcError, match="of user bob"):
        await stack.submit(user="bob")
    stack.keyvault.set_state("acme", repo, REVOKED)
    with pytest.raises(grpc.aio.AioRpcError, match="REVOKED, for good; give the repository"):
        await stack.submit()
    assert not (await assign(stack, "acme/*", "")).repository_keys
    assert await ran() == (third, "", "")


async def test_a_users_key_is_no_repositorys(stack: Stack) -> None:
    own = stack.keyvault.add("acme", owner="ann", display_name="anns")
    ended = stack.keyvault.add("acme", state=REVOKED, display_name="old")
    for key_id in (own, ended):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await assign(stack, "acme/*", key_id)
        assert error_info(refused.value).metadata["field"] == "key"


async def fall_back(stack: Stack, *models: str) -> settings_pb2.Settings:
    response = await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", fallback_models=models),
            update_mask={"paths": ["fallback_models"]},
            request_id=request_id(),
        )
    )
    return response.settings


async def test_a_listed_model_takes_the_place_of_one_that_the_key_lacks(stack: Stack) -> None:
    """Of the settings' choice; who names one gets that or none."""
    await set_default(stack, "openai/gone")
    await fall_back(stack, "gemini/g", "openai/also-gone", "openai/gpt-6-luna")
    await stack.validated(await stack.add_key())
    stack.runner.default = one_chunk
    dry = await dry_run(stack, "")
    assert (dry.model, dry.chosen_model) == ("openai/gpt-6-luna", "openai/gone")
    review = await stack.ended(await stack.submit())
    assert (review.model, review.chosen_model) == ("openai/gpt-6-luna", "openai/gone")
    assert review.model_fallback == review_pb2.MODEL_FALLBACK_NOT_USABLE
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit(model="openai/gone")
    assert reason_of(refused) == "MODEL_NOT_USABLE"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fall_back(stack, "openai/gone")
    assert error_info(refused.value).metadata["field"] == "settings.fallback_models"


async def test_a_review_goes_on_with_the_next_listed_model_where_its_own_is_gone(
    stack: Stack,
) -> None:
    """On the same key, what is done stays done, and the refused call is given back. Shown to fail
    without `plan_model`, and without the refund."""
    stack.keyvault.add("acme")
    stack.keyvault.add("acme", display_name="other")
    await set_default(stack, "openai/a")
    await fall_back(stack, "openai/b", "openai/c")
    gone = review_pb2.FAILURE_REASON_MODEL_NOT_FOUND

    async def gone_after_one(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        await talk.call("c1")
        await talk.result("c1")
        await talk.call("c2", 2)
        await talk.end(gone)

    async def second(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        assert list(talk.proceed.done_chunk_ids) == ["c1"]
        await talk.call("c2")
        await talk.result("c2")
        await talk.end()

    stack.runner.scripts = [gone_after_one, fails(gone), second]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts) == (review_pb2.REVIEW_STATE_COMPLETED, 3)
    assert (review.model, review.chosen_model) == ("openai/c", "openai/a")
    assert review.model_fallback == review_pb2.MODEL_FALLBACK_NOT_FOUND
    assigned = [one.assign for one in stack.runner.talks]
    assert [one.model for one in assigned] == ["a", "b", "c"]
    assert [one.plan_model for one in assigned] == ["", "a", "a"]
    assert [one.max_calls for one in assigned] == [20, 19, 19]
    grants = [grant_pb2.Grant.FromString(one.proceed.grant.payload) for one in stack.runner.talks]
    assert {one.key_id for one in grants} == {review.key_id}


async def test_a_review_whose_listed_models_are_all_gone_fails(stack: Stack) -> None:
    stack.keyvault.add("acme")
    await set_default(stack, "openai/a")
    await fall_back(stack, "openai/b")
    stack.runner.default = fails(review_pb2.FAILURE_REASON_MODEL_NOT_FOUND)
    review = await stack.ended(await stack.submit())
    assert (review.failure, review.attempts) == (review_pb2.FAILURE_REASON_MODEL_NOT_FOUND, 2)
    assert "openai/b" in review.failure_message
    named = await stack.ended(await stack.submit(model="openai/a"))
    assert (named.attempts, named.model) == (1, "openai/a")


def diff_of(*paths: str, lines: int = 1) -> bytes:
    hunk = "".join(f"+line {number}\n" for number in range(lines))
    return "".join(
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -0,0 +1,{lines} @@\n{hunk}"
        for path in paths
    ).encode()


@pytest.mark.parametrize("lines", [1, 1_000])
async def test_changed_paths_choose_the_model(stack: Stack, lines: int) -> None:
    """Beside the event loop, where the diff is large."""
    stack.keyvault.add("acme")
    await override(stack, "openai/all", "acme/*")
    await override(stack, "openai/pay", "acme/*", "pay/*")
    settings = await override(stack, "openai/api", "acme/*", "pay/api/*")
    assert [(one.path_pattern, one.model) for one in settings.model_overrides] == [
        ("", "openai/all"),
        ("pay/*", "openai/pay"),
        ("pay/api/*", "openai/api"),
    ]

    async def model(*paths: str) -> str:
        return (await dry_run(stack, "", diff=diff_of(*paths, lines=lines))).model

    assert await model("README.md", "web/a.ts") == "openai/all"
    assert await model("README.md", "pay/a.py") == "openai/pay"
    assert await model("pay/a.py", "pay/api/v1/a.py") == "openai/api"
    assert len((await override(stack, "", "acme/*", "pay/*")).model_overrides) == 2
    assert await model("pay/a.py") == "openai/all"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await dry_run(stack, "", diff=b"no diff at all\n" * lines)
    assert reason_of(refused).startswith("DIFF_")


async def test_a_pattern_that_matches_nothing_so_far_says_so(stack: Stack) -> None:
    stack.keyvault.add("acme")
    await stack.submit(repository="acme/shop")
    await stack.submit(repository="acme/my_web")
    for pattern, none in (
        ("acme/*", False),
        ("acme/shpo", True),
        ("*", False),
        ("acme/sho?", False),
        ("acme/s?op", False),
        ("acme/my_we?", False),
        ("acme/my_w", True),
        ("acme/s_op", True),
        ("acme", True),
    ):
        (entry,) = (await override(stack, "openai/a", pattern)).model_overrides
        assert entry.matches_none is none, pattern
        await override(stack, "", pattern)


async def test_an_override_that_the_plan_lost_is_marked(stack: Stack) -> None:
    (entry,) = (await override(stack, "openai/a")).model_overrides
    assert not entry.plan_lacks
    response = await stack.client("operator").settings.SetPlan(
        settings_pb2.SetPlanRequest(tenant="tenants/acme", plan="starter", request_id=request_id())
    )
    (entry,) = response.settings.model_overrides
    assert entry.plan_lacks


async def test_so_many_overrides_look_at_paths_and_no_more(stack: Stack) -> None:
    await stack.sql(
        "INSERT INTO model_override (tenant, pattern, path_pattern, model)"
        " SELECT 'acme', 'a/b', n || '/*', 'openai/m' FROM generate_series(1, 100) n"
    )
    await override(stack, "openai/m", "a/b")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await override(stack, "openai/m", "a/b", "one/more")
    info = error_info(refused.value)
    assert (info.metadata["field"], info.metadata["limit"]) == ("path_pattern", "100")


async def test_a_review_keeps_the_fallback_that_it_was_submitted_with(stack: Stack) -> None:
    stack.keyvault.add("acme")
    await set_default(stack, "openai/a")
    await fall_back(stack, "openai/b")
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    submitted = await stack.submit()
    await fall_back(stack)
    await set_default(stack, "openai/c")
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_MODEL_NOT_FOUND), one_chunk]
    await stack.runner.tell(draining=False)
    review = await stack.ended(submitted)
    assert (review.state, review.model) == (review_pb2.REVIEW_STATE_COMPLETED, "openai/b")
