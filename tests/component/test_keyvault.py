"""keyvault from sealed intake to release, over real mTLS and PostgreSQL."""

from __future__ import annotations

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, grant_pb2, lease_pb2

from tests.harness import keyvault as kv


@pytest.fixture
async def keyvault(tmp_path, keyvault_database_url):
    async with kv.running(kv.Deployment(tmp_path, keyvault_database_url)) as running:
        await running.create_tenant()
        yield running


def reason(error: pytest.ExceptionInfo) -> str:
    return error_info(error.value).reason


async def lease(keyvault, key, **changes):
    child = kv.Child()
    request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child, **changes), child)
    return child, request, await keyvault.leases().LeaseKey(request)


@pytest.mark.parametrize("suite", [kv.hpke.HYBRID_V1, kv.hpke.X25519_V1])
async def test_a_key_goes_in_sealed_and_comes_out_sealed_to_one_child(keyvault, suite):
    key = await keyvault.add_active()
    child = kv.Child(suite)
    request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
    answer = await keyvault.leases().LeaseKey(request)
    assert child.open(request, answer) == kv.PROVIDER_KEY
    assert key.hint == "sk-proj-..." + kv.PROVIDER_KEY[-4:]


async def test_the_trail_has_every_step(keyvault):
    key = await keyvault.add_active()
    _, _, answer = await lease(keyvault, key)
    report = lease_pb2.PlaintextReport(process_id=7)
    await keyvault.leases().ReleaseLease(
        lease_pb2.ReleaseLeaseRequest(
            lease_id=answer.lease_id,
            outcome=lease_pb2.LEASE_OUTCOME_COMPLETED,
            report=report,
        )
    )
    kinds = [event.type for event in await keyvault.events()]
    assert kinds == [
        audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED,
        audit_pb2.AUDIT_EVENT_TYPE_STAGED,
        audit_pb2.AUDIT_EVENT_TYPE_PROMOTED,
        audit_pb2.AUDIT_EVENT_TYPE_LEASED,
        audit_pb2.AUDIT_EVENT_TYPE_RELEASED,
    ]
    assert (await keyvault.events())[-1].report.process_id == 7


async def test_a_pending_version_is_leased_for_validation_alone(keyvault):
    key = await keyvault.stage()
    await lease(keyvault, key, purpose=grant_pb2.LEASE_PURPOSE_VALIDATION)
    with pytest.raises(grpc.RpcError) as error:
        await lease(keyvault, key, purpose=grant_pb2.LEASE_PURPOSE_REVIEW)
    assert reason(error) == "WRONG_STATE"


async def test_a_rejected_key_needs_rekey_until_a_new_version_is_promoted(keyvault):
    """Rejected where its model list was asked for: a validation of the version that serves."""
    key = await keyvault.add_active()
    _, _, answer = await lease(keyvault, key, purpose=grant_pb2.LEASE_PURPOSE_VALIDATION)
    await keyvault.leases().ReleaseLease(
        lease_pb2.ReleaseLeaseRequest(
            lease_id=answer.lease_id, outcome=lease_pb2.LEASE_OUTCOME_KEY_REJECTED
        )
    )
    with pytest.raises(grpc.RpcError) as error:
        await lease(keyvault, key)
    assert reason(error) == "KEY_NEEDS_REKEY"
    rotated = await keyvault.stage(
        "sk-proj-" + "z" * 40, key_id=key.name.split("/")[3], operation="rotate"
    )
    promoted = await keyvault.promote(rotated.name, 2)
    child, request, answer = await lease(keyvault, promoted)
    assert child.open(request, answer) == "sk-proj-" + "z" * 40


async def test_a_single_rejected_review_does_not_retire_a_key(keyvault):
    """It may be the provider's passing fault. Shown to fail where a review's release marks it."""
    key = await keyvault.add_active()
    _, _, answer = await lease(keyvault, key)
    await keyvault.leases().ReleaseLease(
        lease_pb2.ReleaseLeaseRequest(
            lease_id=answer.lease_id, outcome=lease_pb2.LEASE_OUTCOME_KEY_REJECTED
        )
    )
    await lease(keyvault, key)


async def test_rotation_serves_the_old_version_until_promotion_and_rolls_back(keyvault):
    key = await keyvault.add_active()
    staged = await keyvault.stage(
        "sk-proj-" + "n" * 40, key_id=key.name.split("/")[3], operation="rotate"
    )
    assert (staged.active_version, staged.state) == (1, custody_pb2.KEY_VERSION_STATE_ACTIVE)
    promoted = await keyvault.promote(staged.name, 2)
    assert [one.state for one in promoted.versions] == [
        custody_pb2.KEY_VERSION_STATE_SUPERSEDED,
        custody_pb2.KEY_VERSION_STATE_ACTIVE,
    ]
    back = await keyvault.change("RollBackKey", key.name)
    assert back.active_version == 1
    child, request, answer = await lease(keyvault, back)
    assert child.open(request, answer) == kv.PROVIDER_KEY


@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("RevokeKey", custody_pb2.KEY_VERSION_STATE_REVOKED),
        ("DestroyKey", custody_pb2.KEY_VERSION_STATE_DESTROYED),
    ],
)
async def test_a_key_that_is_gone_gives_no_lease(keyvault, method, state):
    key = await keyvault.add_active()
    gone = await keyvault.change(method, key.name)
    assert gone.state == state
    with pytest.raises(grpc.RpcError) as error:
        await lease(keyvault, key)
    assert reason(error) == "WRONG_STATE"
    assert (await keyvault.change(method, key.name)).state == state


async def test_a_revoked_key_is_not_said_to_be_destroyed(keyvault):
    key = await keyvault.add_active()
    staged = await keyvault.stage(key_id=key.name.split("/")[3], operation="rotate")
    await keyvault.change("DestroyKeyVersion", key.name, version=staged.versions[-1].version)
    gone = await keyvault.change("RevokeKey", key.name)
    assert gone.state == custody_pb2.KEY_VERSION_STATE_REVOKED


async def test_destroying_deletes_the_ciphertext_and_frees_the_name(keyvault):
    key = await keyvault.add_active()
    await keyvault.change("DestroyKey", key.name)
    assert await keyvault.sql("SELECT count(*) FROM key_secret") == [(0,)]
    assert (await keyvault.add_active()).state == custody_pb2.KEY_VERSION_STATE_ACTIVE


async def test_the_same_request_gives_the_same_answer_and_other_content_a_conflict(keyvault):
    request = await keyvault.stage_request()
    first = await keyvault.custody.StageKey(request)
    again = await keyvault.custody.StageKey(request)
    assert again == first
    other = await keyvault.stage_request()
    other.request_id, other.name = request.request_id, request.name
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.custody.StageKey(other)
    assert reason(error) == "REQUEST_ID_CONFLICT"


async def test_adding_over_a_name_names_rotate(keyvault):
    await keyvault.stage()
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.stage()
    info = error_info(error.value)
    assert (info.code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "KEY_EXISTS")
    assert "rotate it" in info.message
    assert set(info.metadata) == {"key"}


async def test_a_tenant_without_a_kek_is_told_what_to_do(keyvault):
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.stage(tenant="other")
    assert reason(error) == "TENANT_KEY_MISSING"


async def test_revocation_reaches_the_watcher_that_holds_the_lease(keyvault):
    key = await keyvault.add_active()
    _, _, answer = await lease(keyvault, key)
    stream = keyvault.leases().WatchRevocations(lease_pb2.WatchRevocationsRequest())
    first = await stream.read()
    assert list(first.resync.live_lease_ids) == [answer.lease_id]
    await keyvault.change("RevokeKey", key.name)
    seen: list[str] = []
    for _ in range(8):
        seen += (await stream.read()).revocation.lease_ids
    assert seen == [answer.lease_id]
    stream.cancel()


async def test_another_runner_can_not_release_a_lease(keyvault):
    key = await keyvault.add_active()
    _, _, answer = await lease(keyvault, key)
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.leases("sibling").ReleaseLease(
            lease_pb2.ReleaseLeaseRequest(
                lease_id=answer.lease_id, outcome=lease_pb2.LEASE_OUTCOME_KEY_REJECTED
            )
        )
    assert reason(error) == "NOT_FOUND"


async def test_pages_of_keys_are_whole_and_without_repeats(keyvault):
    names = {(await keyvault.stage(name=f"n{i}")).name for i in range(5)}
    seen, token = [], ""
    while True:
        page = await keyvault.custody.ListKeys(
            custody_pb2.ListKeysRequest(parent="tenants/acme", page_size=2, page_token=token)
        )
        seen += [key.name for key in page.keys]
        token = page.next_page_token
        if not token:
            break
    assert seen == sorted(names)


async def test_shredding_a_tenant_leaves_nothing_to_open(keyvault):
    key = await keyvault.add_active()
    answer = await keyvault.admin.ShredTenant(
        kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    assert (answer.destroyed_versions, answer.shred) == (1, "none")
    listed = await keyvault.admin.ListTenantKeys(kv.admin_pb2.ListTenantKeysRequest())
    states = {one.tenant: (len(one.holdings), one.kek_destroyed) for one in listed.tenant_keys}
    assert states["tenants/acme"] == (0, True)
    with pytest.raises(grpc.RpcError):
        await lease(keyvault, key)
    assert (await keyvault.events())[-1].type == audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED
