"""27. confused_deputy, the tenant's part: a tenant, owner or user that the calling service may not
speak for → denied."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from byokeep import names
from byokeep.common.v1 import options_pb2
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import (
    key_pb2,
    review_pb2,
    settings_pb2,
    tenant_pb2,
)
from google.protobuf.message import Message

from tests.harness.orchestrator import (
    DIFF,
    Conversation,
    Stack,
    add_key_request,
    request_id,
    running,
    spiffe,
)

KEY = "key_" + "0" * 26
REVIEW = "rev_" + "0" * 26
MODULES = (tenant_pb2, key_pb2, settings_pb2, review_pb2)
METHODS = {
    f"{service.name}/{method.name}": method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
STUBS = {
    "TenantService": "tenants",
    "CallerService": "callers",
    "KeyService": "keys",
    "SettingsService": "settings",
    "ReviewService": "reviews",
}


def request_for(method: str, tenant: str) -> Message:
    """A valid request of a method for a tenant."""
    parent, rid = f"tenants/{tenant}", request_id()
    key, review = f"{parent}/providerKeys/{KEY}", f"{parent}/reviews/{REVIEW}"
    settings = f"{parent}/settings"
    sealed = add_key_request().sealed_key
    wanted = review_pb2.ReviewInput(repository="a/b", diff=DIFF)
    values: dict[str, dict[str, Any]] = {
        "CreateTenant": {"name": parent, "request_id": rid},
        "SuspendTenant": {"name": parent, "request_id": rid},
        "DeleteTenant": {"name": parent, "request_id": rid},
        "AllowCaller": {
            "parent": parent,
            "request_id": rid,
            "caller": {"spiffe_id": spiffe("bot"), "roles": [1]},
        },
        "DenyCaller": {"parent": parent, "request_id": rid, "spiffe_id": spiffe("bot")},
        "ListCallers": {"parent": parent},
        "GetIntakeKey": {"parent": parent, "suite": 1},
        "RotateKey": {"name": key, "sealed_key": sealed, "request_id": rid},
        "CheckKey": {"name": key, "request_id": rid},
        "WatchKey": {"name": key},
        "GetKey": {"name": key},
        "ListKeys": {"parent": parent},
        "RevokeKey": {"name": key, "request_id": rid},
        "DestroyKey": {"name": key, "request_id": rid},
        "RollBackKey": {"name": key, "request_id": rid},
        "ListKeyUses": {"name": key},
        "GetSettings": {"name": settings},
        "UpdateSettings": {
            "settings": {"name": settings},
            "update_mask": {"paths": ["default_model"]},
            "request_id": rid,
        },
        "SetPlan": {"tenant": parent, "plan": "enterprise", "request_id": rid},
        "SetModelOverride": {
            "parent": parent,
            "repository_pattern": "*",
            "model": "openai/m",
            "request_id": rid,
        },
        "SetKeyCustody": {"tenant": parent, "request_id": rid},
        "SetRepositoryKey": {"parent": parent, "repository_pattern": "*", "request_id": rid},
        "ListModels": {"parent": parent},
        "SubmitReview": {"parent": parent, "input": wanted, "request_id": rid},
        "DryRunReview": {"parent": parent, "input": wanted},
        "GetReview": {"name": review},
        "ListReviews": {"parent": parent},
        "WatchReview": {"name": review},
        "CancelReview": {"name": review, "request_id": rid},
        "RetryReview": {"name": review, "request_id": rid},
        "CancelReviews": {"parent": parent, "filter": {"pull_request": 7}, "request_id": rid},
        "RetryReviews": {"parent": parent, "filter": {"pull_request": 7}, "request_id": rid},
        "DeleteReview": {"name": review, "request_id": rid},
        "ExportReview": {"name": review, "format": 1},
    }
    name = method.split("/")[1]
    if name == "AddKey":
        return add_key_request(tenant)
    module = next(one for one in MODULES if hasattr(one, f"{name}Request"))
    return getattr(module, f"{name}Request")(**values[name])


def roles_of(method: str) -> list[int]:
    return list(METHODS[method].GetOptions().Extensions[options_pb2.access].roles)


GUARDED = sorted(method for method in METHODS if roles_of(method))


async def call(stack: Stack, client: str, method: str, tenant: str) -> str:
    """Call a method; return the reason of its refusal, or an empty text."""
    service, name = method.split("/")
    stub = getattr(getattr(stack.client(client), STUBS[service]), name)
    request = request_for(method, tenant)
    try:
        if METHODS[method].server_streaming:
            async for _ in stub(request, timeout=5):
                return ""
        else:
            await stub(request, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error_info(error).reason
    return ""


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant("acme")
        await started.tenant("bolt")
        yield started


def test_all_but_two_methods_ask_for_a_role() -> None:
    """ListTenants tells each caller of its own tenants alone; plans are the deployment's, and no
    secret. Another method without roles belongs here with its reason."""
    unguarded = {"TenantService/ListTenants", "TenantService/ListPlans"}
    assert set(METHODS) - set(GUARDED) == unguarded


async def test_nobody_acts_for_a_tenant_that_did_not_allow_it(stack: Stack) -> None:
    """For every method. Shown by `if not held.intersection(access.roles)` replaced with
    `if False` in services/orchestrator/api/access.py: fails at the first method."""
    for method in GUARDED:
        for client, tenant in (("acme", "bolt"), ("stranger", "acme"), ("acme", "nowhere")):
            assert await call(stack, client, method, tenant) == "TENANT_NOT_ALLOWED", method
    # The sweeper lists keys by itself.
    asked = [one for one in stack.keyvault.calls if type(one) is not custody_pb2.ListKeysRequest]
    assert asked == []


async def test_a_role_allows_what_it_is_for_and_no_more(stack: Stack) -> None:
    """For every method and role. Shown by `access.roles` replaced with all roles in
    Authority.authorize: fails at the first method that a role is not for. Of keys, an operator may
    change managed ones alone (test_orchestrator_managed.py): these are not."""
    others = {f"KeyService/{name}" for name in ("AddKey", "RevokeKey", "DestroyKey")}
    for role in options_pb2.TenantRole.values()[1:]:
        await stack.tenant(f"t{role}", rights={f"only-{role}": ([role], False)})
        for method in GUARDED:
            reason = await call(stack, f"only-{role}", method, f"t{role}")
            allowed = role in roles_of(method)
            if role == options_pb2.TENANT_ROLE_OPERATOR and method in others:
                assert reason == "TENANT_NOT_ALLOWED", method
                continue
            assert (reason != "TENANT_NOT_ALLOWED") is allowed, (method, role)
            if method == "TenantService/DeleteTenant" and allowed:
                break  # in alphabetical order, the last one: its callers are gone


async def test_unknown_tenant_looks_forbidden_but_to_operators(stack: Stack) -> None:
    """Shown by the check for `found is None` put before the one for roles."""
    method = "TenantService/SuspendTenant"
    assert await call(stack, "acme", method, "nowhere") == "TENANT_NOT_ALLOWED"
    assert await call(stack, "operator", method, "nowhere") == "NOT_FOUND"
    assert await call(stack, "operator", "KeyService/ListKeyUses", "acme") == "TENANT_NOT_ALLOWED"


async def test_only_an_operator_makes_tenants(stack: Stack) -> None:
    """Shown by `creates` letting everyone in where no tenant is found. A tenant's own OPERATOR
    role is for that tenant alone."""
    await stack.tenant("held", rights={"held": ([4], False)})
    method = "TenantService/CreateTenant"
    assert await call(stack, "held", method, "fresh") == "TENANT_NOT_ALLOWED"
    assert await call(stack, "operator", method, "fresh") == ""


async def test_user_is_asserted_only_by_who_may(stack: Stack) -> None:
    """Shown by an empty body of Rights.require_user: the key is staged, the review taken."""
    await stack.tenant("duo", rights={"duo": ([1, 2], True), "plain": ([1, 2], False)})
    key_id = stack.keyvault.add("duo", owner="ann")
    plain, name = stack.client("plain"), f"tenants/duo/providerKeys/{key_id}"
    review = await stack.submit("duo", user="ann")
    await stack.sql("UPDATE review SET state = 'FAILED'")
    wanted = review_pb2.ReviewInput(repository="a/b", diff=DIFF, user="ann")
    rid = request_id()
    attempts = [
        plain.keys.AddKey(add_key_request("duo", user="ann")),
        plain.keys.GetKey(key_pb2.GetKeyRequest(name=name)),
        plain.keys.ListKeyUses(key_pb2.ListKeyUsesRequest(name=name)),
        plain.keys.RevokeKey(key_pb2.RevokeKeyRequest(name=name, request_id=rid)),
        plain.keys.DestroyKey(key_pb2.DestroyKeyRequest(name=name, request_id=rid)),
        plain.keys.RollBackKey(key_pb2.RollBackKeyRequest(name=name, request_id=rid)),
        plain.keys.RotateKey(
            key_pb2.RotateKeyRequest(
                name=name, request_id=rid, sealed_key=add_key_request().sealed_key
            )
        ),
        plain.reviews.SubmitReview(
            review_pb2.SubmitReviewRequest(parent="tenants/duo", input=wanted, request_id=rid)
        ),
        plain.reviews.DryRunReview(
            review_pb2.DryRunReviewRequest(parent="tenants/duo", input=wanted)
        ),
        plain.reviews.RetryReview(review_pb2.RetryReviewRequest(name=review.name, request_id=rid)),
    ]
    for attempt in attempts:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert error_info(refused.value).reason == "USER_ASSERTION_NOT_ALLOWED"
    assert stack.keyvault.asked(custody_pb2.StageKeyRequest) == []
    assert stack.keyvault.asked(custody_pb2.RevokeKeyRequest) == []
    assert stack.keyvault.asked(custody_pb2.DestroyKeyRequest) == []


async def test_review_of_a_user_is_for_who_speaks_for_users(stack: Stack) -> None:
    """Shown by empty bodies of Rights.require_reader and Rights.require_user, and by
    `of_users=True` in ListReviews."""
    await stack.tenant(
        "duo", rights={"duo": ([1, 2], True), "plain": ([1, 2], False), "audit": ([3], False)}
    )
    stack.keyvault.add("duo", owner="ann")
    stack.keyvault.add("duo")
    shared = await stack.ended(await stack.submit("duo"))
    private = await stack.ended(await stack.submit("duo", user="ann"))

    async def seen(client: str) -> list[str]:
        listed = await stack.client(client).reviews.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/duo")
        )
        return [one.name for one in listed.reviews]

    async def reads(client: str, name: str) -> list[str]:
        reviews = stack.client(client).reviews
        watched = reviews.WatchReview(review_pb2.WatchReviewRequest(name=name), timeout=10)
        return [
            await refusal(reviews.GetReview(review_pb2.GetReviewRequest(name=name))),
            await refusal(
                reviews.ExportReview(review_pb2.ExportReviewRequest(name=name, format=1))
            ),
            await refusal(watched.read()),
        ]

    assert await seen("duo") == await seen("audit") == [private.name, shared.name]
    assert await seen("plain") == [shared.name]
    for client, name in (("duo", private.name), ("audit", private.name), ("plain", shared.name)):
        assert await reads(client, name) == [""] * 3
    assert await reads("plain", private.name) == ["USER_ASSERTION_NOT_ALLOWED"] * 3
    await stack.sql("UPDATE review SET state = 'RUNNING'")
    plain = stack.client("plain").reviews
    for name, reason in ((private.name, "USER_ASSERTION_NOT_ALLOWED"), (shared.name, "")):
        request = review_pb2.CancelReviewRequest(name=name, request_id=request_id())
        assert await refusal(plain.CancelReview(request)) == reason


async def refusal(call: Awaitable[Any]) -> str:
    """The reason that a call is refused for, or an empty text."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_info(error).reason
    return ""


@pytest.mark.parametrize("kind", ["review", "key"])
async def test_watch_ends_with_the_right_to_it(stack: Stack, kind: str) -> None:
    """Shown by `access.again` returning `current()`: the stream goes on."""
    held = asyncio.Event()

    async def hold(talk: Conversation) -> None:
        await held.wait()

    stack.runner.default = hold
    client = stack.client("acme")
    watched: Any
    if kind == "review":
        stack.keyvault.add("acme")
        review = await stack.submit()
        await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING'")
        watched = client.reviews.WatchReview(review_pb2.WatchReviewRequest(name=review.name))
        name = review.name
    else:
        name = (await stack.add_key()).provider_key.name
        watched = client.keys.WatchKey(key_pb2.WatchKeyRequest(name=name))
    await watched.read()
    await stack.client("operator").callers.DenyCaller(
        tenant_pb2.DenyCallerRequest(
            parent="tenants/acme", spiffe_id=spiffe("acme"), request_id=request_id()
        )
    )
    await stack.sql("SELECT pg_notify(%s, %s)", f"byokeep_{kind}", names.last_of(name))
    async with asyncio.timeout(60):
        assert await refusal(watched.read()) == "TENANT_NOT_ALLOWED"
    held.set()


async def test_name_of_another_tenants_thing_finds_nothing(stack: Stack) -> None:
    """Shown by `review.tenant == tenant` left out of ReviewStore.get: acme reads bolt's review."""
    stack.keyvault.add("bolt")
    review = await stack.ended(await stack.submit("bolt"))
    stolen = review.name.replace("bolt", "acme")
    reviews = stack.client("acme").reviews
    rid = request_id()
    for attempt in (
        reviews.GetReview(review_pb2.GetReviewRequest(name=stolen)),
        reviews.CancelReview(review_pb2.CancelReviewRequest(name=stolen, request_id=rid)),
        reviews.RetryReview(review_pb2.RetryReviewRequest(name=stolen, request_id=rid)),
        reviews.ExportReview(review_pb2.ExportReviewRequest(name=stolen, format=1)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert error_info(refused.value).reason == "NOT_FOUND"


async def test_review_never_falls_back_to_the_key_of_another(stack: Stack) -> None:
    """Shown by the filter on `key.owner` left out of ReviewServicer._keys: the review runs."""
    stack.keyvault.add("acme", owner="ann")
    for user in ("", "bob"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.submit("acme", user=user)
        assert error_info(refused.value).reason == "NO_ACTIVE_KEY"
