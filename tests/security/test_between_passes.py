"""What stands in the database for a moment only, or where no pass looks: rows that are put back
between passes, events kept from the log, notes and numbers of before.

All of it is plain SQL on keyvault's own database; LOOT is a copy that the attacker keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from unittest.mock import AsyncMock

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, custody_pb2

from services.keyvault import chain, staging
from services.keyvault.anchor_store import FileAnchor
from services.keyvault.service import admin
from services.keyvault.store import log as log_store
from services.keyvault.store import reconcile as reconcile_store
from tests.harness import keyvault as kv
from tests.harness.keyvault import refusal, try_lease

OLD = "sk-proj-" + "o" * 40
NEW = "sk-proj-" + "n" * 40
WORD = {"tenant": "tenants/acme", "reason": "incident 7"}
LOOT = "CREATE TABLE loot AS SELECT * FROM key_version"
PUT_BACK = """
UPDATE key_version v SET state = l.state, state_sequence = l.state_sequence, state_mac = l.state_mac
FROM loot l WHERE (v.key_id, v.version) = (l.key_id, l.version)
"""
KEPT_FROM_LOG = "UPDATE chain SET logged_sequence = sequence WHERE chain = 'tenants/acme'"


async def _hold(keyvault) -> None:
    await keyvault.admin.RevokeTenant(admin_pb2.RevokeTenantRequest(**WORD))


async def _resume(keyvault) -> None:
    await keyvault.admin.ResumeTenant(admin_pb2.ResumeTenantRequest(**WORD))


async def _holding(keyvault, table: str) -> None:
    """Put rows of a hold in the place of those that are there."""
    await keyvault.sql("DELETE FROM tenant_hold")
    await keyvault.sql(f"INSERT INTO tenant_hold SELECT * FROM {table}")


async def test_an_operators_hold_does_not_ask_a_row_whether_it_is_held(keyvault):
    """Shown to fail: where RevokeTenant writes nothing because a row says so already."""
    key = await keyvault.add_active()
    await _hold(keyvault)
    await keyvault.sql("CREATE TABLE held AS SELECT * FROM tenant_hold")
    await _resume(keyvault)
    await keyvault.sql("CREATE TABLE free AS SELECT * FROM tenant_hold")
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql("UPDATE lease SET end_time = now() WHERE end_time IS NULL")
    await _holding(keyvault, "held")
    await _hold(keyvault)
    await _holding(keyvault, "free")
    await kv.followed(keyvault)
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_an_invented_resumption_without_a_row_resumes_nothing(keyvault):
    """Shown to fail: where only a tenant that is told to be held needs its row."""
    key = await keyvault.add_active()
    await _hold(keyvault)
    await kv.followed(keyvault)
    await kv.plant(keyvault, type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED)
    ((number,),) = await keyvault.sql("SELECT sequence FROM chain WHERE chain = 'tenants/acme'")
    await keyvault.sql(
        "UPDATE tenant_hold SET held = false, state_sequence = %s, state_mac = '\\x00'", number
    )
    await kv.followed(keyvault)
    await keyvault.sql("DELETE FROM tenant_hold")
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


@contextlib.asynccontextmanager
async def _forgotten(keyvault, *statements: str) -> AsyncIterator[None]:
    """Take a chain's events away again, within the second before the log has them."""
    ((number, head),) = await keyvault.sql(
        "SELECT sequence, hash FROM chain WHERE chain = 'tenants/acme'"
    )
    async with keyvault.app._anchor._ticking:
        yield
        for statement in statements:
            await keyvault.sql(statement)
        await keyvault.sql(
            "DELETE FROM audit_event WHERE chain = 'tenants/acme' AND sequence > %s", number
        )
        await keyvault.sql(
            "UPDATE chain SET sequence = %s, hash = %s, logged_sequence = %s"
            " WHERE chain = 'tenants/acme'",
            *(number, head, number),
        )


async def test_a_row_of_an_event_that_was_lost_is_not_leased(keyvault):
    """Its number was given to something else since. Shown to fail: where a lease refuses a row only
    that is older than what its chain tells."""
    key = await keyvault.add_active(OLD)
    key_id = key.name.rpartition("/")[2]
    key = await keyvault.add_active(NEW, key_id=key_id, operation="rotate")
    other = await keyvault.add_active(name="other")
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE kept AS SELECT * FROM key_version")
    statements = LOOT, "DELETE FROM key_version", "INSERT INTO key_version SELECT * FROM kept"
    async with _forgotten(keyvault, *statements):
        await keyvault.change("RollBackKey", key.name)
    assert [await try_lease(keyvault, other) for _ in range(4)] == [""] * 4
    assert await try_lease(keyvault, key, key_version=2) == ""
    await kv.followed(keyvault)
    await keyvault.sql(PUT_BACK + "AND v.version = 1")
    assert await try_lease(keyvault, key, key_version=1) == "RECONCILE_MISMATCH"


async def test_a_hold_of_an_event_that_was_lost_holds_no_more_and_no_less(keyvault):
    """Also where its number is beyond the chain's head. Shown to fail: without the comparison of a
    hold's row with what was followed, and without that with the head."""
    key = await keyvault.add_active()
    await kv.followed(keyvault)
    async with _forgotten(
        keyvault, "CREATE TABLE free AS SELECT * FROM tenant_hold", "DELETE FROM tenant_hold"
    ):
        await _hold(keyvault)
        await _resume(keyvault)
    await _hold(keyvault)
    await kv.followed(keyvault)
    await _holding(keyvault, "free")
    assert [await try_lease(keyvault, key) for _ in range(2)] == ["RECONCILE_MISMATCH"] * 2


async def test_what_is_kept_from_the_log_is_followed_once_a_lease_saw_it(keyvault, monkeypatch):
    """However many chains there are. Shown to fail: without following what leases saw."""
    key = await keyvault.add_active()
    await kv.followed(keyvault)
    await keyvault.sql(LOOT)
    await keyvault.change("RevokeKey", key.name)
    await keyvault.sql(PUT_BACK)
    monkeypatch.setattr(keyvault.app._reconcile, "_check_heads", lambda _: asyncio.sleep(0))
    await keyvault.sql(KEPT_FROM_LOG)
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql(KEPT_FROM_LOG)
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) != ""


@pytest.mark.parametrize(
    "what", [audit_pb2.AUDIT_EVENT_TYPE_REVOKED, audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED]
)
async def test_retention_states_nothing_anew_that_somebody_took_away(deployment, what):
    """Of what it kept. Shown to fail: where what is stored of it is not held against what was
    stated before."""
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        await kv.followed(keyvault)
        await keyvault.sql(LOOT)
        if what == audit_pb2.AUDIT_EVENT_TYPE_REVOKED:
            await keyvault.sql("DELETE FROM key_version")
            await refusal(keyvault.change("RevokeKey", key.name))
        else:
            await _hold(keyvault)
        await _prune(keyvault)
        rows = await keyvault.sql("SELECT sequence, body FROM audit_carried")
        kept = [n for n, body in rows if audit_pb2.AuditEvent.FromString(body).type == what]
        assert kept
        await keyvault.add_active(name="another")
        await keyvault.sql("DELETE FROM audit_carried WHERE sequence = ANY(%s)", kept)
        await _prune(keyvault)
    async with kv.database(deployment) as sql:
        await sql.execute("DELETE FROM reconcile_part")
        await sql.execute("DELETE FROM tenant_hold")
        await sql.execute("INSERT INTO key_version SELECT * FROM loot ON CONFLICT DO NOTHING")
    async with kv.running(deployment) as keyvault:
        await kv.followed(keyvault)
        assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def _prune(keyvault) -> None:
    await kv.followed(keyvault)
    await kv.prune(keyvault)
    await kv.followed(keyvault)


async def test_no_key_is_rolled_back_to_a_frozen_version(keyvault):
    """It would have no version any more that is leased. Shown to fail: where only what is over or
    older keeps a version from being ACTIVE."""
    key = await keyvault.add_active(OLD)
    await keyvault.tick()
    await keyvault.sql(LOOT)
    key_id = key.name.rpartition("/")[2]
    key = await keyvault.add_active(NEW, key_id=key_id, operation="rotate")
    await keyvault.sql("CREATE TABLE good AS SELECT * FROM key_version")
    await keyvault.tick()
    await keyvault.sql(PUT_BACK)
    await kv.followed(keyvault)
    await keyvault.sql(PUT_BACK.replace("loot", "good"))
    assert await refusal(keyvault.change("RollBackKey", key.name)) == "RECONCILE_MISMATCH"
    assert await try_lease(keyvault, key, key_version=2) == ""


@pytest.mark.parametrize("faster", [False, True])
async def test_a_start_beside_another_replicas_save(deployment, monkeypatch, faster):
    """What one replica anchored and kept while the other began to read is no contradiction, also
    where that one is faster with the anchor once more. Shown to fail: without a second pass on the
    anchor as it is then, and where a position is known only by who writes it."""
    async with kv.running(deployment) as one:
        await one.create_tenant()
        key = await one.add_active()
        await kv.followed(one)
        await one.app._reconcile.save()
        read, write, done = reconcile_store.parts, FileAnchor.write, []

        async def parts(database):
            if database is not one.app._reading and not done:
                done.append("saved")
                await one.add_active(name="another")
                await one.app._anchor.tick()
                await one.app._reconcile.once()
                await one.app._reconcile.save()
                await one.add_active(name="third")
            return await read(database)

        async def second(self, text, before):
            if faster and self is not one.app._anchor._store and done == ["saved"]:
                done.append("faster")
                await one.app._anchor.tick()
            return await write(self, text, before)

        monkeypatch.setattr(reconcile_store, "parts", parts)
        monkeypatch.setattr(FileAnchor, "write", second)
        async with kv.running(deployment) as other:
            assert done
            assert not other.app._anchor.rolled_back
            assert await try_lease(other, key) == ""


async def test_a_pass_that_was_held_up_is_as_old_as_its_beginning(keyvault, deployment):
    """Shown to fail: where a pass counts from its end."""
    reconcile = keyvault.app._reconcile
    await keyvault.create_tenant("zeta")
    await keyvault.add_active(tenant="zeta")
    await kv.followed(keyvault)
    await keyvault.sql(
        "UPDATE key_version SET state_sequence = state_sequence - 1 WHERE tenant = 'zeta'"
    )
    async with kv.database(deployment) as locker, locker.transaction():
        await locker.execute("SELECT FROM chain WHERE chain = 'tenants/zeta' FOR UPDATE")
        passing = asyncio.create_task(reconcile.once())
        await asyncio.sleep(0.5)
        assert not passing.done()
        middle = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
    await passing
    assert reconcile._passed < middle


async def test_a_freeze_that_could_not_be_recorded_is_recorded_by_the_next_pass(
    keyvault, monkeypatch
):
    """Shown to fail: where a version is frozen in memory before its event is committed."""
    key = await keyvault.add_active()
    await kv.followed(keyvault)
    await keyvault.sql(LOOT)
    await keyvault.change("RevokeKey", key.name)
    await keyvault.tick()
    await keyvault.sql(PUT_BACK)
    append, failed = chain.append, 0

    async def fails_once(connection, head, deployment, events):
        nonlocal failed
        if events and events[0].type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED and not failed:
            failed += 1
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return await append(connection, head, deployment, events)

    monkeypatch.setattr(chain, "append", fails_once)
    for _ in range(4):
        await keyvault.app._anchor.tick()
        await asyncio.gather(keyvault.app._reconcile.once(), return_exceptions=True)
    said = [one for one in await keyvault.events() if one.reason == "RECONCILE_MISMATCH"]
    assert (failed, len(said), keyvault.app._reconcile.frozen()) == (1, 1, 1)


async def test_what_was_hidden_from_a_shredding_is_not_activated_after_it(keyvault):
    """An honest rotation gives the version that is put back a number of after the shredding. Shown
    to fail: where an event of a version that was shredded sets its state."""
    key = await keyvault.add_active(OLD)
    key_id = key.name.rpartition("/")[2]
    await kv.followed(keyvault)
    await keyvault.sql(LOOT)
    await keyvault.sql("DELETE FROM key_version")
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    await keyvault.create_tenant()
    await kv.followed(keyvault)
    await keyvault.sql("INSERT INTO key_version SELECT * FROM loot")
    await keyvault.stage(NEW, key_id=key_id, operation="rotate")
    await keyvault.promote(key.name, 2)
    await kv.followed(keyvault)
    assert await refusal(keyvault.change("RollBackKey", key.name)) == "RECONCILE_MISMATCH"


@pytest.mark.parametrize("rotated", [False, True])
async def test_no_key_is_staged_while_its_tenant_is_shredded(keyvault, monkeypatch, rotated):
    """The shredding would not see it, and its chain would call it destroyed. Where a job let it in,
    for there is a KEK still, the shredding looks again. Shown to fail: without the minimum that is
    raised first, and without the second look."""
    await keyvault.add_active(OLD)
    late, told = await keyvault.stage_request(NEW, name="second"), []
    rotate = admin_pb2.RotateTenantKeyRequest(tenant="tenants/acme", request_id=new_id("req"))
    stored = admin.key_store.stored

    async def with_a_late_key(database, tenant):
        found = await stored(database, tenant)
        if rotated and not told:
            await keyvault.admin.RotateTenantKey(rotate)
        told.append(await refusal(keyvault.custody.StageKey(late)))
        return found

    monkeypatch.setattr(admin.key_store, "stored", with_a_late_key)
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    assert told[0] == ("" if rotated else "TENANT_KEY_MISSING")
    await kv.followed(keyvault)
    assert keyvault.app._reconcile.frozen() == 0


async def test_changes_of_one_tenant_do_not_wait_for_who_follows_its_chain(keyvault):
    """More of them than there are connections, all behind the lock of one who must read on. Shown
    to fail: where chains are followed on the connections of everybody."""
    keys = [await keyvault.add_active(name=f"key-{number}") for number in range(12)]
    await kv.followed(keyvault)
    reconcile, revoking = keyvault.app._reconcile, []

    async def act(connection, head, versions):
        revoking.extend(
            asyncio.ensure_future(keyvault.change("RevokeKey", key.name)) for key in keys
        )
        while keyvault.app._database._pool.get_stats()["requests_waiting"] < 2:
            await asyncio.sleep(0.01)
        await reconcile.following.follow(head.chain)

    await asyncio.wait_for(reconcile.at_head("tenants/acme", act), 4.0)
    await asyncio.gather(*revoking)


@pytest.mark.parametrize("method", ["RevokeKey", "DestroyKey"])
async def test_the_same_request_again_is_said_once(keyvault, method):
    """Before its event is followed too. Shown to fail: where a noted request does not count."""
    key = await keyvault.add_active()
    request = getattr(custody_pb2, f"{method}Request")(
        name=key.name, request_id=new_id("req"), actor="test"
    )
    for _ in range(3):
        await getattr(keyvault.custody, method)(request)
    whole = [one for one in await keyvault.events() if one.key_id and not one.key_version]
    assert len(whole) == 1
    assert len(await keyvault.sql("SELECT phase FROM kek_job")) == (method == "DestroyKey")


async def test_a_data_key_of_before_a_move_proves_nothing(keyvault):
    """A version that moved has had two that keyvault wrote: the older one, beside the newer
    envelope, must not let the KEK be trimmed that a backup needs. Shown to fail: with a MAC of the
    data key alone."""
    wrap = "wrapped_dek, wrap_mac, kek_version"
    key, other = await keyvault.add_active(), await keyvault.add_active(name="other")
    await kv.followed(keyvault)
    await keyvault.sql("CREATE TABLE old AS SELECT * FROM key_version")
    await keyvault.sql("UPDATE key_version SET wrap_mac = '\\x00', kek_version = 0")
    request = admin_pb2.RewrapTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    async for told in keyvault.admin.RewrapTenant(request):
        assert not told.failed
    await keyvault.sql("DELETE FROM kek_job")
    await keyvault.sql("CREATE TABLE backup AS SELECT * FROM key_version")
    put_back = (
        f"UPDATE key_version v SET ({wrap}, envelope) = (SELECT {{}} FROM {{}} o"
        " WHERE o.key_id = v.key_id)"
    )
    await keyvault.sql(put_back.format(f"{wrap}, v.envelope", "old"))
    await keyvault.change("DestroyKey", other.name)
    assert await kv.swept(keyvault) == "PARTIAL"
    await keyvault.sql(put_back.format(f"{wrap}, envelope", "backup"))
    assert await try_lease(keyvault, key) == ""


async def test_what_contradicts_is_a_verdict_though_the_log_grew(keyvault):
    """What was followed is all that tells of it. Shown to fail: where a pass is made once more, on
    nothing that was followed, for any contradiction."""
    await keyvault.create_tenant("zeta")
    await kv.followed(keyvault)
    ((number, head),) = await keyvault.sql(
        "SELECT sequence, hash FROM chain WHERE chain = 'system'"
    )
    async with keyvault.app._anchor._ticking:
        await kv.plant(keyvault, "system", type=audit_pb2.AUDIT_EVENT_TYPE_RELEASED)
        await keyvault.app._reconcile.once()
        await keyvault.sql(
            "DELETE FROM audit_event WHERE chain = 'system' AND sequence > %s", number
        )
        await keyvault.sql(
            "UPDATE chain SET sequence = %s, hash = %s WHERE chain = 'system'", number, head
        )
        await kv.plant(keyvault, "tenants/zeta", type=audit_pb2.AUDIT_EVENT_TYPE_RELEASED)
    await keyvault.app._reconcile.once()
    assert keyvault.app._anchor.rolled_back


async def test_a_head_is_missed_in_the_log_whatever_its_row_says(keyvault, deployment, caplog):
    """Also where it says that it is still to be logged whenever a pass looks. Shown to fail: where
    only a head that claims to be logged is looked for."""
    await keyvault.create_tenant("zeta")
    await keyvault.add_active()
    await kv.followed(keyvault)
    said = "UPDATE chain SET logged_sequence = sequence - %s WHERE chain = 'tenants/acme'"
    async with kv.database(deployment) as sql:
        lock = "SELECT pg_advisory_{}lock(hashtext('byokeep_log'))"
        await sql.execute(lock.format(""))
        await kv.plant(keyvault, type=audit_pb2.AUDIT_EVENT_TYPE_RELEASED)
        for _ in range(3):
            await sql.execute(said, (0,))
            await sql.execute(lock.format("un"))
            await kv.plant(keyvault, "tenants/zeta", type=audit_pb2.AUDIT_EVENT_TYPE_RELEASED)
            await keyvault.app._anchor.tick()
            await sql.execute(lock.format(""))
            await sql.execute(said, (1,))
            await keyvault.app._reconcile.once()
        await sql.execute(lock.format("un"))
    assert "head_kept_from_log" in [one.getMessage() for one in caplog.records]


async def test_a_first_retention_keeps_nothing_that_was_kept_before(keyvault):
    """There is nothing that it could be. Shown to fail: where it states whatever it finds."""
    await keyvault.add_active()
    await kv.followed(keyvault)
    planted = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED)
    await keyvault.sql(
        "INSERT INTO audit_carried (chain, sequence, body) VALUES ('tenants/acme', 46, %s)",
        planted.SerializeToString(),
    )
    await _prune(keyvault)
    numbers = await keyvault.sql("SELECT sequence FROM audit_carried WHERE chain = 'tenants/acme'")
    assert numbers
    assert (46,) not in numbers


@pytest.mark.parametrize("how", ["the anchor is not written", "more heads than one tick takes"])
async def test_no_honest_head_is_missed_in_the_log(keyvault, monkeypatch, caplog, how):
    """Shown to fail: where any tick between two passes is one that took a head in."""
    for name in ("zeta", "eta", "theta", "iota"):
        await keyvault.create_tenant(name)
    await keyvault.app.background.close()
    await kv.followed(keyvault)
    if how == "the anchor is not written":
        monkeypatch.setattr(FileAnchor, "write", AsyncMock(side_effect=OSError))
        await keyvault.add_active()
    else:
        monkeypatch.setattr(log_store, "HEADS", 1)
        await keyvault.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason="a drill"))
    for _ in range(3):
        with contextlib.suppress(OSError):
            await keyvault.app._anchor.tick()
        await keyvault.app._reconcile.once()
    assert "head_kept_from_log" not in [one.getMessage() for one in caplog.records]


async def test_no_key_is_stored_after_its_tenant_was_shredded(keyvault, monkeypatch):
    """Its data key was made before, under a KEK that is gone. Shown to fail: where a shredding
    forgets the minimum that it set."""
    await keyvault.add_active(OLD)
    late = await keyvault.stage_request(NEW, name="second")
    opened, shredded, open_ = asyncio.Event(), asyncio.Event(), staging.Staging._open

    async def slow(self, *arguments):
        found = await open_(self, *arguments)
        opened.set()
        await shredded.wait()
        return found

    monkeypatch.setattr(staging.Staging, "_open", slow)
    told = asyncio.create_task(refusal(keyvault.custody.StageKey(late)))
    await opened.wait()
    await keyvault.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
    )
    shredded.set()
    assert await told == "TENANT_KEY_MISSING"
    await keyvault.create_tenant()
    await keyvault.add_active(NEW, name="third")
