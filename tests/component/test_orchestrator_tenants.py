"""Tenants, callers and settings; and that the schema is what the models say."""

from __future__ import annotations

import asyncio

import grpc
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from byokeep.errors import error_info
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2
from sqlalchemy import create_engine

from services.orchestrator.migrate import migrate
from services.orchestrator.store.schema import metadata
from tests.harness.orchestrator import DIFF, Conversation, Stack, request_id, running, spiffe


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        yield started


def reason_of(refused: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> str:
    return error_info(refused.value).reason


def test_models_and_migrations_agree(empty_database_url) -> None:
    empty = empty_database_url("orchestrator")
    migrate(empty)
    migrate(empty)  # a second time changes nothing
    engine = create_engine(empty.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        assert compare_metadata(context, metadata) == []
    engine.dispose()


async def test_create_is_idempotent_and_ids_are_given_once(stack: Stack) -> None:
    tenants = stack.client("operator").tenants
    request = tenant_pb2.CreateTenantRequest(name="tenants/new", request_id=request_id())
    first = await tenants.CreateTenant(request)
    assert first.tenant.plan == "team"
    assert first == await tenants.CreateTenant(request)
    request.plan = "enterprise"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await tenants.CreateTenant(request)
    assert reason_of(refused) == "REQUEST_ID_CONFLICT"
    request.request_id = request_id()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await tenants.CreateTenant(request)
    assert reason_of(refused) == "TENANT_EXISTS"


async def test_list_shows_each_caller_its_own(stack: Stack) -> None:
    for name in ("bolt", "cord"):
        await stack.tenant(name)
    everything = await stack.client("operator").tenants.ListTenants(
        tenant_pb2.ListTenantsRequest(page_size=2)
    )
    assert [one.name for one in everything.tenants] == ["tenants/acme", "tenants/bolt"]
    rest = await stack.client("operator").tenants.ListTenants(
        tenant_pb2.ListTenantsRequest(page_size=2, page_token=everything.next_page_token)
    )
    assert [one.name for one in rest.tenants] == ["tenants/cord"]
    own = await stack.client("bolt").tenants.ListTenants(tenant_pb2.ListTenantsRequest())
    assert [one.name for one in own.tenants] == ["tenants/bolt"]


async def test_anybody_may_know_the_plans(stack: Stack) -> None:
    client = stack.client("nobody").tenants
    request = tenant_pb2.ListPlansRequest(page_size=2)
    first = await client.ListPlans(request)
    request.page_token = first.next_page_token
    plans = [*first.plans, *(await client.ListPlans(request)).plans]
    assert [one.name for one in plans] == ["enterprise", "starter", "team"]
    assert [one.name for one in plans if one.default] == ["team"]
    starter = plans[1]
    assert (starter.attempts_in_flight, starter.keys_per_provider) == (2, 1)
    assert not starter.features
    assert list(plans[0].features) == ["model-overrides", "user-keys"]


async def test_suspended_tenant_takes_nothing_new_and_shows_the_old(stack: Stack) -> None:
    stack.keyvault.add("acme")
    review = await stack.ended(await stack.submit())
    tenants = stack.client("operator").tenants
    await tenants.SuspendTenant(
        tenant_pb2.SuspendTenantRequest(name="tenants/acme", request_id=request_id())
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    assert reason_of(refused) == "TENANT_NOT_ACTIVE"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.DryRunReview(
            review_pb2.DryRunReviewRequest(
                parent="tenants/acme",
                input=review_pb2.ReviewInput(repository="acme/shop", diff=DIFF),
            )
        )
    assert reason_of(refused) == "TENANT_NOT_ACTIVE"
    shown = await stack.client("acme").reviews.GetReview(
        review_pb2.GetReviewRequest(name=review.name)
    )
    assert shown.review == review
    await tenants.SuspendTenant(
        tenant_pb2.SuspendTenantRequest(name="tenants/acme", resume=True, request_id=request_id())
    )
    await stack.submit()


async def test_a_deletion_that_broke_off_is_finished(stack: Stack, monkeypatch) -> None:
    """A tenant with thousands of reviews, keyvault away in the middle. Shown to fail where the
    sweeper looks after its keys alone: the reviews stayed."""
    await stack.sql(
        "INSERT INTO review (id, tenant, repository, model, key_id, actor)"
        " SELECT 'rev_' || n, 'acme', 'acme/shop', 'openai/m', 'key_1', 'me'"
        " FROM generate_series(1, 3000) n"
    )
    await stack.sql(
        "INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, due_time)"
        " SELECT 'att_' || n, 'REVIEW', 'acme', 'rev_' || n, 'key_1', 1, 'infinity'"
        " FROM generate_series(1, 3000) n"
    )
    stack.keyvault.away = True
    request = tenant_pb2.DeleteTenantRequest(name="tenants/acme", request_id=request_id())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("operator").tenants.DeleteTenant(request)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert await stack.sql("SELECT 1 FROM review WHERE state <> 'CANCELLED'") == []
    stack.keyvault.away = False
    await stack.app.sweeper.deletions()
    assert await stack.table("review") == await stack.table("attempt") == []
    # A call that began before may still store something: it is looked at for ten minutes.
    assert await stack.app.tenants.unerased() == ["acme"]
    await stack.sql("UPDATE tenant SET delete_time = now() - interval '11 minutes'")
    await stack.app.sweeper.deletions()
    assert await stack.app.tenants.unerased() == []


async def test_deleted_tenant_leaves_its_id_alone(stack: Stack) -> None:
    async def endless(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.cancelled.wait()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST)

    stack.keyvault.add("acme")
    stack.keyvault.add("acme", display_name="other")
    stack.runner.default = endless
    await stack.submit()
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING'")
    tenants = stack.client("operator").tenants
    request = tenant_pb2.DeleteTenantRequest(name="tenants/acme", request_id=request_id())
    assert (await tenants.DeleteTenant(request)).destroyed_keys == 2
    assert (await tenants.DeleteTenant(request)).destroyed_keys == 0
    for table in metadata.tables.values():
        left = len(await stack.table(table.name))
        assert left == (1 if table.name == "tenant" else 0), table.name
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    assert reason_of(refused) == "TENANT_NOT_ALLOWED"
    for call, message in (
        (tenants.CreateTenant, tenant_pb2.CreateTenantRequest(name="tenants/acme")),
        (tenants.SuspendTenant, tenant_pb2.SuspendTenantRequest(name="tenants/acme")),
    ):
        message.request_id = request_id()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(message)
        assert reason_of(refused) in ("TENANT_EXISTS", "WRONG_STATE")
    # Whoever may know that it was there is told what became of it.
    with pytest.raises(grpc.aio.AioRpcError, match="the tenant is deleted") as refused:
        await stack.client("operator").keys.ListKeys(key_pb2.ListKeysRequest(parent="tenants/acme"))
    assert reason_of(refused) == "WRONG_STATE"


async def test_caller_that_is_allowed_while_the_tenant_is_deleted_is_refused(stack: Stack) -> None:
    """Shown to fail where only what was read of the tenant before is looked at."""
    caller = tenant_pb2.Caller(spiffe_id=spiffe("late"), roles=[1])
    request = tenant_pb2.AllowCallerRequest(
        parent="tenants/acme", request_id=request_id(), caller=caller
    )
    async with await psycopg.AsyncConnection.connect(stack.database_url) as connection:
        await connection.execute("UPDATE tenant SET state = 'DELETED' WHERE id = 'acme'")
        call = stack.client("operator").callers.AllowCaller(request)
        allowing = asyncio.ensure_future(_answer(call))
        await stack.until("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allowing
    assert error_info(refused.value).reason == "WRONG_STATE"
    assert await stack.sql("SELECT 1 FROM caller WHERE spiffe_id = %s", spiffe("late")) == []


async def _answer(call):
    return await call


async def test_allow_replaces_and_deny_takes_all(stack: Stack) -> None:
    callers = stack.client("operator").callers
    bot = tenant_pb2.Caller(spiffe_id=spiffe("bot"), roles=[1, 3])

    async def allow(caller: tenant_pb2.Caller) -> None:
        await callers.AllowCaller(
            tenant_pb2.AllowCallerRequest(
                parent="tenants/acme", caller=caller, request_id=request_id()
            )
        )

    await allow(bot)
    bot.roles[:] = [1]
    bot.may_assert_users = True
    await allow(bot)
    request = tenant_pb2.ListCallersRequest(parent="tenants/acme")
    listed = await callers.ListCallers(request)
    assert [one.spiffe_id for one in listed.callers] == [spiffe("acme"), spiffe("bot")]
    assert listed.callers[1] == bot
    await callers.DenyCaller(
        tenant_pb2.DenyCallerRequest(
            parent="tenants/acme", spiffe_id=bot.spiffe_id, request_id=request_id()
        )
    )
    assert len((await callers.ListCallers(request)).callers) == 1


@pytest.mark.parametrize(
    "caller",
    [
        {"spiffe_id": "spiffe://elsewhere.test/client/bot", "roles": [1]},
        {"spiffe_id": "spiffe://byokeep.test/", "roles": [1]},
        {"spiffe_id": "spiffe://byokeep.test/a", "roles": []},
        {"spiffe_id": "spiffe://byokeep.test/a", "roles": [0]},
        {"spiffe_id": "spiffe://byokeep.test/a", "roles": [9]},
    ],
)
async def test_malformed_callers_are_refused(stack: Stack, caller) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("operator").callers.AllowCaller(
            tenant_pb2.AllowCallerRequest(
                parent="tenants/acme", caller=tenant_pb2.Caller(**caller), request_id=request_id()
            )
        )
    assert reason_of(refused) == "INVALID_FIELD"


def update(paths: list[str], **values) -> settings_pb2.UpdateSettingsRequest:
    chosen = {"name": "tenants/acme/settings"} | values
    return settings_pb2.UpdateSettingsRequest(
        settings=settings_pb2.Settings(**chosen),
        update_mask={"paths": paths},
        request_id=request_id(),
    )


async def test_settings_change_by_mask_and_etag(stack: Stack) -> None:
    client = stack.client("acme").settings
    before = (
        await client.GetSettings(settings_pb2.GetSettingsRequest(name="tenants/acme/settings"))
    ).settings
    request = update(
        ["default_model"], default_model="openai/m", max_diff_bytes=7, etag=before.etag
    )
    after = (await client.UpdateSettings(request)).settings
    assert (after.default_model, after.max_diff_bytes) == ("openai/m", 0)
    assert after.etag != before.etag
    assert (await client.UpdateSettings(request)).settings == after  # a retry
    request.request_id = request_id()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.UpdateSettings(request)
    assert reason_of(refused) == "ETAG_MISMATCH"


@pytest.mark.parametrize(
    "request_",
    [
        update(["plan"], plan="enterprise"),
        update([]),
        update(["default_model"], default_model="x"),
        update(["max_diff_bytes"], max_diff_bytes=5_000_000),
        update(["max_diff_bytes"], name="tenants/acme/reviews"),
        update(["max_diff_bytes"], name="acme"),
    ],
)
async def test_malformed_settings_are_refused(stack: Stack, request_) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").settings.UpdateSettings(request_)
    assert reason_of(refused) == "INVALID_FIELD"


@pytest.mark.parametrize(
    ("ceiling", "most"),
    [
        ("max_diff_bytes", 2 * 1024 * 1024),
        ("max_calls_per_review", 20),
        ("max_reviews_per_day", 10_000),
    ],
)
async def test_no_ceiling_of_a_tenant_is_above_the_deployments(stack: Stack, ceiling, most) -> None:
    """Shown to fail without the comparison in UpdateSettings, and without `min` in `ceilings`."""
    client = stack.client("acme").settings
    with pytest.raises(grpc.aio.AioRpcError, match=f"at most {most:,}") as refused:
        await client.UpdateSettings(update([ceiling], **{ceiling: most + 1}))
    assert error_info(refused.value).metadata["field"] == f"settings.{ceiling}"
    changed = (await client.UpdateSettings(update([ceiling], **{ceiling: most}))).settings
    assert getattr(changed, ceiling) == getattr(changed.in_force, ceiling) == most
    # The deployment's was lowered since.
    await stack.sql(f"UPDATE tenant SET {ceiling} = {most + 1} RETURNING 1")
    request = settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
    assert getattr((await client.GetSettings(request)).settings.in_force, ceiling) == most


async def test_overrides_are_an_entitlement(stack: Stack) -> None:
    client = stack.client("acme").settings

    async def override(model: str) -> settings_pb2.Settings:
        response = await client.SetModelOverride(
            settings_pb2.SetModelOverrideRequest(
                parent="tenants/acme",
                repository_pattern="acme/*",
                model=model,
                request_id=request_id(),
            )
        )
        return response.settings

    assert len((await override("openai/a")).model_overrides) == 1
    assert [one.model for one in (await override("openai/b")).model_overrides] == ["openai/b"]
    await stack.client("operator").settings.SetPlan(
        settings_pb2.SetPlanRequest(tenant="tenants/acme", plan="starter", request_id=request_id())
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await override("openai/c")
    info = error_info(refused.value)
    assert (info.code, info.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PLAN_LACKS_FEATURE")
    assert info.metadata == {"feature": "model-overrides", "plan": "starter"}
    stack.keyvault.add("acme")
    assert (await stack.submit()).model == "openai/gpt-6.1-terra"  # it has no effect any more
    assert list((await override("")).model_overrides) == []


async def test_plans_are_the_operators_data(orchestrator_database_url, tmp_path) -> None:
    own = tmp_path / "plans.toml"
    own.write_text(
        "[plans.pro]\nattempts_in_flight = 1\nreviews_per_day = 7\nreviews_waiting = 5\n"
        "keys_per_provider = 0\nfeatures = []\n"
    )
    async with running(orchestrator_database_url, tmp_path, plans_file=own) as stack:
        await stack.tenant(plan="pro")
        settings = stack.client("acme").settings
        request = settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
        found = (await settings.GetSettings(request)).settings
        assert (found.plan, found.in_force.max_reviews_per_day) == ("pro", 7)
        with pytest.raises(grpc.aio.AioRpcError, match="starter, team, enterprise, pro") as refused:
            await stack.client("operator").settings.SetPlan(
                settings_pb2.SetPlanRequest(
                    tenant="tenants/acme", plan="gold", request_id=request_id()
                )
            )
        assert reason_of(refused) == "INVALID_FIELD"
    # The operator took it out of the file: reviews go on, as the default plan has it.
    async with running(orchestrator_database_url, tmp_path) as stack:
        stack.keyvault.add("acme")
        assert (await stack.ended(await stack.submit())).state == review_pb2.REVIEW_STATE_COMPLETED
        found = (await stack.client("acme").settings.GetSettings(request)).settings
        assert (found.plan, found.in_force.max_reviews_per_day) == ("pro", 10_000)
