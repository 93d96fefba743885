"""Rows that somebody with the database's password swapped, restored or altered."""

from __future__ import annotations

import json

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault import lifecycle
from services.keyvault.log import STALE_SECONDS
from tests.harness import keyvault as kv
from tests.harness import rows
from tests.harness.keyvault import try_lease

DAMAGED = ("STATE_TAMPERED", "ROLLED_BACK")
_SWAP = """
UPDATE key_secret AS mine SET envelope = other.envelope, wrapped_dek = other.wrapped_dek
FROM key_secret AS other
WHERE (mine.tenant, mine.key_id, mine.version) <> (other.tenant, other.key_id, other.version)
"""


async def _two_tenants(keyvault):
    await keyvault.create_tenant("evil")
    return await keyvault.add_active(), await keyvault.add_active(tenant="evil")


async def _two_providers(keyvault):
    return await keyvault.add_active(), await keyvault.add_active(
        "sk-ant-api03-" + "q" * 40, provider="anthropic"
    )


async def _two_versions(keyvault):
    key = await keyvault.add_active()
    await keyvault.stage("sk-proj-" + "n" * 40, key_id=key.name.split("/")[3], operation="rotate")
    return (key,)


@pytest.mark.parametrize("make", [_two_tenants, _two_providers, _two_versions])
async def test_swap_rows(keyvault, make):
    """1. Swapped ciphertext is DATA_LOSS, on the record, and no plaintext leaves.

    Shown to fail: without the digest in Leasing._may_lease, and with an empty associated data in
    envelope.Context and in LocalBackend._dek_binding, the other keys were leased.
    """
    keys = await make(keyvault)
    await keyvault.sql(_SWAP)
    for key in keys:
        assert await try_lease(keyvault, key) == "ROW_TAMPERED"
        chain = "/".join(key.name.split("/")[:2])
        last = (await keyvault.events(chain))[-1]
        assert last.type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
        assert last.reason == "ROW_TAMPERED"


@pytest.mark.parametrize("length", [0, 12, 60, 61])
async def test_altered_kek_row(keyvault, length):
    """1. A KEK that the keyring does not open, of whatever length, is DATA_LOSS, on the record.

    Shown to fail: with lengths not looked at in local._opened: INTERNAL, and the lease lives on.
    """
    key = await keyvault.add_active()
    await keyvault.sql(
        "UPDATE local_kek SET wrapped = %s WHERE name = 'tenant/acme'", bytes(length)
    )
    keyvault.app.backends.primary._cache.clear()
    assert await try_lease(keyvault, key) == "ROW_TAMPERED"
    last = (await keyvault.events())[-1]
    assert last.type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
    assert await keyvault.sql("SELECT 1 FROM lease WHERE end_time IS NULL") == []


async def test_rollback_row_state_set_by_sql(keyvault):
    """2. REVOKED set to ACTIVE by SQL is not what the tenant's row names.

    Shown to fail: with digests of parts not compared in Ledger._add_parts.
    """
    key = await keyvault.add_active()
    await keyvault.change("RevokeKey", key.name)

    def activate(part):
        part.keys[0].versions[0].state = lifecycle.State.ACTIVE

    await rows.edit_part(keyvault.app.database, activate)
    assert await try_lease(keyvault, key) == "STATE_TAMPERED"


_FLIP = "set_byte({0}, 0, get_byte({0}, 0) # 1)"


def _set(column: str, value: str, table: str = "tenant") -> str:
    where = "name = 'acme'" if table == "tenant" else "tenant = 'acme'"
    return f"UPDATE {table} SET {column} = {value} WHERE {where}"


#: One statement each, by somebody with the database's password.
FORGERIES = {
    "another state": _set("state", _FLIP.format("state")),
    "no state": _set("state", "''"),
    "an endless state": _set("state", "convert_to(repeat('x', 9000000), 'UTF8')"),
    "another usage": _set("usage", _FLIP.format("usage")),
    "no usage": _set("usage", "''"),
    "another head": _set("head_hash", _FLIP.format("head_hash")),
    "no head": _set("head_hash", "''"),
    "an event before the first": _set("sequence", "-1"),
    "an event before the last": _set("sequence", "sequence - 1"),
    "an event after the last": _set("sequence", "9223372036854775807"),
    "an operator's word before the first": _set("generation", "-1"),
    "an operator's word after the last": _set("generation", "9223372036854775807"),
    "another MAC": _set("mac", _FLIP.format("mac")),
    "no MAC": _set("mac", "''"),
    "no MAC key": _set("mac_key_id", "''"),
    "an endless MAC key": _set("mac_key_id", "repeat('x', 200000)"),
    "another name": "UPDATE tenant SET name = 'evil' WHERE name = 'acme'",
    "no row": "DELETE FROM tenant WHERE name = 'acme'",
    "no part": "DELETE FROM tenant_part",
    "another part's number": _set("part", "part + 1", "tenant_part"),
    "a part below the first": _set("part", "-1", "tenant_part"),
    "a part of another tenant": _set("tenant", "'evil'", "tenant_part"),
    "keys of a part altered": _set("state", _FLIP.format("state"), "tenant_part"),
    "no keys in a part": _set("state", "''", "tenant_part"),
    "usage of a part altered": _set("usage", "usage || '\\x00'", "tenant_part"),
    "a further part": "INSERT INTO tenant_part SELECT tenant, 63 - part, state, usage"
    " FROM tenant_part",
    "no ciphertext": "DELETE FROM key_secret",
    "ciphertext of no version": _set("version", "-1", "key_secret"),
    "ciphertext of an endless key": _set("key_id", "repeat('x', 2000)", "key_secret"),
    "a ciphertext of a further version": "INSERT INTO key_secret"
    " SELECT tenant, key_id, 7, wrapped_dek, envelope FROM key_secret",
    "never due": _set("due_time", "'infinity'"),
    "due before all time": _set("due_time", "'-infinity'"),
    "no events": "DELETE FROM event WHERE tenant = 'acme' AND sequence > 1",
    "an event beyond the last": "INSERT INTO event SELECT tenant, sequence + 1, key_id, body, hash"
    " FROM event WHERE tenant = 'acme' ORDER BY sequence DESC LIMIT 1",
}


def _shred():
    return kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))


async def _ciphertext(keyvault):
    return await keyvault.sql("SELECT key_id FROM key_secret WHERE tenant = 'acme'")


async def _refused_or(call, *reasons: str) -> str:
    reason = await kv.refusal(call)
    assert reason in ("", *reasons)
    return reason


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_forged_row_does_not_keep_its_key_alive(keyvault, forgery):
    """A destruction that meets a forged row is kept, and carried out once the row is whole: until
    then nothing is leased, and afterwards neither.

    Shown to fail: without Custody._owe; without carry_out in Upkeep.tick.
    """
    key = await keyvault.add_active()
    whole = await rows.copied(keyvault.app.database)
    await keyvault.sql(FORGERIES[forgery])
    asked = kv.custody_pb2.ListKeysRequest(parent="tenants/acme")
    listing = keyvault.custody.ListKeys(asked)
    if await _refused_or(listing, *DAMAGED) == "":
        assert [one.name for one in (await listing).keys] == [key.name]
    if await _refused_or(keyvault.change("DestroyKey", key.name), *DAMAGED):
        assert await try_lease(keyvault, key) in DAMAGED
        await rows.put_back(keyvault.app.database, whole)
        await keyvault.tick()
        assert await try_lease(keyvault, key) in ("TENANT_NOT_ACTIVE", "WRONG_STATE")
        await keyvault.tend()
        await keyvault.tick()
    assert await try_lease(keyvault, key) == "WRONG_STATE"
    left = "SELECT 1 FROM key_secret WHERE key_id = %s AND version = 1"
    assert await keyvault.sql(left, key.name.split("/")[3]) == []
    told = [one for one in await keyvault.events() if one.key_id and one.shred]
    assert [one.type for one in told] == [audit_pb2.AUDIT_EVENT_TYPE_DESTROYED]
    # And it stays so when it is asked once more, and is read.
    assert (await keyvault.change("DestroyKey", key.name)).name == key.name


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_forged_row_does_not_keep_its_tenant_alive(keyvault, forgery):
    """What can't be read goes with the tenant's KEK, and with the ciphertext.

    Shown to fail: with STATE_TAMPERED ending ShredTenant.
    """
    key = await keyvault.add_active()
    whole = await rows.copied(keyvault.app.database)
    await keyvault.sql(FORGERIES[forgery])
    await keyvault.admin.ShredTenant(_shred())
    assert await keyvault.sql("SELECT name FROM local_kek WHERE name = 'tenant/acme'") == []
    assert await _ciphertext(keyvault) == []
    # And it stays so with the row that was there before.
    await rows.put_back(keyvault.app.database, whole, "tenant", "tenant_part", "key_secret")
    await keyvault.tick()
    assert await try_lease(keyvault, key) in (*DAMAGED, "TENANT_NOT_ACTIVE")
    assert await kv.refusal(keyvault.create_tenant()) in (*DAMAGED, "TENANT_KEY_MISSING")


async def test_an_event_repeats_nothing_of_a_forged_one(keyvault):
    """What a lease was given for is told at its end from the event that keyvault wrote alone.

    Shown to fail with the body of any event in release.leased_event.
    """
    key = await keyvault.add_active()
    child = kv.Child()
    request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
    lease = await keyvault.leases().LeaseKey(request)
    forged = audit_pb2.AuditEvent(
        type=audit_pb2.AUDIT_EVENT_TYPE_LEASED, owner="mallory", actor="mallory", review_id="rev_9"
    )
    await keyvault.sql(
        "UPDATE event SET body = %s FROM lease l"
        " WHERE event.tenant = l.tenant AND event.sequence = l.sequence",
        forged.SerializeToString(),
    )
    assert await kv.released(keyvault, lease.lease_id) == ""
    last = (await keyvault.events())[-1]
    assert (last.type, last.lease_id, last.key_version) == (
        audit_pb2.AUDIT_EVENT_TYPE_RELEASED,
        lease.lease_id,
        1,
    )
    assert (last.owner, last.actor, last.review_id) == ("", "", "")


async def test_listed_is_what_can_be_opened(keyvault):
    """Neither planted parts nor planted ciphertext hide a living key from its list, or add one.

    Shown to fail with pages of the rows that there are.
    """
    key = await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO tenant_part SELECT 'acme', n, p.state, p.usage FROM tenant_part p,"
        " generate_series(0, 80) AS n WHERE p.part <> n"
    )
    await keyvault.sql(
        "INSERT INTO key_secret SELECT 'acme', 'key_' || lpad(n::text, 26, '0'), 1, 'x', 'x'"
        " FROM generate_series(1, 120) AS n"
    )
    request = kv.custody_pb2.ListKeysRequest(parent="tenants/acme", page_size=1)
    page = await keyvault.custody.ListKeys(request)
    assert ([one.name for one in page.keys], page.next_page_token) == ([key.name], "")
    await keyvault.change("DestroyKey", key.name)
    assert not (await keyvault.custody.ListKeys(request)).keys
    request.show_destroyed = True
    assert [one.name for one in (await keyvault.custody.ListKeys(request)).keys] == [key.name]


async def test_rollback_row_restored_whole(keyvault):
    """2. An old row restored whole, with its parts, has a valid MAC of its past: it is refused at
    once, and an operator is told.

    Shown to fail: with Heads.admit returning early, the revoked key was leased.
    """
    key = await keyvault.add_active()
    before = await rows.copied(keyvault.app.database)
    await keyvault.change("RevokeKey", key.name)
    after = await rows.copied(keyvault.app.database)
    await rows.put_back(keyvault.app.database, before, "tenant", "tenant_part", "key_secret")
    assert await try_lease(keyvault, key) == "ROLLED_BACK"
    await keyvault.app.upkeep.scan()
    status = await keyvault.admin.GetStatus(kv.admin_pb2.GetStatusRequest())
    assert list(status.broken_tenants) == ["acme"]
    # For as long as it is so, and no longer.
    await rows.put_back(keyvault.app.database, after)
    assert await try_lease(keyvault, key) == "WRONG_STATE"
    await keyvault.app.upkeep.scan()
    status = await keyvault.admin.GetStatus(kv.admin_pb2.GetStatusRequest())
    assert list(status.broken_tenants) == []


async def test_rollback_row_whole_database(keyvault, deployment):
    """2. A database older than its anchor gives no lease until an operator says so.

    Everything in it is restored to a consistent past here; only the anchor is outside, and what
    the process that runs remembers.
    Shown to fail: without the comparison of roots in Log._tick, the revoked key was leased.
    """
    key = await keyvault.add_active()
    before = await rows.copied(keyvault.app.database, None)
    await keyvault.change("RevokeKey", key.name)
    await rows.put_back(keyvault.app.database, before)
    assert await try_lease(keyvault, key) == "ROLLED_BACK"
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"
        # And said where every replica reads it, at the latest when it looks again.
        await restarted.tick()
        await keyvault.tick()
        assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
        await restarted.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        assert await try_lease(restarted, key) == ""
        kinds = [event.type for event in await restarted.events("system")]
        assert audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED in kinds


async def test_rollback_row_with_its_chain(keyvault, deployment):
    """2. A tenant's rows and the end of its chain, put back together, are caught by the log.

    Shown to fail: with leaves that are not learned in Log._tick.
    """
    key, other = await keyvault.add_active(), await _elsewhere(keyvault)
    before = await rows.copied(keyvault.app.database)
    await keyvault.change("RevokeKey", key.name)
    await rows.put_back(keyvault.app.database, before)
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "ROLLED_BACK"
        assert await try_lease(restarted, other) == ""
        # An operator who has looked may take it for the truth.
        await restarted.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        assert await try_lease(restarted, key) == ""


async def _elsewhere(keyvault):
    await keyvault.create_tenant("other")
    return await keyvault.add_active(tenant="other")


@pytest.mark.parametrize("damage", ["sequence = -1", "state = '\\xff'", "mac = ''"])
async def test_one_bad_row_stops_no_watcher(keyvault, damage):
    """A row that can't be read stops its own tenant; what runs beside goes on for the others.

    Shown to fail: with STATE_TAMPERED leaving Upkeep._tend.
    """
    good, evil = await keyvault.add_active(), await _elsewhere(keyvault)
    await keyvault.sql(f"UPDATE tenant SET {damage}, due_time = now() WHERE name = 'other'")
    await keyvault.tick()
    await keyvault.tend()
    await keyvault.app.upkeep.scan()
    assert keyvault.app.upkeep.damaged == {"other": "STATE_TAMPERED"}
    assert await try_lease(keyvault, evil) == "STATE_TAMPERED"
    assert await try_lease(keyvault, good) == ""
    assert keyvault.app.background.down() == []


async def test_a_check_that_no_longer_runs_stops_leases(keyvault, deployment):
    """An anchor that can't be read: after ten seconds, no lease.

    Shown to fail: without the age in Log.refusal.
    """
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    deployment.folder.joinpath("anchor.json").write_text("{}")
    keyvault.app.log.fresh -= STALE_SECONDS + 1
    assert await try_lease(keyvault, key) == "AUDIT_UNAVAILABLE"


async def test_a_lost_anchor_is_not_forgotten(keyvault, deployment):
    """2. Deleting the anchor does not make an old database acceptable."""
    key = await keyvault.add_active()
    await keyvault.tick()
    deployment.folder.joinpath("anchor.json").unlink()
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"


async def test_the_anchor_follows_the_log(keyvault, deployment):
    """The anchor is what the database holds, and moves when a chain does."""
    await keyvault.tick()
    before = json.loads(deployment.folder.joinpath("anchor.json").read_text())
    await keyvault.add_active()
    await keyvault.tick()
    after = json.loads(deployment.folder.joinpath("anchor.json").read_text())
    leaves = await keyvault.sql("SELECT count(*) FROM log_leaf")
    assert after["size"] == leaves[0][0] > before["size"]


async def test_a_missing_kek_is_said_as_such(keyvault):
    """A KEK that is gone: undecryptable, re-key."""
    key = await keyvault.add_active()
    await keyvault.app.backends.primary.destroy("tenant/acme")
    assert await try_lease(keyvault, key) == "UNDECRYPTABLE"


async def test_list_without_vault(keyvault):
    """11. Listing and showing keys makes no call to the KEK backend.

    Shown to fail: with a call of Backend.health in Custody.page.
    """
    key = await keyvault.add_active()

    class Untouchable:
        async def close(self):
            pass

        def __getattr__(self, name):
            raise AssertionError(f"the backend was asked: {name}")

    untouchable = Untouchable()
    keyvault.app.backends.primary = untouchable
    keyvault.app.backends._by_name = {"local": untouchable}
    page = await keyvault.custody.ListKeys(kv.custody_pb2.ListKeysRequest(parent="tenants/acme"))
    shown = await keyvault.custody.GetKey(kv.custody_pb2.GetKeyRequest(name=key.name))
    assert [one.name for one in page.keys] == [shown.key.name]
