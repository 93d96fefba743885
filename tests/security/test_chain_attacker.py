"""Whoever can run any SQL on keyvault's database, against its chains, its log and its verdicts.

Each test is an attack that worked; what stops it now is named beside it.
"""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager

import pytest
from byokeep.keyvault.v1 import admin_pb2, audit_pb2

from services.common.errors import ByokeepError
from services.keyvault import chain, following
from services.keyvault import position as anchored
from services.keyvault.database import unreachable
from tests.harness import keyvault as kv
from tests.harness.keyvault import try_lease
from tests.security.test_audit import export, verify

_COLUMNS = "state, state_sequence, state_mac"
_RESUMED = audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED
_HEAD = "SELECT sequence, hash FROM chain WHERE chain = 'tenants/acme'"


@asynccontextmanager
async def two_tenants(deployment):
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        await keyvault.create_tenant("other")
        yield keyvault


async def test_rows_of_a_tenant_that_nobody_knows_stop_no_other(keyvault):
    """A row that can't be settled refuses its own tenant; the pass goes on for the others.

    Shown to fail: with a pass in which something is unsettled not counted.
    """
    key = await keyvault.add_active()
    await keyvault.sql(
        "INSERT INTO provider_key (tenant, key_id, provider, owner, display_name)"
        " VALUES ('ghost', 'key_x', 'openai', '', 'x')"
    )
    await keyvault.sql(
        "INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,"
        " kek_backend, kek_version) VALUES ('ghost', 'key_x', 1, 2, 1, '', '', 'local', 1)"
    )
    await keyvault.sql(
        "INSERT INTO tenant_hold (tenant, held, state_sequence, state_mac)"
        " VALUES ('spook', false, 1, '')"
    )
    keyvault.app._reconcile._passed -= 61
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == ""


async def test_a_difference_that_can_t_be_settled_refuses_its_tenant_at_once(keyvault, monkeypatch):
    """An old row put back, and whatever makes its confirmation fail: no lease in between.

    Shown to fail: without the look at `_unsettled` in Differences.refusal.
    """
    await keyvault.create_tenant("other")
    key, other = await keyvault.add_active(), await keyvault.add_active(tenant="other")
    before = (await keyvault.sql(f"SELECT {_COLUMNS} FROM key_version WHERE tenant = 'acme'"))[0]
    beside = await keyvault.add_active(name="beside")
    await keyvault.change("RevokeKey", key.name)
    await keyvault.tick()
    await keyvault.sql(
        f"UPDATE key_version SET ({_COLUMNS}) = (%s, %s, %s) WHERE key_id = %s",
        *(*before, key.name.rpartition("/")[2]),
    )

    async def fails(_, name):
        if name != "system":
            raise unreachable()

    with monkeypatch.context() as broken:
        broken.setattr(following.Following, "follow", fails)
        await keyvault.app._reconcile.once()
        assert await try_lease(keyvault, beside) == "AUDIT_UNAVAILABLE"
        assert await try_lease(keyvault, other) == ""
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, beside) == ""
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_a_pass_that_fails_of_what_is_stored_stops_leases_at_once(keyvault):
    """Not after the minute for which a lost connection is forgiven.

    Shown to fail: with every failed pass treated as a lost connection.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql("ALTER TABLE log_leaf RENAME COLUMN blind TO blond")
    await keyvault.change("RevokeKey", (await keyvault.add_active(name="second")).name)
    keyvault.app._anchor.position = anchored.Position(1 << 20)
    with pytest.raises(Exception):  # noqa: B017,PT011
        await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == "AUDIT_UNAVAILABLE"


async def test_carried_garbage_breaks_its_chain_and_nothing_else(deployment):
    """What retention kept, altered: that tenant has no lease; keyvault starts, and serves others.

    Shown to fail: with DecodeError let through by Following._from_start: no start any more.
    """
    async with two_tenants(deployment) as keyvault:
        key, other = await keyvault.add_active(), await keyvault.add_active(tenant="other")
        await kv.prune(keyvault)
        assert await keyvault.sql("SELECT 1 FROM audit_carried WHERE chain = 'tenants/acme'")
    for damage in (
        "UPDATE audit_carried SET body = '\\xff' WHERE chain = 'tenants/acme'",
        "INSERT INTO audit_carried (chain, sequence, body) SELECT chain, 1152921504606846976, body"
        " FROM audit_carried WHERE chain = 'tenants/other' ORDER BY sequence LIMIT 1",
    ):
        async with kv.database(deployment) as connection:
            await connection.execute("DELETE FROM reconcile_part")
            await connection.execute(damage)
        async with kv.running(deployment) as fresh:
            assert await try_lease(fresh, key) == "RECONCILE_MISMATCH"
            last = await try_lease(fresh, other)
    assert last == "RECONCILE_MISMATCH"


async def test_a_chain_broken_in_a_read_that_fails_is_not_forgotten(keyvault, monkeypatch):
    """A chain whose start was not read to its end is read again, not taken for known.

    Shown to fail: with `broken` filled before `chains`: KeyError in every pass from then on.
    """
    key = await keyvault.add_active()
    await keyvault.create_tenant("other")
    other = await keyvault.add_active(tenant="other")
    event = audit_pb2.AuditEvent(
        type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
        reason="RECONCILE_MISMATCH",
        detail="tenants/acme",
    )
    async with keyvault.app._database.transaction() as connection:
        head = await chain.lock(connection, "system")
        await chain.append(connection, head, kv.DEPLOYMENT, [event])
    await keyvault.app._anchor.tick()
    links = following.audit_store.links

    async def cut(database, name, after=0):
        async for row in links(database, name, after):
            yield row
        if name == "tenants/acme":
            raise unreachable()

    keyvault.app._reconcile._forget()
    with monkeypatch.context() as broken:
        broken.setattr(following.audit_store, "links", cut)
        with pytest.raises(Exception):  # noqa: B017,PT011
            await keyvault.app._reconcile.once()
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"
    assert await try_lease(keyvault, other) == ""


async def test_a_verdict_outlives_a_restart(deployment):
    """What was found to contradict the anchor stays distrusted, also where it was put right.

    Shown to fail: with the verdict not written beside the anchor.
    """
    async with two_tenants(deployment) as keyvault:
        key = await keyvault.add_active()
        await keyvault.tick()
        await keyvault.sql("UPDATE chain SET sequence = sequence - 1 WHERE chain = 'system'")
        await keyvault.app._reconcile.once()
        assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
        await keyvault.sql("UPDATE chain SET sequence = sequence + 1 WHERE chain = 'system'")
    for _ in range(2):
        async with kv.running(deployment) as again:
            assert await try_lease(again, key) == "DATABASE_ROLLED_BACK"
            await again.app._anchor.tick()
            assert await try_lease(again, key) == "DATABASE_ROLLED_BACK"
    async with kv.running(deployment) as again:
        await again.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason="looked at it"))
        assert await try_lease(again, key) == ""
    async with kv.running(deployment) as again:
        assert await try_lease(again, key) == ""


# Its end cut off, with and without what it was; its newest event another one than the log has.
_CUT = "UPDATE chain SET sequence = sequence - 1 WHERE chain = 'tenants/other'"
_GONE = (
    "DELETE FROM audit_event e USING chain c WHERE c.chain = 'tenants/other'"
    " AND e.chain = c.chain AND e.sequence = c.sequence"
)
_OTHER = (
    "UPDATE audit_event SET body = '', hash = sha256('byokeep/audit/v1\n'::bytea || previous_hash)"
    " WHERE chain = 'tenants/other' AND sequence = (SELECT sequence FROM chain"
    " WHERE chain = 'tenants/other')",
    "UPDATE chain SET hash = e.hash FROM audit_event e WHERE chain.chain = 'tenants/other'"
    " AND e.chain = chain.chain AND e.sequence = chain.sequence",
)


@pytest.mark.parametrize("damage", [(_CUT,), (_GONE, _CUT), _OTHER])
async def test_a_neighbours_damaged_chain_stops_no_other(deployment, damage):
    """A chain that contradicts the log holds its own tenant, on every replica and across restarts,
    also where it was put right again; another tenant's leases go on, and the system chain and
    GetStatus say which it is.

    Shown to fail: with a ContradictionError for whatever chain is cut; without the record in the
    system chain; with a promotion that doesn't ask.
    """
    async with two_tenants(deployment) as keyvault:
        key, other = await keyvault.add_active(), await keyvault.add_active(tenant="other")
        pending = await keyvault.stage(tenant="other", name="second")
        await keyvault.tick()
        tables = ("chain", "audit_event")
        whole = "WHERE chain = 'tenants/other'"
        for table in tables:
            await keyvault.sql(f"CREATE TABLE backup_{table} AS SELECT * FROM {table} {whole}")
        for statement in damage:
            await keyvault.sql(statement)
        await keyvault.sql("DELETE FROM reconcile_part")
        async with kv.running(deployment) as fresh:
            for one in (fresh, keyvault) if damage is not _OTHER else (fresh,):
                await one.tick()
                assert await try_lease(one, key) == ""
                assert await try_lease(one, other) == "RECONCILE_MISMATCH"
            status = await fresh.admin.GetStatus(admin_pb2.GetStatusRequest())
            assert list(status.broken_tenants) == ["other"]
            assert status.leases_allowed
            assert any(one.detail == "tenants/other" for one in await fresh.events("system"))
            assert await kv.refusal(fresh.promote(pending.name, 1)) == "RECONCILE_MISMATCH"
        await keyvault.tick()
        assert await try_lease(keyvault, other) == "RECONCILE_MISMATCH"
        await keyvault.sql(f"DELETE FROM audit_event {whole}")
        await keyvault.sql(f"DELETE FROM chain {whole}")
        for table in tables:
            await keyvault.sql(f"INSERT INTO {table} SELECT * FROM backup_{table}")
    async with kv.database(deployment) as connection:
        await connection.execute("DELETE FROM reconcile_part")
    async with kv.running(deployment) as again:
        assert await try_lease(again, key) == ""
        assert await try_lease(again, other) == "RECONCILE_MISMATCH"


async def test_a_verdict_reaches_every_replica(keyvault, deployment):
    """What one replica saw counts for all: the other looked before, or after it was put right.

    Shown to fail: with the anchor's verdict not read in Anchor.tick.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    async with kv.running(deployment) as other:
        await keyvault.app._anchor.distrust()
        await other.app._anchor.tick()
        assert await try_lease(other, key) == "DATABASE_ROLLED_BACK"


async def test_a_chain_that_always_says_it_is_logged(keyvault):
    """A trigger keeps `logged_sequence` at the head: the log takes the chain in all the same, from
    what its leaves say; and an export is signed meanwhile.

    Shown to fail: without Anchor.owe.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    await keyvault.sql(
        "CREATE FUNCTION hide() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.logged_sequence := NEW.sequence; RETURN NEW; END $$"
    )
    await keyvault.sql(
        "CREATE TRIGGER hide BEFORE UPDATE ON chain FOR EACH ROW"
        " WHEN (NEW.chain = 'tenants/acme') EXECUTE FUNCTION hide()"
    )
    assert await try_lease(keyvault, key) == ""
    leaves = "SELECT max(sequence) FROM log_leaf WHERE chain = 'tenants/acme'"
    head = (await keyvault.sql(_HEAD))[0]
    await keyvault.app._anchor.tick()
    assert (await keyvault.sql(leaves))[0][0] < head[0]
    await keyvault.tick()
    await keyvault.tick()
    await keyvault.tick()
    assert (await keyvault.sql(leaves))[0][0] == head[0]
    assert await try_lease(keyvault, key) == ""
    assert verify(keyvault, await export(keyvault)).head.sequence == head[0] + 1


async def test_a_head_below_zero_stops_no_log(keyvault):
    """Shown to fail: without `sequence > 0` in store.log."""
    key = await keyvault.add_active()
    await keyvault.sql("INSERT INTO chain (chain, sequence, hash) VALUES ('tenants/x', -5, '')")
    await keyvault.tick()
    assert await try_lease(keyvault, key) == ""


async def test_retention_that_somebody_else_states(deployment):
    """A statement of retention, well linked, over a past without the revocation: not keyvault's.

    Shown to fail: with `carried_hash` a digest that anybody can make.
    """
    async with two_tenants(deployment) as keyvault:
        key = await keyvault.add_active()
        await keyvault.tick()
        before = (await keyvault.sql(f"SELECT {_COLUMNS} FROM key_version"))[0]
        await keyvault.change("RevokeKey", key.name)
        await keyvault.tick()
    async with kv.database(deployment) as connection:
        head = await (await connection.execute(_HEAD)).fetchone()
        found = await connection.execute(
            "SELECT sequence, body FROM audit_event WHERE chain = 'tenants/acme'"
            " AND sequence < %s ORDER BY sequence",
            (head[0],),
        )
        kept = hashlib.sha256(b"byokeep/carried/v1\n")
        for sequence, body in await found.fetchall():
            if audit_pb2.AuditEvent.FromString(body).type == audit_pb2.AUDIT_EVENT_TYPE_REVOKED:
                continue
            kept.update(sequence.to_bytes(8, "big") + hashlib.sha256(body).digest())
            await connection.execute(
                "INSERT INTO audit_carried VALUES ('tenants/acme', %s, %s)", (sequence, body)
            )
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED,
            pruned_sequence=head[0],
            pruned_hash=head[1],
            carried_hash=kept.digest(),
        )
        locked = await chain.lock(connection, "tenants/acme")
        await chain.append(connection, locked, kv.DEPLOYMENT, [event])
        for statement in (
            "DELETE FROM audit_event WHERE chain = 'tenants/acme' AND sequence <= %(at)s",
            "UPDATE chain SET pruned_sequence = %(at)s, pruned_hash = %(hash)s"
            " WHERE chain = 'tenants/acme'",
            "DELETE FROM reconcile_part",
        ):
            await connection.execute(statement, {"at": head[0], "hash": head[1]})
        await connection.execute(f"UPDATE key_version SET ({_COLUMNS}) = (%s, %s, %s)", before)
    async with kv.running(deployment) as fresh:
        assert await try_lease(fresh, key) == "RECONCILE_MISMATCH"


async def test_a_chain_of_another_name_lifts_no_hold(keyvault):
    """A planted chain `acme`, with a resumption where tenant acme's own had one, speaks for nobody.

    Shown to fail: with every chain's events taken for those of the tenant of its name.
    """
    key = await keyvault.add_active()
    word = {"tenant": "tenants/acme", "reason": "a drill"}
    await keyvault.admin.RevokeTenant(admin_pb2.RevokeTenantRequest(**word))
    await keyvault.admin.ResumeTenant(admin_pb2.ResumeTenantRequest(**word))
    row = "held, state_sequence, state_mac"
    before = (await keyvault.sql(f"SELECT {row} FROM tenant_hold"))[0]
    await keyvault.admin.RevokeTenant(admin_pb2.RevokeTenantRequest(**word))
    await keyvault.tick()
    async with keyvault.app._database.transaction() as connection:
        await chain.create(connection, "acme")
        head = await chain.lock(connection, "acme")
        filler = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_DENIED)
        events = [audit_pb2.AuditEvent.FromString(filler.SerializeToString())] * (before[1] - 1)
        for event in [*events, audit_pb2.AuditEvent(type=_RESUMED)]:
            head = await chain.append(connection, head, kv.DEPLOYMENT, [event])
    await keyvault.app._anchor.tick()
    await keyvault.sql(f"UPDATE tenant_hold SET ({row}) = (%s, %s, %s)", *before)
    await keyvault.app._reconcile.once()
    assert await try_lease(keyvault, key) == "RECONCILE_MISMATCH"


async def test_a_damaged_system_chain_stops_everything(keyvault):
    """It holds which tenants' chains were altered: one bad link in it would let go of them, and
    hide what is cut off it later. Shown to fail where its damage is taken for a tenant's."""
    key = await keyvault.add_active()
    await keyvault.tick()
    assert await try_lease(keyvault, key) == ""
    await keyvault.sql(
        "INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)"
        " SELECT chain, sequence + 1, '', 'x', 'x', 'x' FROM chain WHERE chain = 'system'"
    )
    await keyvault.tick()
    assert await try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
    with pytest.raises(ByokeepError) as refused:
        await keyvault.app._reconcile.head("system")
    assert refused.value.reason == "RECONCILE_MISMATCH"


@pytest.mark.parametrize(
    "named", ["tenants/nobody\0", "tenants/", "tenants/acme\0", "tenants/\uffff"]
)
async def test_an_event_that_names_no_tenant_stops_no_pass(keyvault, named):
    """In the system chain, of a tenant whose name the database can't even be asked for.

    Shown to fail where the keys of whatever an event names are counted.
    """
    key = await keyvault.add_active()
    await keyvault.tick()
    mark = audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
    await kv.plant(keyvault, "system", type=mark, reason=following.MISMATCH, detail=named)
    for _ in range(2):
        await keyvault.tick()
    assert await try_lease(keyvault, key) == ""
    await keyvault.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason="looked into"))
    await keyvault.tick()
    assert await try_lease(keyvault, key) == ""
    status = await keyvault.admin.GetStatus(admin_pb2.GetStatusRequest())
    assert status.frozen_keys == 0


@pytest.mark.parametrize("named", ["system", "tenants/other"])
async def test_a_tenants_chain_does_not_speak_for_others(keyvault, named):
    """Shown to fail where any chain may say that another is broken."""
    await keyvault.create_tenant("other")
    other = await keyvault.add_active(tenant="other")
    await keyvault.tick()
    mark = audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
    await kv.plant(keyvault, "tenants/acme", type=mark, reason=following.MISMATCH, detail=named)
    await keyvault.tick()
    assert keyvault.app._reconcile.following.broken == set()
    assert await try_lease(keyvault, other) == ""
