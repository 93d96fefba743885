"""Changes of keys asked twice, and at the same time: request ids and etags, in keyvault itself."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2

from services.keyvault.custody import Request
from services.keyvault.ledger import ALL
from tests.harness import keyvault as kv
from tests.harness.rows import copied, edit_part, put_back


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
    """Shown to fail with an etag that is not compared under the tenant's lock."""
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


async def test_a_request_id_is_one_method_s_and_one_key_s(keyvault):
    """Whoever may choose an id can't block another's change with it.

    Shown to fail with notes that are found by tenant and id alone.
    """
    first = await keyvault.add_active()
    second = await keyvault.add_active("sk-ant-api03-" + "q" * 40, provider="anthropic")
    taken = f"destroy-{second.name.split('/')[3]}-1"
    for name in (first.name, second.name):
        await call(keyvault, "Revoke", request_for("Revoke", name, request_id=taken))
    verdict = custody_pb2.DestroyKeyVersionRequest(
        name=second.name, version=1, request_id=taken, actor="test"
    )
    destroyed = (await keyvault.custody.DestroyKeyVersion(verdict)).key
    assert destroyed.state == custody_pb2.KEY_VERSION_STATE_DESTROYED


@pytest.mark.parametrize("method", ["Revoke", "Destroy"])
async def test_a_planted_request_keeps_no_key_from_ending(keyvault, method):
    """A note that it was done already, planted by SQL, makes the tenant's state another one: the
    change is refused, and owed until what is stored is keyvault's again.

    Shown to fail with parts whose digests are not compared.
    """
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    request = request_for(method, key.name)
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    before = await copied(keyvault.app.database)

    def plant(part) -> None:
        planted = Request(f"{method}Key", request.request_id, digest, "").past()
        next(one for one in part.keys if one.key_id == key_id).requests.append(planted)

    await edit_part(keyvault.app.database, plant)
    refused = await kv.refusal(getattr(keyvault.custody, f"{method}Key")(request))
    assert refused == "STATE_TAMPERED"
    assert await kv.try_lease(keyvault, key) == "STATE_TAMPERED"
    await put_back(keyvault.app.database, before)
    await keyvault.tick()
    assert await kv.try_lease(keyvault, key) in ("TENANT_NOT_ACTIVE", "WRONG_STATE")
    await keyvault.tend()
    await keyvault.tick()
    assert await kv.try_lease(keyvault, key) == "WRONG_STATE"
    changed = await call(keyvault, method, request)
    assert changed.state == custody_pb2.KeyVersionState.Value(
        f"KEY_VERSION_STATE_{'REVOKED' if method == 'Revoke' else 'DESTROYED'}"
    )


async def test_a_refused_version_is_destroyed_once_its_state_is_whole(keyvault):
    """Shown to fail with parts whose digests are not compared."""
    key = await keyvault.stage()
    verdict = custody_pb2.DestroyKeyVersionRequest(
        name=key.name, version=1, request_id=new_id("req"), actor="test"
    )
    before = await copied(keyvault.app.database)

    def activate(part) -> None:
        part.keys[0].versions[0].state = custody_pb2.KEY_VERSION_STATE_ACTIVE

    await edit_part(keyvault.app.database, activate)
    refused = await kv.refusal(keyvault.custody.DestroyKeyVersion(verdict))
    assert refused == "STATE_TAMPERED"
    await put_back(keyvault.app.database, before)
    await keyvault.custody.DestroyKeyVersion(verdict)
    assert await keyvault.sql("SELECT count(*) FROM key_secret") == [(0,)]


async def test_a_key_remembers_its_last_sixteen_requests(keyvault):
    """So that its state stays small, however often it is changed."""
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    requests = [request_for("Revoke", key.name) for _ in range(17)]
    for request in requests:
        await call(keyvault, "Revoke", request)
    found = await keyvault.app.ledger.read("acme", ALL)
    kept = [one.id for one in found.key(key_id).requests]
    ids = [Request("RevokeKey", one.request_id, b"", "").past().id for one in requests]
    assert kept == ids[1:]
