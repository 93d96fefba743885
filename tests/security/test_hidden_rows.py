"""Rows that somebody with the database's password hides while keyvault acts, and puts back after.

All of it is plain SQL on keyvault's own database; LOOT is a copy that the attacker keeps.
"""

from __future__ import annotations

import datetime

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import (
    admin_pb2,
    audit_pb2,
    content_pb2,
    content_pb2_grpc,
    lease_pb2,
)
from google.protobuf.timestamp_pb2 import Timestamp

from services.keyvault import chain, rotation
from services.keyvault.domain import State
from tests.harness import keyvault as kv
from tests.harness.keyvault import try_lease

OLD = "sk-proj-" + "o" * 40
NEW = "sk-proj-" + "n" * 40
OTHERS = "sk-ant-api03-" + "q" * 40
LOOT = "CREATE TABLE loot AS SELECT * FROM key_version"
PUT_BACK = "INSERT INTO key_version SELECT * FROM loot WHERE version = %s"
MADE_UP = """
INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,
                         kek_backend, kek_version, wrapped_dek, wrap_mac, envelope)
SELECT tenant, key_id, 7, state, state_sequence, '\\x00', hint, {backend}, kek_version,
       {wrapped}, wrap_mac, envelope
FROM key_version WHERE key_id = %s
"""


async def _hide(keyvault, version):
    await keyvault.sql(LOOT)
    await keyvault.sql("DELETE FROM key_version WHERE version = %s", version)


async def _rotated(keyvault):
    """A key with version 1 SUPERSEDED and version 2 ACTIVE."""
    key = await keyvault.add_active(OLD)
    return await keyvault.add_active(NEW, key_id=_id(key), operation="rotate")


def _id(key):
    return key.name.rpartition("/")[2]


@pytest.mark.parametrize("followed", [True, False])
async def test_a_version_that_was_hidden_is_revoked_with_its_key(keyvault, followed):
    """Shown to fail with an event for each row that is there, and none about the key."""
    key = await _rotated(keyvault)
    if followed:
        await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == ""
    await _hide(keyvault, 2)
    answer = await keyvault.change("RevokeKey", key.name)
    assert answer.state == State.REVOKED
    assert await keyvault.sql("SELECT count(*) FROM lease WHERE end_time IS NULL") == [(0,)]
    await keyvault.sql(PUT_BACK, 2)
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


@pytest.mark.parametrize("method", ["RevokeKey", "DestroyKey"])
async def test_a_version_that_was_hidden_can_t_be_validated_either(keyvault, method):
    key = await keyvault.add_active(OLD)
    await keyvault.stage(NEW, key_id=_id(key), operation="rotate")
    await _hide(keyvault, 2)
    await keyvault.change(method, key.name)
    await keyvault.sql(PUT_BACK, 2)
    validation = {"key_version": 2, "purpose": kv.grant_pb2.LEASE_PURPOSE_VALIDATION}
    await keyvault.app._reconcile.following.follow("tenants/acme")
    assert await try_lease(keyvault, key, **validation) == "WRONG_STATE"
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key, **validation) == "RECONCILE_MISMATCH"


@pytest.mark.parametrize("followed", [True, False])
async def test_a_version_that_was_hidden_is_replaced_all_the_same(keyvault, followed):
    key = await keyvault.add_active(OLD)
    await keyvault.stage(NEW, key_id=_id(key), operation="rotate")
    if followed:
        await kv.followed(keyvault)
    await _hide(keyvault, 1)
    await keyvault.promote(key.name, 2, destroy_previous=True)
    await keyvault.sql(PUT_BACK, 1)
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"
    replaced = [event.type for event in await keyvault.events() if event.key_version == 1]
    assert (audit_pb2.AUDIT_EVENT_TYPE_DESTROYED in replaced) is followed


async def test_a_version_that_was_hidden_is_rolled_back_from(keyvault):
    key = await _rotated(keyvault)
    await kv.followed(keyvault)
    await _hide(keyvault, 2)
    await keyvault.change("RollBackKey", key.name)
    last = [(event.type, event.key_version) for event in (await keyvault.events())[-2:]]
    assert last == [
        (audit_pb2.AUDIT_EVENT_TYPE_DESTROYED, 2),
        (audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK, 1),
    ]
    await keyvault.sql(PUT_BACK, 2)
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key, key_version=2) == "RECONCILE_MISMATCH"


async def test_no_key_is_rolled_back_to_a_hidden_version(keyvault):
    """Nothing would be ACTIVE then, and the version that was is destroyed."""
    key = await _rotated(keyvault)
    await kv.followed(keyvault)
    await _hide(keyvault, 1)
    told = await kv.refusal(keyvault.change("RollBackKey", key.name))
    assert told == "RECONCILE_MISMATCH"
    assert await try_lease(keyvault, key) == ""


@pytest.mark.parametrize("followed", [True, False])
async def test_no_version_number_is_given_twice(keyvault, followed):
    """The same number twice would be one context for two values: either envelope opens there."""
    key = await keyvault.add_active("sk-proj-" + "f" * 40)
    key = await keyvault.add_active(OLD, key_id=_id(key), operation="rotate")
    if followed:
        await kv.followed(keyvault)
    await _hide(keyvault, 2)
    key = await keyvault.add_active(NEW, key_id=_id(key), operation="rotate")
    assert key.active_version == (3 if followed else 2)
    await keyvault.sql(
        "UPDATE key_version v SET wrapped_dek = l.wrapped_dek, wrap_mac = l.wrap_mac,"
        " envelope = l.envelope, kek_version = l.kek_version FROM loot l"
        " WHERE l.version = 2 AND v.version = %s",
        key.active_version,
    )
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == ("ROW_TAMPERED" if followed else "RECONCILE_MISMATCH")


async def test_no_other_keys_data_key_proves_that_a_kek_version_is_not_needed(keyvault):
    """Shown to fail where a sweep signs whatever data key it finds in a row."""
    living = await keyvault.add_active(OLD)
    other = await keyvault.add_active(OTHERS, provider="anthropic")
    third = await keyvault.add_active("AIza" + "q" * 35, provider="gemini")
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE backup AS SELECT * FROM key_version")
    await keyvault.sql(
        "UPDATE key_version v SET wrapped_dek = o.wrapped_dek FROM key_version o"
        " WHERE v.key_id = %s AND o.key_id = %s",
        *(_id(living), _id(other)),
    )
    await keyvault.change("DestroyKey", third.name)
    assert await kv.swept(keyvault) == "PARTIAL"
    await keyvault.sql(
        "UPDATE key_version v SET wrapped_dek = b.wrapped_dek, wrap_mac = b.wrap_mac,"
        " envelope = b.envelope, kek_version = b.kek_version FROM backup b"
        " WHERE v.key_id = b.key_id AND v.key_id = %s",
        _id(living),
    )
    assert await try_lease(keyvault, living) == ""


async def test_a_made_up_version_keeps_no_key_from_being_revoked(keyvault):
    key = await keyvault.add_active()
    await keyvault.sql(MADE_UP.format(backend="kek_backend", wrapped="wrapped_dek"), _id(key))
    answer = await keyvault.change("RevokeKey", key.name)
    assert [one.state for one in answer.versions] == [State.REVOKED, State.REVOKED]
    assert await try_lease(keyvault, key, key_version=1) == "WRONG_STATE"


async def test_a_made_up_version_keeps_no_other_beyond_its_grace(keyvault):
    key = await _rotated(keyvault)
    await keyvault.sql(
        "UPDATE key_version SET state_time = now() - interval '25 hours' WHERE version = 1"
    )
    made_up = MADE_UP.format(backend="kek_backend", wrapped="wrapped_dek") + "AND version = 2"
    await keyvault.sql(made_up, _id(key))
    await kv.followed(keyvault)
    await keyvault.app._custody.sweep()
    assert await keyvault.sql("SELECT state FROM key_version WHERE version = 1") == [(6,)]


async def test_a_row_that_is_put_back_between_passes_is_not_leased(keyvault):
    """No pass ever sees it. Shown to fail where a lease asks only what is frozen or destroyed."""
    key = await _rotated(keyvault)
    await keyvault.sql(LOOT)
    await keyvault.change("RollBackKey", key.name)
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE good AS SELECT * FROM key_version")
    for _ in range(2):
        await keyvault.sql("DELETE FROM key_version")
        await keyvault.sql("INSERT INTO key_version SELECT * FROM loot")
        assert await try_lease(keyvault, key, key_version=2) == "WRONG_STATE"
        assert await try_lease(keyvault, key, key_version=1) == "RECONCILE_MISMATCH"
        await keyvault.sql("DELETE FROM key_version")
        await keyvault.sql("INSERT INTO key_version SELECT * FROM good")
        await kv.followed(keyvault)
    assert await try_lease(keyvault, key, key_version=1) == ""


async def test_a_hold_that_is_hidden_between_passes_still_holds(keyvault):
    key = await keyvault.add_active()
    await keyvault.admin.RevokeTenant(
        admin_pb2.RevokeTenantRequest(tenant="tenants/acme", reason="now")
    )
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE hold AS SELECT * FROM tenant_hold")
    for _ in range(2):
        await keyvault.sql("DELETE FROM tenant_hold")
        assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"
        await keyvault.sql("INSERT INTO tenant_hold SELECT * FROM hold")
        await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "TENANT_NOT_ACTIVE"


async def test_a_key_that_was_hidden_is_shredded_with_its_tenant(keyvault):
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE keks AS SELECT * FROM local_kek WHERE name = 'tenant/acme'")
    await _hide(keyvault, 1)
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    assert await keyvault.sql("SELECT count(*) FROM lease WHERE end_time IS NULL") == [(0,)]
    await keyvault.sql("INSERT INTO local_kek SELECT * FROM keks")
    await keyvault.sql(PUT_BACK, 1)
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


@pytest.mark.parametrize("method", ["RevokeKey", "DestroyKey"])
async def test_a_key_that_was_hidden_before_it_was_followed_ends_too(keyvault, method):
    key = await keyvault.add_active()
    await _hide(keyvault, 1)
    assert await kv.refusal(keyvault.change(method, key.name)) == "NOT_FOUND"
    await keyvault.sql(PUT_BACK, 1)
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_a_version_that_was_hidden_is_destroyed_by_its_number(keyvault):
    """A value that its provider refused: hidden when it is to be destroyed, put back after."""
    key = await keyvault.add_active(OLD)
    await keyvault.stage(NEW, key_id=_id(key), operation="rotate")
    await _hide(keyvault, 2)
    await keyvault.change("DestroyKeyVersion", key.name, version=2)
    assert (await keyvault.events())[-1].type == audit_pb2.AUDIT_EVENT_TYPE_DESTROYED
    assert (
        await kv.refusal(keyvault.change("DestroyKeyVersion", key.name, version=3)) == "NOT_FOUND"
    )


async def test_what_stands_where_the_next_event_goes_stops_no_revocation(keyvault):
    """Shown to fail with an insert that gives way."""
    key = await keyvault.add_active()
    content = content_pb2_grpc.ContentKeyServiceStub(keyvault.channel("orchestrator"))
    await content.GetContentKey(content_pb2.GetContentKeyRequest(tenant="tenants/acme"))
    await kv.followed(keyvault)

    async def plant():
        await keyvault.sql(
            "INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)"
            " SELECT chain, sequence + 1, '', 'x', 'x', 'x' FROM chain"
            " WHERE chain = 'tenants/acme'"
        )

    await plant()
    await keyvault.change("RevokeKey", key.name)
    await plant()
    await keyvault.change("DestroyKey", key.name)
    await plant()
    await keyvault.admin.RevokeTenant(
        admin_pb2.RevokeTenantRequest(tenant="tenants/acme", reason="now")
    )
    await plant()
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    assert await keyvault.sql("SELECT count(*) FROM content_key WHERE tenant = 'acme'") == [(0,)]
    await kv.followed(keyvault)
    assert chain.tenant_chain("acme") not in keyvault.app._reconcile.following.broken


@pytest.mark.parametrize(
    ("backend", "wrapped"), [("'nope'", "wrapped_dek"), ("kek_backend", "'x'")]
)
async def test_no_made_up_version_keeps_an_old_kek(keyvault, backend, wrapped):
    living = await keyvault.add_active()
    other = await keyvault.add_active(OTHERS, provider="anthropic")
    await keyvault.sql(MADE_UP.format(backend=backend, wrapped=wrapped), _id(living))
    await kv.followed(keyvault)
    await keyvault.change("DestroyKey", other.name)
    assert await kv.swept(keyvault) == "DONE"
    assert await try_lease(keyvault, living) == ""


@pytest.mark.parametrize("what", ["version", "key", "tenant"])
async def test_no_invented_end_has_a_living_keys_kek_destroyed(keyvault, what):
    """A backup of the database needs it. Shown to fail where a proof believes a chain's word that
    a version is destroyed."""
    key = await keyvault.add_active(OLD)
    await kv.followed(keyvault)
    ends = {
        "version": {"key_id": _id(key), "key_version": 1},
        "key": {"key_id": _id(key)},
        "tenant": {"type": audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED},
    }
    await kv.plant(keyvault, **{"type": audit_pb2.AUDIT_EVENT_TYPE_DESTROYED, **ends[what]})
    await kv.followed(keyvault)
    await keyvault.sql(
        "INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase)"
        " VALUES ('job_x', 'acme', 'planted', 'x', true, true, true, 'QUEUED')"
    )
    assert await kv.swept(keyvault) == "PARTIAL"
    keks = await keyvault.sql("SELECT min(version) FROM local_kek WHERE name = 'tenant/acme'")
    assert keks == [(1,)]


async def test_retention_keeps_which_version_was_active_last(keyvault, deployment):
    """Version 2 took the place of a hidden version 1, and is rejected: that is its last event."""
    key = await keyvault.add_active(OLD)
    await keyvault.stage(NEW, key_id=_id(key), operation="rotate")
    await _hide(keyvault, 1)
    key = await keyvault.promote(key.name, 2, destroy_previous=True)
    await try_lease(keyvault, key, purpose=kv.grant_pb2.LEASE_PURPOSE_VALIDATION)
    ((lease,),) = await keyvault.sql("SELECT lease_id FROM lease")
    await kv.released(keyvault, lease, lease_pb2.LEASE_OUTCOME_KEY_REJECTED)
    await kv.followed(keyvault)
    retention = keyvault.app._retention
    retention._age = datetime.timedelta(microseconds=1)
    await retention.tick()
    assert (await keyvault.sql("SELECT count(*) FROM audit_carried")) != [(0,)]
    await keyvault.sql("DELETE FROM reconcile_part")
    async with kv.running(deployment) as fresh:
        await fresh.sql(PUT_BACK, 1)
        await kv.followed(fresh)
        assert await try_lease(fresh, key, key_version=1) == "RECONCILE_MISMATCH"


async def test_a_row_of_no_version_is_frozen_once(keyvault):
    key = await keyvault.add_active(OLD)
    made_up = MADE_UP.format(backend="kek_backend", wrapped="wrapped_dek")
    await keyvault.sql(made_up.replace("key_id, 7,", "key_id, 0,"), _id(key))
    for _ in range(3):
        await kv.followed(keyvault)
    events = [event.type for event in await keyvault.events()]
    assert events.count(audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED) == 1


async def test_a_row_without_ciphertext_ends_its_lease(keyvault):
    key = await keyvault.add_active(OLD)
    await keyvault.sql("UPDATE key_version SET wrapped_dek = NULL, envelope = NULL")
    assert await try_lease(keyvault, key) == "ROW_TAMPERED"
    assert await keyvault.sql("SELECT count(*) FROM lease WHERE end_time IS NULL") == [(0,)]


async def test_a_lost_past_does_not_get_into_the_new_one(keyvault):
    """A database put back under a running keyvault: what was followed of before is not there any
    more, no version of it is hidden, and nothing that it ended is dead."""
    key = await keyvault.add_active(OLD)
    await kv.followed(keyvault)
    tables = [
        name
        for (name,) in await keyvault.sql(
            "SELECT tablename FROM pg_tables WHERE schemaname='public'"
        )
    ]
    for name in tables:
        await keyvault.sql(f"CREATE TABLE old_{name} AS SELECT * FROM {name}")
    await keyvault.stage(NEW, key_id=_id(key), operation="rotate")
    await keyvault.change("RevokeKey", key.name)
    await kv.followed(keyvault)
    async with keyvault.app._database.transaction() as connection:
        await connection.execute("TRUNCATE " + ", ".join(tables) + " CASCADE")
        for name in sorted(tables, key=lambda name: name == "key_version"):
            await connection.execute(
                f"INSERT INTO {name} OVERRIDING SYSTEM VALUE SELECT * FROM old_{name}"
            )
    await keyvault.app._anchor.tick()
    assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
    again = await keyvault.add_active(NEW, key_id=_id(key), operation="rotate")
    assert [one.version for one in again.versions] == [1, 2]
    await keyvault.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason="failover"))
    await kv.followed(keyvault)
    assert await try_lease(keyvault, again) == ""
    assert keyvault.app._reconcile.following.versions["acme"] == 2


async def test_a_key_that_is_put_back_is_frozen_in_whatever_page_it_is(keyvault):
    """As if a page of the pass ended between the tenant's name and the key."""
    await keyvault.add_active()
    pages = keyvault.app._reconcile._pages
    await keyvault.tick()
    pages._ends = [("acme", "a", 0), *pages._ends]
    pages._digests, pages._next = [None, None], 0
    await kv.followed(keyvault)
    await _hide(keyvault, 1)
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    await keyvault.sql(PUT_BACK, 1)
    await kv.followed(keyvault)
    assert keyvault.app._reconcile.frozen() == 1


async def test_a_destruction_to_come_keeps_no_sweep_from_being_owed(keyvault, monkeypatch):
    key = await keyvault.add_active()
    await keyvault.change("DestroyKey", key.name)
    await keyvault.sql("DELETE FROM kek_job")
    await kv.plant(
        keyvault,
        type=audit_pb2.AUDIT_EVENT_TYPE_DESTROYED,
        key_id="key_x",
        key_version=1,
        event_time=Timestamp(seconds=253402300799),
    )
    await kv.followed(keyvault)
    monkeypatch.setattr(rotation, "UNSWEPT", datetime.timedelta(0))
    await keyvault.app._rotation.resweep()
    assert await keyvault.sql("SELECT count(*) FROM kek_job") == [(1,)]


async def test_leases_of_a_key_end_that_somebody_called_destroyed_before(keyvault):
    key = await keyvault.add_active()
    assert await try_lease(keyvault, key) == ""
    await kv.plant(keyvault, type=audit_pb2.AUDIT_EVENT_TYPE_DESTROYED, key_id=_id(key))
    await kv.followed(keyvault)
    await _hide(keyvault, 1)
    assert await kv.refusal(keyvault.change("DestroyKey", key.name)) == "NOT_FOUND"
    assert await keyvault.sql("SELECT count(*) FROM lease WHERE end_time IS NULL") == [(0,)]
