"""Whoever can write keyvault's database: what an audit of the code tried, kept as tests.

Each was found with a working attack; what stops it now is named beside it.
"""

from __future__ import annotations

import asyncio
import datetime

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import admin_pb2, audit_pb2

from services.common.errors import ByokeepError
from services.keyvault import epochs, following, needed, rotation
from services.keyvault.database import unreachable
from tests.harness.keyvault import running, try_lease
from tests.security.test_audit import export
from tests.security.test_rewrap import kek_versions, rewrap, rotate

_HEAD = "SELECT sequence, hash FROM chain WHERE chain = 'tenants/acme'"


async def _exported(keyvault) -> str:
    """Return why an export was not signed, or ""."""
    try:
        await export(keyvault)
    except grpc.aio.AioRpcError as error:
        return error_info(error).reason
    return ""


async def test_leaves_relabelled_to_hide_leases(keyvault):
    """The newest leaf is what the database says: it must be what this process followed.

    Shown to fail: with `_leads_to` returning True.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    for _ in range(3):
        assert await try_lease(keyvault, key) == ""
        await keyvault.tick()
    assert await _exported(keyvault) == ""
    await keyvault.sql(
        "UPDATE log_leaf SET chain = 'tenants/zzz' WHERE chain = 'tenants/acme' AND sequence > 3"
    )
    assert await _exported(keyvault) == "AUDIT_UNAVAILABLE"


async def test_chain_hidden_from_the_log(keyvault):
    """Shown to fail: with `sequence > logged_sequence` in store.log."""
    key = await keyvault.add_active()
    await keyvault.tick()
    before = (await keyvault.sql(_HEAD))[0]
    await keyvault.sql(
        "UPDATE chain SET logged_sequence = 4000000000000000000 WHERE chain = 'tenants/acme'"
    )
    assert await try_lease(keyvault, key) == ""
    await keyvault.tick()
    await keyvault.sql("DELETE FROM lease")
    await keyvault.sql(
        "DELETE FROM audit_event WHERE chain = 'tenants/acme' AND sequence > %s", before[0]
    )
    await keyvault.sql(
        "UPDATE chain SET sequence = %s, hash = %s, logged_sequence = %s"
        " WHERE chain = 'tenants/acme'",
        *before,
        before[0],
    )
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_leaf_passed_over_by_a_failed_read(keyvault, monkeypatch):
    """A pass that fails between the log and the chain comes back to that leaf.

    Shown to fail: with the frontier of the log advanced before its chains were followed.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    columns = "state, state_sequence, state_mac"
    row = (await keyvault.sql(f"SELECT {columns} FROM key_version"))[0]
    head = (await keyvault.sql(_HEAD))[0]
    await keyvault.change("RevokeKey", key.name)
    await keyvault.app._anchor.tick()

    def fails(*_):
        raise unreachable()

    with monkeypatch.context() as broken:
        broken.setattr(following.audit_store, "links", fails)
        with pytest.raises(ByokeepError):
            await keyvault.app._reconcile.once()
    await keyvault.sql(
        "DELETE FROM audit_event WHERE chain = 'tenants/acme' AND sequence > %s", head[0]
    )
    await keyvault.sql(
        "UPDATE chain SET sequence = %s, hash = %s, logged_sequence = %s"
        " WHERE chain = 'tenants/acme'",
        *head,
        head[0],
    )
    await keyvault.sql(f"UPDATE key_version SET ({columns}) = (%s, %s, %s)", *row)
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def over(keyvault) -> None:
    """Wait for the end of every job."""
    async with asyncio.timeout(40):
        while await keyvault.sql("SELECT 1 FROM kek_job WHERE end_time IS NULL"):
            await asyncio.sleep(0.1)


PLANT = (
    "INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase,"
    " due_time, target_backend, target_version) VALUES"
    " ('job_x', 'acme', 'r', 'op', false, true, true, %s, now(), %s, 2)"
)


@pytest.fixture
def _soon(monkeypatch):
    monkeypatch.setattr(rotation, "TRIM_DELAY", rotation.TRIM_DELAY / 20)


@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE key_version SET kek_version = 99",
        "UPDATE key_version SET kek_backend = 'local', kek_version = 2,"
        " wrap_mac = sha256(wrapped_dek)",
        "SELECT",
    ],
)
async def test_planted_trim_destroys_nothing_that_is_used(keyvault, lie):
    """The order to trim is planted, and what rows say of their versions is a lie: what proves
    nothing is wrapped again first.

    Shown to fail: with `_proven` returning True; with a MAC that is not compared.
    """
    key = await keyvault.add_active()
    await rotate(keyvault)
    await keyvault.sql(lie)
    await keyvault.sql(PLANT, "TRIM", "local")
    await over(keyvault)
    assert await try_lease(keyvault, key) == ""


# A column of a job is {2} for who claims it for its trim, and {1} for who reads it again.
TWO_ANSWERS = (
    "CREATE FUNCTION lie() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF NEW.phase = 'TRIM' AND NEW.due_time > OLD.due_time AND OLD.{0} = {1}"
    " THEN NEW.{0} := {2}; END IF; RETURN NEW; END $$",
    "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF NEW.{0} = {2} THEN UPDATE kek_job SET {0} = {1}; END IF; RETURN NULL; END $$",
    "CREATE TRIGGER lie BEFORE UPDATE ON kek_job FOR EACH ROW EXECUTE FUNCTION lie()",
    "CREATE TRIGGER undo AFTER UPDATE ON kek_job FOR EACH ROW EXECUTE FUNCTION undo()",
)


@pytest.mark.usefixtures("_soon")
async def test_two_answers_about_one_trim(keyvault):
    """A job's row aims at one version where it is claimed and at another where it is read again:
    what is proven is what is trimmed.

    Shown to fail: with the row as it is read again proven.
    """
    key = await keyvault.add_active()
    await rotate(keyvault)
    for one in TWO_ANSWERS:
        await keyvault.sql(one.format("target_version", "1", "2"))
    await keyvault.sql(PLANT.replace(", 2)", ", 1)"), "TRIM", "local")
    await over(keyvault)
    assert await try_lease(keyvault, key) == ""


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(
    "hidden",
    [
        "DELETE FROM key_version",
        "UPDATE key_version SET wrapped_dek = NULL",
        "UPDATE key_version SET state = 6",
    ],
)
async def test_rows_hidden_while_their_kek_is_trimmed(keyvault, hidden):
    """Rows are hidden while a KEK's old versions are to be destroyed: what a backup of them
    needs stays, and the job says that it is not done.

    Shown to fail: with `_proven` returning True; with rows not counted; with their states'
    MACs not looked at.
    """
    await keyvault.add_active()
    await keyvault.sql(hidden)
    await rotate(keyvault)
    assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_PARTIAL
    assert await kek_versions(keyvault) == [1, 2]


async def test_a_version_that_the_backend_never_had_proves_nothing(keyvault):
    """A row of an earlier KEK of that name, with a MAC of its own, names a version that this KEK
    does not have yet: it is wrapped again before anything is trimmed.

    Shown to fail: without the comparison with the backend's newest version.
    """
    key = await keyvault.add_active()
    await rotate(keyvault)
    ((key_id, *wrap),) = await keyvault.sql(
        "SELECT key_id, wrapped_dek, sha256(envelope) FROM key_version"
    )
    mac = keyvault.app._rotation._wraps.mac("acme", (key_id, 1), "local", 7, *wrap)
    await keyvault.sql("UPDATE key_version SET kek_version = 7, wrap_mac = %s", mac)
    await keyvault.sql(PLANT, "TRIM", "local")
    await over(keyvault)
    keyvault.app._backends.primary._cache.clear()
    assert await try_lease(keyvault, key) == ""


async def test_a_job_that_aims_elsewhere_by_sql_ends(keyvault):
    """A rewrap's `target_backend` is changed by SQL: rows move only to the primary backend.

    Shown to fail: without the comparison with the primary backend in Rewrap._work.
    """
    key = await keyvault.add_active()
    before = await keyvault.sql("SELECT kek_backend, wrapped_dek FROM key_version")
    await keyvault.sql(PLANT, "REWRAP", "elsewhere")
    await over(keyvault)
    assert await keyvault.sql("SELECT phase, failed FROM kek_job") == [("CANCELLED", 0)]
    assert await keyvault.sql("SELECT kek_backend, wrapped_dek FROM key_version") == before
    assert await try_lease(keyvault, key) == ""


async def test_a_sweep_that_was_deleted_is_queued_again(keyvault, monkeypatch):
    """Its job's row is deleted: the chain tells of the destruction, and of no trim since. A sweep
    that is over is not done again.

    Shown to fail: without Following._swept; with a trim that discharges nothing.
    """
    monkeypatch.setattr(rotation, "TRIM_DELAY", rotation.TRIM_DELAY / 20)
    monkeypatch.setattr(rotation, "UNSWEPT", -datetime.timedelta(minutes=1))
    key = await keyvault.add_active()
    await keyvault.change("DestroyKey", key.name)
    await keyvault.sql("DELETE FROM kek_job")
    await keyvault.tick()
    await keyvault.app._rotation.resweep()
    await over(keyvault)
    assert await kek_versions(keyvault) == [2]
    await keyvault.tick()
    await keyvault.sql("DELETE FROM kek_job")
    await keyvault.app._rotation.resweep()
    assert await keyvault.sql("SELECT 1 FROM kek_job") == []


async def test_leases_without_a_key_keep_no_other_from_expiring(keyvault):
    """Leases whose tenant, key or version is not there, or not readable, as many as are ended at
    once: the others end.

    Shown to fail: with every round beginning at the oldest lease.
    """
    key = await keyvault.add_active()
    broken = await keyvault.add_active(name="broken")
    assert await try_lease(keyvault, broken) == ""
    await keyvault.sql("UPDATE lease SET expire_time = '-infinity'")
    await keyvault.sql("UPDATE key_version SET state = 77 WHERE key_id = %s", broken.name[-30:])
    await keyvault.sql(
        "INSERT INTO lease (lease_id, grant_id, tenant, key_id, version, holder, attempt_id,"
        " review_id, fence, purpose, expire_time) SELECT 'lea_' || i, 'gra_' || i, 'nobody', 'k',"
        " 1, '', '', '', 1, 2, now() - interval '3 hours' FROM generate_series(1, 64) AS i"
    )
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql(
        "UPDATE lease SET expire_time = now() - interval '1 hour' WHERE key_id = %s",
        key.name[-30:],
    )
    await keyvault.app._releases.expire()
    assert await keyvault.sql(
        "SELECT count(*) FROM lease WHERE key_id = %s AND release_time IS NULL", key.name[-30:]
    ) == [(0,)]


async def test_planted_hold_silences_no_operator(keyvault):
    """Shown to fail: with the row's word taken without its MAC."""
    await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO tenant_hold (tenant, held, state_sequence, state_mac)"
        " VALUES ('acme', true, 1, '\\x00')"
    )
    await keyvault.admin.RevokeTenant(
        admin_pb2.RevokeTenantRequest(tenant="tenants/acme", reason="now")
    )
    kinds = [event.type for event in await keyvault.events()]
    assert audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED in kinds


async def test_the_last_grant_key_can_be_withdrawn(keyvault, deployment):
    """Shown to fail: with a folder without keys changing nothing."""
    key = await keyvault.add_active()
    for path in (deployment.folder / "grants").glob("*.pem"):
        path.unlink()
    await keyvault.app._grant_keys.follow()
    assert await try_lease(keyvault, key) == "GRANT_REFUSED"


async def test_epoch_rows_destroy_no_other_kek(keyvault):
    """Shown to fail: with `is_epoch` returning True."""
    await keyvault.create_tenant("2020-01-01")
    await keyvault.sql(
        "INSERT INTO epoch_kek (name, kek_backend) VALUES ('tenant/2020-01-01', 'local'),"
        " ('x', 'local'), ('content/2020-01-01', 'local')"
    )
    await keyvault.app._epochs.tick()
    assert await keyvault.sql("SELECT 1 FROM local_kek WHERE name = 'tenant/2020-01-01'")
    assert not await keyvault.sql("SELECT 1 FROM epoch_kek WHERE name = 'content/2020-01-01'")


@pytest.mark.parametrize("name", ["content/9999-12-31", "content/9999-12-30", "content/2999-01-01"])
async def test_no_epoch_row_stops_the_others(keyvault, name):
    """Shown to fail: with an overflow not caught; with epochs of any time to come."""
    await keyvault.sql(
        "INSERT INTO epoch_kek (name, kek_backend) VALUES (%s, 'local'),"
        " ('content/2020-01-01', 'local')",
        name,
    )
    await keyvault.app._epochs.tick()
    assert not await keyvault.sql("SELECT 1 FROM epoch_kek WHERE name = 'content/2020-01-01'")
    found = await needed.needs(keyvault.app._database, datetime.timedelta(days=90))
    assert found["local"].epochs_end < epochs.clock() + datetime.timedelta(days=120)


async def test_the_databases_clock_alone_destroys_no_epoch(keyvault, monkeypatch, caplog):
    """Shown to fail: with the database's time alone; with its difference not told."""
    read = epochs.store.now

    async def later(database):
        return await read(database) + datetime.timedelta(days=200)

    monkeypatch.setattr(epochs.store, "now", later)
    before = await keyvault.sql("SELECT name FROM local_kek WHERE name LIKE 'content/%%'")
    await keyvault.app._epochs.tick()
    after = await keyvault.sql("SELECT name FROM local_kek WHERE name LIKE 'content/%%'")
    assert before
    assert set(before) <= set(after)
    assert "clocks_differ" in caplog.text


async def test_names_mean_postgresqls_own(deployment):
    """A function and a role's own search_path don't stand in for PostgreSQL's.

    Shown to fail: with the search_path left to the role.
    """
    async with running(deployment) as keyvault:
        await keyvault.sql(
            "CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql"
            " RETURN pg_catalog.now() + interval '200 days'"
        )
        ((database, role),) = await keyvault.sql("SELECT current_database(), current_user")
        await keyvault.sql(
            f'ALTER ROLE "{role}" IN DATABASE "{database}" SET search_path = public, pg_catalog'
        )
    async with running(deployment) as keyvault:
        now = await epochs.store.now(keyvault.app._database)
    assert now < epochs.clock() + datetime.timedelta(days=1)
