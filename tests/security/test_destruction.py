"""A destruction that somebody with the database's password wants to survive, or to misuse.

All of it is plain SQL on keyvault's own database; the copies are what the attacker keeps.
"""

from __future__ import annotations

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault.kek import KekMissingError, UnwrapError
from tests.harness import keyvault as kv
from tests.harness import rows
from tests.harness.keyvault import try_lease
from tests.security.test_rewrap import kek_versions, rewrap, rotate

DESTROYED = audit_pb2.AUDIT_EVENT_TYPE_DESTROYED
ANTHROPIC = {"provider": "anthropic"}
pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize(
    "hide",
    [
        "DELETE FROM tenant_part",
        "UPDATE tenant_part SET part = 63 - part",
        "DELETE FROM tenant WHERE name = 'acme'",
        "UPDATE tenant SET mac = '' WHERE name = 'acme'",
    ],
)
async def test_a_key_that_was_hidden_is_destroyed_once_it_is_back(keyvault, hide):
    """With every version, and before anything of it can be leased.

    Shown to fail without Custody._owe; without the owed names in Log.held.
    """
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    await keyvault.add_active("sk-proj-" + "n" * 40, key_id=key_id, operation="rotate")
    loot = await rows.copied(keyvault.app.database)
    await keyvault.sql(hide)
    refused = await kv.refusal(keyvault.change("DestroyKey", key.name))
    assert refused in ("STATE_TAMPERED", "ROLLED_BACK")
    # And then the rows come back.
    await rows.put_back(keyvault.app.database, loot)
    await keyvault.tick()
    assert await try_lease(keyvault, key, key_version=2) in ("TENANT_NOT_ACTIVE", "WRONG_STATE")
    await keyvault.tend()
    await keyvault.tick()
    for version in (1, 2):
        assert await try_lease(keyvault, key, key_version=version) == "WRONG_STATE"
    assert await keyvault.sql("SELECT 1 FROM key_secret") == []
    told = [one.key_version for one in await keyvault.events() if one.type == DESTROYED]
    # As a whole at least once.
    assert [version for version in told if version] == [1, 2]
    assert told[0] == 0
    # What was there before is not what keyvault knows.
    await rows.put_back(keyvault.app.database, loot)
    assert await try_lease(keyvault, key, key_version=2) == "ROLLED_BACK"


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("head", [True, False])
async def test_no_planted_event_brings_a_destroyed_key_back(keyvault, version, head):
    """Links are hashes that anybody can compute: they are evidence, and nothing follows from them.

    Shown to fail with a head that no MAC covers.
    """
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    loot = await rows.copied(keyvault.app.database)
    await keyvault.change("DestroyKey", key.name)
    row = await rows.copied(keyvault.app.database)
    await kv.plant(
        keyvault,
        type=audit_pb2.AUDIT_EVENT_TYPE_STAGED,
        key_id=key_id,
        key_version=version,
    )
    if not head:
        await rows.put_back(keyvault.app.database, row, "tenant")
    await rows.put_back(keyvault.app.database, loot, "key_secret")
    expected = "STATE_TAMPERED" if head else "WRONG_STATE"
    for _ in range(2):
        await keyvault.tick()
        assert await try_lease(keyvault, key) == expected
    await rows.put_back(keyvault.app.database, row, "tenant")
    # The next event of keyvault's own takes the planted one's place.
    await keyvault.change("DestroyKey", key.name)
    assert audit_pb2.AUDIT_EVENT_TYPE_STAGED not in [
        one.type for one in (await keyvault.events())[-2:]
    ]


async def test_leases_of_hidden_keys_end_with_their_key(keyvault):
    """A key whose rows are gone: its leases end when its tenant's do, at once; and with the key
    once that is back.

    Shown to fail without Holds._end_indexed.
    """
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    loot = await rows.copied(keyvault.app.database)
    await keyvault.sql("DELETE FROM tenant_part")
    assert await kv.refusal(keyvault.change("DestroyKey", key.name)) == "STATE_TAMPERED"
    word = kv.admin_pb2.RevokeTenantRequest(tenant="tenants/acme", reason="incident 7")
    await keyvault.admin.RevokeTenant(word)
    assert await keyvault.sql("SELECT 1 FROM lease WHERE end_time IS NULL") == []
    await rows.put_back(keyvault.app.database, loot, "tenant_part")
    resume = kv.admin_pb2.ResumeTenantRequest(tenant="tenants/acme", reason="incident 7")
    await keyvault.admin.ResumeTenant(resume)
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "WRONG_STATE"


async def test_the_chain_says_that_a_key_is_destroyed_as_a_whole(keyvault):
    """As often as it is asked: whoever holds a receipt of one finds it."""
    key = await keyvault.add_active()
    await keyvault.change("DestroyKey", key.name)
    await keyvault.change("DestroyKey", key.name)
    told = [one.key_version for one in await keyvault.events() if one.type == DESTROYED]
    assert told == [0, 1, 0]


async def test_ciphertext_that_is_put_back_into_a_tombstone_dies_with_the_sweep(deployment):
    """Shown to fail with sweeps that wrap whatever ciphertext they find."""
    async with kv.running(deployment, shred_after_seconds=0) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        loot = await rows.copied(keyvault.app.database)
        await keyvault.change("DestroyKey", key.name)
        await rows.put_back(keyvault.app.database, loot, "key_secret")
        assert await kv.swept(keyvault)
        assert await kek_versions(keyvault) == [2]
        backend = keyvault.app.backends.primary
        backend._cache.clear()
        for wrapped in [row[3] for row in loot.rows["key_secret"]]:
            with pytest.raises((KekMissingError, UnwrapError)):
                await backend.unwrap("tenant/acme", bytes(wrapped))


async def test_no_made_up_ciphertext_stands_for_a_living_key(keyvault):
    """A trim looks at the ciphertext of each version that the state names: a row more does not hide
    one less.

    Shown to fail with a proof that counts rows.
    """
    living = await keyvault.add_active()
    await keyvault.add_active("sk-ant-api03-" + "q" * 40, **ANTHROPIC)
    key_id = living.name.split("/")[3]
    await rotate(keyvault)
    loot = await rows.copied(keyvault.app.database)
    await keyvault.sql(
        "INSERT INTO key_secret SELECT tenant, key_id, 9, wrapped_dek, envelope FROM key_secret"
    )
    await keyvault.sql("DELETE FROM key_secret WHERE key_id = %s AND version = 1", key_id)
    last = await rewrap(keyvault, trim=True)
    assert last.phase == kv.admin_pb2.KEK_JOB_PHASE_PARTIAL
    assert [(one.key_id, one.reason) for one in last.failures] == [(key_id, "ROW_TAMPERED")]
    assert await kek_versions(keyvault) == [1, 2]
    lost = [row for row in loot.rows["key_secret"] if row[1] == key_id]
    await keyvault.sql("INSERT INTO key_secret VALUES (%s, %s, %s, %s, %s)", *lost[0])
    assert await try_lease(keyvault, living) == ""
    assert (await rewrap(keyvault, trim=True)).phase == kv.admin_pb2.KEK_JOB_PHASE_DONE
    assert await try_lease(keyvault, living) == ""


@pytest.mark.parametrize("method", ["RevokeKey", "DestroyKey"])
@pytest.mark.parametrize(
    "forgery",
    [
        "SELECT setval('revocation_sequence_seq', 9223372036854775807)",
        "UPDATE lease SET lease_id = 'lea_x'",
        "UPDATE lease SET end_time = '-infinity'",
        "DELETE FROM lease",
        "INSERT INTO event SELECT tenant, sequence + n, key_id, body, hash FROM event,"
        " generate_series(1, 9) n WHERE tenant = 'acme' AND sequence = (SELECT max(sequence)"
        " FROM event WHERE tenant = 'acme')",
    ],
)
async def test_no_other_row_keeps_a_key_from_being_revoked(keyvault, method, forgery):
    """Shown to fail with leases that must be in the index, or numbered, to be ended; with events
    that may not be there yet."""
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql(forgery)
    await keyvault.change(method, key.name)
    assert await try_lease(keyvault, key) == "WRONG_STATE"
    leases = (await keyvault.app.ledger.read("acme")).usage.leases
    assert [one.ended for one in leases] == [True]


@pytest.mark.parametrize("due", ["infinity", "9999-01-01", "-infinity"])
async def test_a_sweep_that_was_put_off_is_not(deployment, due):
    """What is owed stands in the state; what a row hints of when is made up for.

    Shown to fail with Upkeep.scan that looks at what is due alone.
    """
    async with kv.running(deployment, shred_after_seconds=0) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        await keyvault.change("DestroyKey", key.name)
        await keyvault.sql("UPDATE tenant SET due_time = %s WHERE name = 'acme'", due)
        await keyvault.app.upkeep.scan()
        assert await kv.swept(keyvault)
        assert await kek_versions(keyvault) == [2]


@pytest.mark.parametrize(
    "planted",
    ["'key_00' || repeat('z', 200)", "'a'", "''", "'key_' || repeat('0', 26) || E'\\n'"],
)
async def test_planted_ciphertext_is_nobodys_key(keyvault, planted):
    """It is listed nowhere, keeps no tenant from being deleted, and goes with it."""
    key = await keyvault.add_active()
    await keyvault.sql(f"INSERT INTO key_secret VALUES ('acme', {planted}, 1, 'x', 'x')")
    request = kv.custody_pb2.ListKeysRequest(parent="tenants/acme", page_size=1)
    page = await keyvault.custody.ListKeys(request)
    assert ([one.name for one in page.keys], page.next_page_token) == ([key.name], "")
    shred = kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    assert (await keyvault.admin.ShredTenant(shred)).destroyed_versions == 1
    assert await keyvault.sql("SELECT 1 FROM key_secret") == []


async def test_a_key_that_nobody_made_can_not_be_destroyed(keyvault):
    """And leaves nothing in the chain."""
    before = len(await keyvault.events())
    name = f"tenants/acme/providerKeys/{new_id('key')}"
    assert await kv.refusal(keyvault.change("DestroyKey", name)) == "NOT_FOUND"
    assert len(await keyvault.events()) == before
