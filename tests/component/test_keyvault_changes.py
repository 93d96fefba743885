"""Changes of keys asked twice, and at the same time: request ids and etags, in keyvault itself."""

from __future__ import annotations

import asyncio

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2

from tests.harness import keyvault as kv


@pytest.fixture
async def keyvault(tmp_path, keyvault_database_url):
    async with kv.running(kv.Deployment(tmp_path, keyvault_database_url)) as running:
        await running.create_tenant()
        yield running


async def rotated(keyvault, key, **changes):
    return await keyvault.add_active(
        "sk-proj-" + "n" * 40, key_id=key.name.split("/")[3], operation="rotate", **changes
    )


def request_for(method: str, name: str, **fields):
    chosen = {"name": name, "request_id": new_id("req"), "actor": "test"}
    return getattr(custody_pb2, f"{method}KeyRequest")(**(chosen | fields))


async def call(keyvault, method: str, request):
    return (await getattr(keyvault.custody, f"{method}Key")(request)).key


async def test_a_retried_change_changes_nothing_more(keyvault):
    """A rollback whose answer was lost is not refused, and later does not undo a rotation.

    Shown to fail where a request that came before is carried out again.
    """
    key = await rotated(keyvault, await keyvault.add_active())
    request = request_for("RollBack", key.name, etag=key.etag)
    back = await call(keyvault, "RollBack", request)
    assert await call(keyvault, "RollBack", request) == back
    newest = await rotated(keyvault, back)
    assert await call(keyvault, "RollBack", request) == newest
    assert newest.active_version == 3


@pytest.mark.parametrize("method", ["Revoke", "Destroy", "RollBack"])
async def test_of_two_changes_of_one_state_the_second_is_refused(keyvault, method):
    """Shown to fail with an etag that is not compared under the chain's lock."""
    key = await rotated(keyvault, await keyvault.add_active())
    requests = [request_for(method, key.name, etag=key.etag) for _ in range(2)]
    reasons = await asyncio.gather(
        *(kv.refusal(getattr(keyvault.custody, f"{method}Key")(one)) for one in requests)
    )
    assert sorted(reasons) == ["", "ETAG_MISMATCH"]
    refused = requests[reasons.index("ETAG_MISMATCH")]
    again = await kv.refusal(getattr(keyvault.custody, f"{method}Key")(refused))
    assert again == "ETAG_MISMATCH"


async def test_a_stale_rotation_is_refused(keyvault):
    """Shown to fail with a rotation whose etag is not compared."""
    first = await keyvault.add_active()
    now = await rotated(keyvault, first)
    key_id = first.name.split("/")[3]
    request = await keyvault.stage_request(key_id=key_id, operation="rotate")
    request.etag = first.etag
    for _ in range(2):
        assert await kv.refusal(keyvault.custody.StageKey(request)) == "ETAG_MISMATCH"
    fresh = await keyvault.stage_request(key_id=key_id, operation="rotate")
    fresh.etag = now.etag
    staged = await keyvault.custody.StageKey(fresh)
    assert await keyvault.custody.StageKey(fresh) == staged


@pytest.mark.parametrize("other", [{"actor": "another"}, {"etag": "1"}])
async def test_a_request_id_with_other_content_is_refused(keyvault, other):
    """Shown to fail where the id alone tells a retry."""
    key = await keyvault.add_active()
    request = request_for("Revoke", key.name)
    await call(keyvault, "Revoke", request)
    changed = request_for("Revoke", key.name, request_id=request.request_id, **other)
    assert await kv.refusal(keyvault.custody.RevokeKey(changed)) == "REQUEST_ID_CONFLICT"
    otherwise = request_for("Destroy", key.name, request_id=request.request_id)
    assert await kv.refusal(keyvault.custody.DestroyKey(otherwise)) == "REQUEST_ID_CONFLICT"


async def test_requests_are_forgotten_after_a_week(keyvault):
    key = await keyvault.add_active()
    await keyvault.change("RevokeKey", key.name)
    await keyvault.sql(
        "UPDATE change_request SET create_time = now() - interval '8 days'"
        " WHERE request_id = (SELECT min(request_id) FROM change_request)"
    )
    before = await keyvault.sql("SELECT count(*) FROM change_request")
    await keyvault.app._custody.forget()
    assert (before, await keyvault.sql("SELECT count(*) FROM change_request")) == (
        [(2,)],
        [(1,)],
    )
