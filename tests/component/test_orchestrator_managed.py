"""Managed keys: the operator's, for a tenant's reviews; chosen openly, and never a fallback."""

from __future__ import annotations

import grpc
import pytest
from byokeep import names
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2, grant_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2

from services.orchestrator.policy.keys import OPERATOR
from tests.harness.orchestrator import (
    PENDING,
    Stack,
    add_key_request,
    one_chunk,
    request_id,
    running,
    spiffe,
)

NEEDS_REKEY = custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY
REVOKED = custody_pb2.KEY_VERSION_STATE_REVOKED


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        yield started


async def custody(
    stack: Stack, client: str = "operator", *, managed: bool
) -> settings_pb2.Settings:
    response = await stack.client(client).settings.SetKeyCustody(
        settings_pb2.SetKeyCustodyRequest(
            tenant="tenants/acme", managed_keys=managed, request_id=request_id()
        )
    )
    return response.settings


async def bring(stack: Stack) -> key_pb2.Key:
    """Add a managed key as an operator, and wait for its verdict."""
    keys = stack.client("operator").keys
    added = (await keys.AddKey(add_key_request(user=OPERATOR, display_name="vendor"))).key
    request = key_pb2.WatchKeyRequest(name=added.provider_key.name)
    async for answer in keys.WatchKey(request):
        added = answer.key
    return added


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await call
    return told.value


async def test_an_operator_brings_a_key_that_reviews_run_on_and_the_tenant_sees(
    stack: Stack,
) -> None:
    key = await bring(stack)
    assert key.provider_key.owner == OPERATOR
    key_id = names.last_of(key.provider_key.name)
    stage = stack.keyvault.asked(custody_pb2.StageKeyRequest)[-1]
    # Sealed to the tenant and this owner; the operator acts, for nobody.
    assert (stage.owner, stage.actor) == (OPERATOR, spiffe("operator"))
    assert (await custody(stack, managed=True)).managed_keys
    stack.runner.default = one_chunk
    review = await stack.ended(await stack.submit(user="ann"))
    assert (review.state, review.key_id) == (review_pb2.REVIEW_STATE_COMPLETED, key_id)
    assert review.managed_key
    grant = grant_pb2.Grant.FromString(stack.runner.talks[-1].proceed.grant.payload)
    # In the tenant's own chain, and with who asked for it.
    assert (grant.tenant, grant.owner, grant.review_id) == (
        "acme",
        OPERATOR,
        names.last_of(review.name),
    )
    assert grant.actor == f"{spiffe('acme')}#ann"
    listing = await stack.client("acme").keys.ListKeys(
        key_pb2.ListKeysRequest(parent="tenants/acme")
    )
    assert [one.provider_key.owner for one in listing.keys] == [OPERATOR]
    models = await stack.client("acme").settings.ListModels(
        settings_pb2.ListModelsRequest(parent="tenants/acme")
    )
    assert models.models[0].key_ids == [key_id]


async def test_neither_stands_in_for_the_other(stack: Stack) -> None:
    own = stack.keyvault.add("acme")
    managed = names.last_of((await bring(stack)).provider_key.name)
    stack.runner.default = one_chunk
    review = await stack.ended(await stack.submit())
    assert (review.key_id, review.managed_key) == (own, False)
    stack.keyvault.set_state("acme", own, NEEDS_REKEY)
    error = await refused(stack.submit())
    assert error_info(error).reason == "KEY_NEEDS_REKEY"
    await custody(stack, managed=True)
    review = await stack.ended(await stack.submit())
    assert (review.key_id, review.managed_key) == (managed, True)
    stack.keyvault.set_state("acme", own, custody_pb2.KEY_VERSION_STATE_ACTIVE)
    stack.keyvault.set_state("acme", managed, REVOKED)
    error = await refused(stack.submit())
    assert error_info(error).reason == "NO_ACTIVE_KEY"
    assert "managed" in error_info(error).message
    await custody(stack, managed=False)
    assert (await stack.submit()).key_id == own


async def test_what_waits_for_a_managed_key_says_whose_it_is(stack: Stack) -> None:
    managed = names.last_of((await bring(stack)).provider_key.name)
    await custody(stack, managed=True)
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    review = await stack.submit()
    await stack.sql(
        "INSERT INTO pause (tenant, key_id, reason, until)"
        " VALUES ('acme', %s, 'KEY_NEEDS_REKEY', 'infinity')",
        managed,
    )
    waits = await stack.waiting(review, "KEY_NEEDS_REKEY")
    assert waits.wait.message.endswith("The key is managed: ask the operator of the deployment.")


def changes(name: str) -> list:
    """Each change of a key, as (method, request)."""
    sealed = add_key_request().sealed_key
    chosen = {"name": name, "request_id": request_id()}
    return [
        ("RotateKey", key_pb2.RotateKeyRequest(sealed_key=sealed, **chosen)),
        ("CheckKey", key_pb2.CheckKeyRequest(**chosen)),
        ("RollBackKey", key_pb2.RollBackKeyRequest(**chosen)),
        ("RevokeKey", key_pb2.RevokeKeyRequest(**chosen)),
        ("DestroyKey", key_pb2.DestroyKeyRequest(**chosen)),
    ]


async def test_operators_and_key_admins_change_each_their_own(stack: Stack) -> None:
    """Shown to fail without each half of `require_key_owner`."""
    own = names.key_name("acme", stack.keyvault.add("acme"))
    managed = (await bring(stack)).provider_key.name
    for client, name in (("operator", own), ("acme", managed)):
        for method, request in changes(name):
            error = await refused(getattr(stack.client(client).keys, method)(request))
            assert error_info(error).reason == "TENANT_NOT_ALLOWED", (client, method)
    for client, user in (("operator", ""), ("operator", "ann"), ("acme", OPERATOR)):
        request = add_key_request(user=user, display_name="more")
        error = await refused(stack.client(client).keys.AddKey(request))
        assert error_info(error).reason == "TENANT_NOT_ALLOWED", (client, user)
    error = await refused(custody(stack, "acme", managed=True))
    assert error_info(error).reason == "TENANT_NOT_ALLOWED"
    states = {key.state for key in stack.keyvault.keys.values()}
    assert states == {custody_pb2.KEY_VERSION_STATE_ACTIVE}
    assert not [
        one for one in stack.keyvault.calls if isinstance(one, custody_pb2.RevokeKeyRequest)
    ]


async def test_operators_see_managed_keys_alone(stack: Stack) -> None:
    own = names.key_name("acme", stack.keyvault.add("acme"))
    managed = (await bring(stack)).provider_key.name
    keys = stack.client("operator").keys
    listing = await keys.ListKeys(key_pb2.ListKeysRequest(parent="tenants/acme"))
    assert [one.provider_key.name for one in listing.keys] == [managed]
    error = await refused(keys.GetKey(key_pb2.GetKeyRequest(name=own)))
    assert error_info(error).reason == "TENANT_NOT_ALLOWED"
    # A key that keyvault can't show may be anybody's: an operator ends none.
    gone = names.key_name("acme", "key_" + "0" * 26)
    request = key_pb2.RevokeKeyRequest(name=gone, request_id=request_id())
    assert error_info(await refused(keys.RevokeKey(request))).reason == "TENANT_NOT_ALLOWED"


async def test_no_user_is_called_the_operator(stack: Stack) -> None:
    """Who may speak for users runs no review on a managed key by the name of its owner."""
    await bring(stack)
    error = await refused(stack.submit(user=OPERATOR))
    assert error_info(error).reason == "INVALID_FIELD"


async def test_a_managed_key_is_no_part_of_the_plan(stack: Stack) -> None:
    await stack.tenant("small", plan="starter")
    request = add_key_request("small", user=OPERATOR, display_name="vendor")
    added = await stack.client("operator").keys.AddKey(request)
    assert added.key.provider_key.state == PENDING
    await stack.add_key("small", display_name="own")
