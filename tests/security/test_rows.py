"""Rows that somebody with the database's password swapped, restored or altered."""

from __future__ import annotations

import json

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2

from tests.harness import keyvault as kv
from tests.harness.keyvault import try_lease

_SWAP = """
UPDATE key_version AS mine SET envelope = other.envelope, wrapped_dek = other.wrapped_dek
FROM key_version AS other
WHERE (mine.tenant, mine.key_id, mine.version) <> (other.tenant, other.key_id, other.version)
  AND mine.envelope IS NOT NULL AND other.envelope IS NOT NULL
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

    Shown to fail: with an empty associated data in envelope.Context and in
    LocalBackend._dek_binding, the swapped providers' and versions' keys were leased.
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
    keyvault.app._backends.primary._cache.clear()
    assert await try_lease(keyvault, key) == "ROW_TAMPERED"
    last = (await keyvault.events())[-1]
    assert last.type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED


async def test_rollback_row_state_set_by_sql(keyvault):
    """2. REVOKED set to ACTIVE by SQL fails its MAC.

    Shown to fail: with domain.check_state returning early, the revoked key was leased.
    """
    key = await keyvault.add_active()
    await keyvault.change("RevokeKey", key.name)
    await keyvault.sql("UPDATE key_version SET state = 2")
    assert await try_lease(keyvault, key) == "STATE_TAMPERED"


_VERSION = "key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,"
_VERSION += " kek_backend, kek_version, wrapped_dek, wrap_mac, envelope)"
_MEMBERS = "state, state_sequence, state_mac, hint, kek_backend, kek_version, wrapped_dek, wrap_mac"
#: One statement each, by somebody with the database's password.
FORGERIES = {
    "it says ACTIVE": "UPDATE key_version SET state = 2, state_mac = 'x'",
    "it says DESTROYED": "UPDATE key_version SET state = 6, state_mac = 'x'",
    "no such state": "UPDATE key_version SET state = 99",
    "state 0": "UPDATE key_version SET state = 0",
    "event before the first": "UPDATE key_version SET state_sequence = -1",
    "event after the last": "UPDATE key_version SET state_sequence = 9223372036854775807",
    "version below the first": "UPDATE key_version SET version = -1",
    "a further version": f"INSERT INTO {_VERSION}"
    f" SELECT tenant, key_id, -7, {_MEMBERS}, envelope FROM key_version",
    "the last version there can be": "UPDATE key_version SET version = 2147483647",
    "KEK version below the first": "UPDATE key_version SET kek_version = -1",
    "no such backend": "UPDATE key_version SET kek_backend = 'nope'",
    "no such provider": "UPDATE provider_key SET provider = 'nope'",
    "an endless owner": "UPDATE provider_key SET owner = repeat('x', 200000)",
    "an endless hint": "UPDATE key_version SET hint = repeat('x', 9000000)",
    "made at no time": "UPDATE provider_key SET create_time = 'infinity'",
    "staged at no time": "UPDATE key_version SET create_time = '-infinity'",
    "changed at no time": "UPDATE key_version SET state_time = 'infinity'",
    "changed before Christ": "UPDATE key_version SET state_time = '0044-03-15 BC'",
    "changed as often as can be": "UPDATE provider_key SET revision = 9223372036854775807",
    "changed less than never": "UPDATE provider_key SET revision = -5",
    "it is said to be destroyed": "UPDATE provider_key SET destroy_time = now()",
}


def _shred():
    return kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))


async def _ciphertext(keyvault):
    return await keyvault.sql(
        "SELECT key_id FROM key_version WHERE tenant = 'acme'"
        " AND (envelope IS NOT NULL OR wrapped_dek IS NOT NULL OR wrap_mac IS NOT NULL)"
    )


@pytest.mark.parametrize("how", ["one", "all"])
@pytest.mark.parametrize("forgery", FORGERIES)
async def test_forged_row_does_not_keep_its_key_alive(keyvault, how, forgery):
    """A destruction trusts no row, and it is listed what there is to destroy.

    Shown to fail: with destroy reading a checked key; with forged rows taken at their word; with
    psycopg's own reading of times; with unsigned numbers only in encoding.fields.
    """
    key = await keyvault.add_active()
    await keyvault.sql(FORGERIES[forgery])
    listed = await keyvault.custody.ListKeys(kv.custody_pb2.ListKeysRequest(parent="tenants/acme"))
    assert [one.name for one in listed.keys] == [key.name]
    if how == "one":
        await keyvault.change("DestroyKey", key.name)
    else:
        await keyvault.admin.ShredTenant(_shred())
    assert await _ciphertext(keyvault) == []
    assert {row[0] for row in await keyvault.sql("SELECT state FROM key_version")} == {6}
    kinds = {one.type for one in await keyvault.events() if one.key_id and one.shred}
    assert kinds == {audit_pb2.AUDIT_EVENT_TYPE_DESTROYED}
    # And it stays so when it is asked once more, and is read.
    assert (await keyvault.change("DestroyKey", key.name)).name == key.name


async def test_an_event_repeats_nothing_of_a_forged_row(keyvault):
    """Shown to fail with the provider and owner of any row in Custody.event."""
    key = await keyvault.add_active()
    await keyvault.sql("UPDATE provider_key SET provider = 'gemini', owner = 'mallory'")
    await keyvault.change("DestroyKey", key.name)
    last = (await keyvault.events())[-1]
    assert (last.type, last.provider, last.owner) == (
        audit_pb2.AUDIT_EVENT_TYPE_DESTROYED,
        0,
        "",
    )


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE chain SET sequence = 9223372036854775807 WHERE chain = 'tenants/acme'",
        "DELETE FROM chain WHERE chain = 'tenants/acme'",
        "ALTER TABLE key_version DROP CONSTRAINT key_version_tenant_key_id_fkey;"
        " DELETE FROM provider_key",
    ],
)
async def test_a_tenant_is_shredded_though_its_keys_can_not_be_destroyed(keyvault, damage):
    """What takes no event, or is no key any more, goes with the tenant's KEK, and with the rows.

    Shown to fail with the first refusal ending ShredTenant.
    """
    await keyvault.add_active()
    await keyvault.sql(damage)
    await kv.refusal(keyvault.admin.ShredTenant(_shred()))
    assert await keyvault.sql("SELECT name FROM local_kek WHERE name = 'tenant/acme'") == []
    assert await _ciphertext(keyvault) == []


async def test_listed_is_what_can_be_opened(keyvault):
    """Neither a forged tombstone nor rows without versions hide a living key from its list.

    Shown to fail with pages of rows of provider_key, and with its destroy_time.
    """
    key = await keyvault.add_active()
    await keyvault.sql("UPDATE provider_key SET destroy_time = now()")
    await keyvault.sql(
        "INSERT INTO provider_key (tenant, key_id, provider, owner, display_name, destroy_time)"
        " SELECT 'acme', 'key_' || lpad(n::text, 26, '0'), 'openai', '', 'default', now()"
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
    """2. An old row restored whole has a valid MAC of its past; the reconcile pass freezes it, and
    says so in the chain.

    Shown to fail: with Differences._freeze doing nothing, the chain had nothing of it.
    """
    key = await keyvault.add_active()
    columns = "state, state_sequence, state_mac"
    before = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    await keyvault.change("RevokeKey", key.name)
    await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *before)
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"
    assert (await keyvault.events())[-1].reason == "RECONCILE_MISMATCH"


async def test_rollback_row_whole_database(keyvault, deployment):
    """2. A database older than its anchor gives no lease until an operator says so.

    Everything in it is restored to a consistent past here; only the anchor is outside.
    Shown to fail: with Anchor._holds returning True, the revoked key was leased.
    """
    key = await keyvault.add_active()
    await keyvault.app._anchor.tick()
    tables = ("chain", "audit_event", "log_leaf", "provider_key", "key_version", "lease")
    for table in tables:
        await keyvault.sql(f"CREATE TABLE backup_{table} AS SELECT * FROM {table}")
    await keyvault.change("RevokeKey", key.name)
    await keyvault.app._anchor.tick()
    for table in reversed(tables):
        await keyvault.sql(f"DELETE FROM {table}")
    for table in tables:
        await keyvault.sql(f"INSERT INTO {table} SELECT * FROM backup_{table}")
    await keyvault.app._anchor.tick()
    assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "DATABASE_ROLLED_BACK"
        await restarted.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        assert await try_lease(restarted, key) == ""
        kinds = [event.type for event in await restarted.events("system")]
        assert audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED in kinds
        # Refused leases may be noted after it.
        assert audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED in kinds


async def test_rollback_row_with_its_chain(keyvault, deployment):
    """2. A tenant's rows and the end of its chain, put back together, are caught by the log.

    Shown to fail: with Following.log returning early.
    """
    key = await keyvault.add_active()
    columns = "state, state_sequence, state_mac"
    before = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    head = (await keyvault.sql("SELECT sequence, hash FROM chain WHERE chain <> 'system'"))[0]
    await keyvault.change("RevokeKey", key.name)
    await keyvault.app._anchor.tick()
    await keyvault.sql("DELETE FROM audit_event WHERE sequence > %s AND chain <> 'system'", head[0])
    await keyvault.sql(
        "UPDATE chain SET (sequence, hash) = (%s, %s) WHERE chain <> 'system'", *head
    )
    await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *before)
    async with kv.running(deployment) as restarted:
        assert await try_lease(restarted, key) == "RECONCILE_MISMATCH"
        await restarted.admin.ResumeLeases(kv.admin_pb2.ResumeLeasesRequest(reason="a drill"))
        await restarted.app._reconcile.once()
        assert await try_lease(restarted, key) == "RECONCILE_MISMATCH"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit_event SET body = '\\xff', hash = sha256('byokeep/audit/v1\n'::bytea"
        " || previous_hash || '\\xff'::bytea) WHERE chain = 'tenants/evil' AND sequence = 4",
        "UPDATE key_version SET state = 99 WHERE tenant = 'evil'",
        "UPDATE key_version SET version = -1 WHERE tenant = 'evil'",
        "UPDATE key_version SET state_sequence = -1 WHERE tenant = 'evil'",
        "UPDATE key_version SET state_sequence = 9223372036854775807 WHERE tenant = 'evil'",
    ],
)
async def test_one_bad_row_stops_no_watcher(keyvault, damage):
    """A row that can't be read freezes its own tenant's keys; the pass goes on for the others.

    Shown to fail: with Following._take letting DecodeError through.
    """
    await keyvault.create_tenant("evil")
    evil, good = await keyvault.add_active(tenant="evil"), await keyvault.add_active()
    await keyvault.app._reconcile.once()
    # What was followed already is not read again: the damage is in what is new.
    async with keyvault.app._anchor._ticking:
        await keyvault.change("RevokeKey", evil.name)
        await keyvault.sql(damage)
        await keyvault.sql("UPDATE key_version SET state = 5 WHERE tenant = 'acme'")
        await keyvault.app._reconcile.once()
    assert keyvault.app._reconcile.frozen() == 2
    assert await try_lease(keyvault, evil) != ""
    assert await try_lease(keyvault, good) == "RECONCILE_MISMATCH"
    assert keyvault.app.background.down() == []


async def test_a_check_that_no_longer_runs_stops_leases(keyvault, deployment):
    """An anchor that can't be read, or a pass that does not end: after a minute, no lease.

    Shown to fail: without the ages in Anchor.refusal and Reconcile.refusal.
    """
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    deployment.folder.joinpath("anchor.json").write_text("{}")
    keyvault.app._anchor._held -= 61
    assert await try_lease(keyvault, key) == "AUDIT_UNAVAILABLE"
    keyvault.app._anchor._held += 3600
    keyvault.app._reconcile._passed -= 61
    assert await try_lease(keyvault, key) == "AUDIT_UNAVAILABLE"


async def test_a_lost_anchor_is_not_forgotten(keyvault, deployment):
    """2. Deleting the anchor does not make an old database acceptable."""
    key = await keyvault.add_active()
    await keyvault.app._anchor.tick()
    deployment.folder.joinpath("anchor.json").unlink()
    await keyvault.app._anchor.tick()
    assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"


async def test_the_anchor_follows_the_log(keyvault, deployment):
    """The anchor is what the database holds, and moves when a chain does."""
    await keyvault.app._anchor.tick()
    before = json.loads(deployment.folder.joinpath("anchor.json").read_text())
    await keyvault.add_active()
    await keyvault.app._anchor.tick()
    after = json.loads(deployment.folder.joinpath("anchor.json").read_text())
    leaves = await keyvault.sql("SELECT count(*) FROM log_leaf")
    assert after["size"] == leaves[0][0] > before["size"]


async def test_a_missing_kek_is_said_as_such(keyvault):
    """A KEK that is gone: undecryptable, re-key."""
    key = await keyvault.add_active()
    await keyvault.app._backends.primary.destroy("tenant/acme")
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
    keyvault.app._backends.primary = untouchable
    keyvault.app._backends._by_name = {"local": untouchable}
    page = await keyvault.custody.ListKeys(kv.custody_pb2.ListKeysRequest(parent="tenants/acme"))
    shown = await keyvault.custody.GetKey(kv.custody_pb2.GetKeyRequest(name=key.name))
    assert [one.name for one in page.keys] == [shown.key.name]
