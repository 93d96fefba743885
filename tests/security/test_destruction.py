"""A destruction that somebody with the database's password wants to survive, or to misuse.

All of it is plain SQL on keyvault's own database; LOOT is a copy that the attacker keeps.
"""

from __future__ import annotations

import asyncio
import datetime

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault import rotation
from services.keyvault.domain import State
from services.orchestrator.custody.keyvault import Keyvault
from tests.harness import keyvault as kv
from tests.harness.keyvault import try_lease

DESTROYED = audit_pb2.AUDIT_EVENT_TYPE_DESTROYED
LOOT = "CREATE TABLE loot AS SELECT * FROM key_version"
ANTHROPIC = {"provider": "anthropic"}


async def _pass(keyvault):
    await keyvault.tick()


@pytest.mark.parametrize(
    "hide",
    [
        "UPDATE key_version SET version = 7",
        "UPDATE key_version SET version = -1",
        "DELETE FROM key_version WHERE version = 2",
        "DELETE FROM key_version",
    ],
)
async def test_a_version_that_was_hidden_is_destroyed_with_its_key(keyvault, hide):
    """Shown to fail with a destruction of the rows that are there, and no event about the key."""
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    if "= 2" in hide:
        await keyvault.add_active("sk-proj-" + "n" * 40, key_id=key_id, operation="rotate")
    await _pass(keyvault)
    await keyvault.sql(LOOT)
    await keyvault.sql(hide)
    if hide == "DELETE FROM key_version":
        await kv.refusal(keyvault.change("DestroyKey", key.name))
    else:
        await keyvault.change("DestroyKey", key.name)
    # keyvault follows its chain, and then the rows come back.
    await _pass(keyvault)
    await keyvault.sql("DELETE FROM key_version")
    await keyvault.sql("INSERT INTO key_version SELECT * FROM loot")
    await keyvault.sql("UPDATE provider_key SET destroy_time = NULL")
    assert await try_lease(keyvault, key) in ("WRONG_STATE", "RECONCILE_MISMATCH")
    await _pass(keyvault)
    await _pass(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"  # and on the record
    last = (await keyvault.events())[-1]
    assert (last.type, last.key_id) == (audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED, key_id)


@pytest.mark.parametrize("version", [0, 1])
async def test_no_planted_event_brings_a_destroyed_key_back(keyvault, version):
    """Links are hashes that anybody can compute: what is over stays over, whatever comes after it.

    Shown to fail with the newest event of a version, or of the whole key, in force.
    """
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    await keyvault.sql(LOOT)
    if version == 0:
        await keyvault.sql("UPDATE key_version SET version = 7")
    await keyvault.change("DestroyKey", key.name)
    await _pass(keyvault)
    await kv.plant(
        keyvault,
        type=audit_pb2.AUDIT_EVENT_TYPE_STAGED,
        key_id=key_id,
        key_version=version,
    )
    await keyvault.sql("DELETE FROM key_version")
    await keyvault.sql("INSERT INTO key_version SELECT * FROM loot")
    for _ in range(2):
        await _pass(keyvault)
        assert await try_lease(keyvault, key) in ("WRONG_STATE", "RECONCILE_MISMATCH")
    states = keyvault.app._reconcile.following.states
    assert states.get(states.fingerprint("acme", key_id, version))[0] == State.DESTROYED


async def test_leases_of_hidden_versions_end_with_their_key(keyvault):
    """Shown to fail with the versions that its rows tell of."""
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    await _pass(keyvault)
    await keyvault.sql("DELETE FROM key_version")
    await kv.refusal(keyvault.change("DestroyKey", key.name))
    assert await keyvault.sql("SELECT 1 FROM lease WHERE end_time IS NULL") == []


async def test_the_chain_says_that_a_key_is_destroyed_as_a_whole_once(keyvault):
    key = await keyvault.add_active()
    await keyvault.change("DestroyKey", key.name)
    await _pass(keyvault)
    await keyvault.change("DestroyKey", key.name)
    told = [one.key_version for one in await keyvault.events() if one.type == DESTROYED]
    assert told == [0, 1]


async def test_ciphertext_that_is_put_back_into_a_tombstone_dies_with_the_sweep(keyvault):
    """Shown to fail with sweeps that wrap whatever ciphertext they find."""
    key = await keyvault.add_active()
    await keyvault.sql(LOOT)
    await keyvault.change("DestroyKey", key.name)
    await _pass(keyvault)
    await keyvault.sql(
        "UPDATE key_version v SET envelope = l.envelope, wrapped_dek = l.wrapped_dek,"
        " wrap_mac = l.wrap_mac FROM loot l"
    )
    assert await kv.swept(keyvault) == "DONE"
    assert await keyvault.sql("SELECT kek_version, envelope, wrapped_dek FROM key_version") == [
        (1, None, None)
    ]
    assert await keyvault.sql("SELECT version FROM local_kek WHERE name = 'tenant/acme'") == [(2,)]


@pytest.mark.parametrize("numbers", ["(0)", "(-1)", "(-1),(-2)"])
async def test_no_made_up_version_stands_for_a_living_key(keyvault, numbers):
    """A trim counts the versions that the chain knows: a row more does not hide one less.

    Shown to fail with a proof that counts rows.
    """
    living = await keyvault.add_active()
    other = await keyvault.add_active("sk-ant-api03-" + "q" * 40, **ANTHROPIC)
    await keyvault.sql(
        "INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,"
        " kek_backend, kek_version, wrapped_dek, wrap_mac, envelope) SELECT tenant, key_id, g.n,"
        " state, state_sequence, state_mac, hint, kek_backend, kek_version, wrapped_dek, wrap_mac,"
        f" envelope FROM key_version, (VALUES {numbers}) AS g (n) WHERE key_id = %s",
        other.name.split("/")[3],
    )
    await keyvault.change("DestroyKey", other.name)
    await keyvault.sql(LOOT)
    await keyvault.sql("DELETE FROM key_version WHERE key_id = %s", living.name.split("/")[3])
    assert await kv.swept(keyvault) == "PARTIAL"
    await keyvault.sql(
        "INSERT INTO key_version SELECT * FROM loot WHERE key_id = %s", living.name.split("/")[3]
    )
    assert await try_lease(keyvault, living) == ""


@pytest.mark.parametrize("method", ["RevokeKey", "DestroyKey"])
@pytest.mark.parametrize(
    "forgery",
    [
        "SELECT setval('revocation_sequence_seq', 9223372036854775807)",
        "UPDATE lease_meter SET in_flight = (-9223372036854775808)::bigint",
        "UPDATE provider_key SET destroy_time = now(); INSERT INTO provider_key (tenant, key_id,"
        " provider, owner, display_name) SELECT tenant, 'key_' || repeat('0', 26), provider, owner,"
        " display_name FROM provider_key",
    ],
)
async def test_no_other_row_keeps_a_key_from_being_revoked(keyvault, method, forgery):
    """Shown to fail with leases that must be numbered to be ended, and with a name that is taken
    again."""
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    for statement in forgery.split("; "):
        await keyvault.sql(statement)
    await keyvault.change(method, key.name)
    assert await try_lease(keyvault, key) == "WRONG_STATE"
    assert await keyvault.sql("SELECT 1 FROM lease WHERE end_time IS NULL") == []


async def test_a_sweep_that_was_put_off_is_not(keyvault, monkeypatch):
    """Shown to fail with a sweep that is, and waits as long, as its row says."""
    key = await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase,"
        " due_time, end_time, passes) VALUES ('job_x', 'acme', 'x', 'keyvault', false, true, false,"
        " 'QUEUED', 'infinity', 'infinity', 30)"
    )
    await keyvault.change("DestroyKey", key.name)
    asked = "SELECT due_time < 'infinity', end_time, rotate, trim, passes FROM kek_job"
    assert await keyvault.sql(asked) == [(True, None, True, True, 0)]
    await keyvault.sql("UPDATE kek_job SET due_time = 'infinity' WHERE phase = 'QUEUED'")
    monkeypatch.setattr(rotation, "UNSWEPT", datetime.timedelta(0))
    await _pass(keyvault)
    await keyvault.app._rotation.resweep()
    assert await keyvault.sql("SELECT 1 FROM kek_job WHERE due_time = 'infinity'") == []


@pytest.mark.parametrize(
    ("due", "end"), [("infinity", None), ("-infinity", "9999-01-01"), ("infinity", "9999-01-01")]
)
async def test_a_planted_job_that_is_never_at_work_holds_up_no_sweep(keyvault, due, end):
    """Shown to fail with whatever is older worked off first."""
    key = await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase,"
        " due_time, create_time, end_time) VALUES ('job_x', 'acme', 'x', 'op', true, true, true,"
        " 'REWRAP', %s, '-infinity', %s)",
        *(due, end),
    )
    await keyvault.change("DestroyKey", key.name)
    await keyvault.sql("UPDATE kek_job SET due_time = now() WHERE phase = 'QUEUED'")
    async with asyncio.timeout(20):
        # It has wrapped what is left, and waits for leases before it trims.
        while await keyvault.sql("SELECT phase FROM kek_job WHERE caller = 'keyvault'") != [
            ("TRIM",)
        ]:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("count", [2**63 - 1, -(2**63)])
async def test_no_count_of_a_job_keeps_it_from_its_end(keyvault, count):
    """Shown to fail with counts that leave their range, here or in the event about them."""
    key = await keyvault.add_active()
    await keyvault.sql("UPDATE key_version SET kek_version = 0")
    await keyvault.sql(
        "INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase,"
        " target_backend, target_version, done, failed) VALUES ('job_x', 'acme', 'x', 'op', false,"
        " true, false, 'REWRAP', 'local', 1, %s, %s)",
        *(count, count),
    )
    async with asyncio.timeout(20):
        while await keyvault.sql("SELECT phase FROM kek_job") != [("DONE",)]:
            await asyncio.sleep(0.1)
    assert await try_lease(keyvault, key) == ""


@pytest.mark.parametrize(
    "planted",
    [
        "'key_00' || repeat('z', 200)",
        "'a'",
        "'key_' || repeat('Z', 26)",
        "'key_' || repeat('0', 27)",
        "'key_' || repeat('0', 26) || E'\\n'",
    ],
)
async def test_an_id_that_no_request_can_name_fills_no_page(keyvault, planted):
    """Nor does it keep a tenant from being deleted; it is shredded with the tenant.

    Shown to fail with any id that is short enough.
    """
    key = await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO provider_key (tenant, key_id, provider, owner, display_name)"
        f" VALUES ('acme', {planted}, 'openai', '', 'd')"
    )
    await keyvault.sql(
        "INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,"
        " kek_backend, kek_version, envelope) SELECT tenant, key_id, 1, 2, 1, 'x', 'h', 'local', 1,"
        " 'x' FROM provider_key WHERE display_name = 'd'"
    )
    request = kv.custody_pb2.ListKeysRequest(parent="tenants/acme", page_size=1)
    page = await keyvault.custody.ListKeys(request)
    assert ([one.name for one in page.keys], page.next_page_token) == ([key.name], "")
    # What the orchestrator does for a deleted tenant, again and again until nothing refuses.
    assert await Keyvault(keyvault.channel("orchestrator")).destroy_all("acme", "test") == 1
    shred = kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    await keyvault.admin.ShredTenant(shred)
    assert await keyvault.sql("SELECT 1 FROM key_version WHERE envelope IS NOT NULL") == []


async def test_a_key_that_nobody_made_can_not_be_destroyed(keyvault):
    """And leaves nothing in the chain."""
    before = len(await keyvault.events())
    name = f"tenants/acme/providerKeys/{new_id('key')}"
    await kv.refusal(keyvault.change("DestroyKey", name))
    assert len(await keyvault.events()) == before
