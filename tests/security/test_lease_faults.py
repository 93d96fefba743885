"""The database goes away in the middle of a lease: nothing is released, and it heals unaided."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager

import psycopg
import pytest
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from deploy.local.postgres import EmbeddedPostgres, new_password
from services.keyvault import limits, migrate
from services.keyvault.database import DuplicateError
from services.keyvault.sql import ledger
from tests.harness import keyvault as kv
from tests.harness import scratch
from tests.harness.keyvault import Child, grant_for, lease_request, refusal, try_lease

pytestmark = pytest.mark.deep

_FAR = Timestamp(seconds=2**32 - 1)
_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


async def _stored(keyvault, grant_id: str) -> tuple[int, int]:
    """How often a grant is redeemed, and how often its LEASED event is in the chain."""
    usage = (await keyvault.app.ledger.read("acme")).usage
    redeemed = limits.used(usage, kv.grant_pb2.Grant(grant_id=grant_id, expire_time=_FAR))
    leased = audit_pb2.AUDIT_EVENT_TYPE_LEASED
    events = [one for one in await keyvault.events() if one.type == leased]
    return int(redeemed), sum(one.grant_id == grant_id for one in events)


@asynccontextmanager
async def _locked(keyvault):
    """The tenant's row, locked by somebody else."""
    async with keyvault.app.database.transaction() as connection:
        await connection.execute("SELECT 1 FROM tenant WHERE name = 'acme' FOR UPDATE")
        yield


async def _heals(keyvault, key) -> None:
    async with asyncio.timeout(60):
        while await try_lease(keyvault, key) != "":
            await asyncio.sleep(0.05)


async def test_connection_lost_before_the_commit(keyvault, monkeypatch):
    """Every connection is cut after the redemption is sent, before its commit: UNAVAILABLE for
    every lease of the group, none is stored, and the grants can be used afterwards.

    Shown to fail: with Ledger.group answering from inside of the pipelined block.
    """
    key = await keyvault.add_active()
    write, cut = ledger.write, asyncio.Event()

    async def cut_after(connection, change) -> None:
        await write(connection, change)
        if change.leases and not cut.is_set():
            cut.set()
            pid = connection.info.backend_pid
            await keyvault.sql("SELECT pg_terminate_backend(%s)", pid)

    monkeypatch.setattr(ledger, "write", cut_after)
    child = Child()
    grants = [grant_for(key, child) for _ in range(5)]
    requests = [lease_request(keyvault.deployment, one, child) for one in grants]
    # Held, so that all five come into groups behind it.
    async with _locked(keyvault):
        calls = [asyncio.create_task(refusal(keyvault.leases().LeaseKey(one))) for one in requests]
        await asyncio.sleep(0.3)
    reasons = await asyncio.gather(*calls)
    assert cut.is_set()
    assert set(reasons) <= {"", "DEPENDENCY_UNAVAILABLE"}
    assert "DEPENDENCY_UNAVAILABLE" in reasons
    for grant, request, reason in zip(grants, requests, reasons, strict=True):
        given = reason == ""
        assert await _stored(keyvault, grant.grant_id) == (given, given)
        expected = "GRANT_REFUSED" if given else ""
        assert await refusal(keyvault.leases().LeaseKey(request)) == expected


async def test_connections_lost_at_any_time(keyvault):
    """Connections are cut again and again while leases are given: each grant is unused, or used
    and audited, and never released without that."""
    key = await keyvault.add_active()
    child = Child()
    grants = [grant_for(key, child) for _ in range(40)]

    async def cut() -> None:

        url = keyvault.deployment.database_url
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            for _ in range(8):
                await connection.execute(_OTHERS)
                await asyncio.sleep(0.02)

    async def lease(grant) -> str:
        request = lease_request(keyvault.deployment, grant, child)
        return await refusal(keyvault.leases().LeaseKey(request))

    cutting = asyncio.create_task(cut())
    reasons = await asyncio.gather(*(lease(one) for one in grants))
    await cutting
    await _heals(keyvault, key)
    assert set(reasons) <= {"", "DEPENDENCY_UNAVAILABLE"}
    for grant, reason in zip(grants, reasons, strict=True):
        leases, events = await _stored(keyvault, grant.grant_id)
        assert leases == events
        if reason == "":
            assert leases == 1


async def test_a_database_that_hangs_is_given_up(keyvault, monkeypatch):
    """Nobody waits for ever: the group is given up, and the next one goes on.

    Shown to fail: without the deadline of a round trip in postgres.Connection.wait.
    """
    monkeypatch.setattr("services.common.postgres.ROUND_TRIP_SECONDS", 1.0)
    key = await keyvault.add_active()
    async with _locked(keyvault):
        async with asyncio.timeout(60):
            assert await try_lease(keyvault, key) == "DEPENDENCY_UNAVAILABLE"
    await _heals(keyvault, key)
    assert await keyvault.sql("SELECT count(*) FROM lease") == [(1,)]


async def test_a_tenant_that_waits_does_not_hold_up_another(keyvault):
    """One tenant is locked for long: leases of other tenants are given meanwhile.

    Shown to fail: with one lane (group._LANES = 1).
    """
    await keyvault.create_tenant("other")
    stuck, free = await keyvault.add_active(), await keyvault.add_active(tenant="other")
    async with _locked(keyvault):
        waiting = [asyncio.create_task(try_lease(keyvault, stuck)) for _ in range(3)]
        await asyncio.sleep(0.2)
        async with asyncio.timeout(60):
            assert [await try_lease(keyvault, free) for _ in range(3)] == [""] * 3
        assert not any(one.done() for one in waiting)
    assert await asyncio.gather(*waiting) == [""] * 3


async def test_a_transaction_that_failed_is_not_taken_for_committed(keyvault):
    """Database.pipelined: all or nothing, whatever fails in it and wherever it is noticed."""
    database = keyvault.app.database
    await keyvault.sql("CREATE TABLE one (number integer PRIMARY KEY)")

    async def insert(*statements: str, fetch: bool = False) -> None:
        async with database.pipelined() as connection:
            for statement in statements:
                cursor = await connection.execute(statement)
                if fetch:
                    await cursor.fetchall()

    two = "INSERT INTO one VALUES (2) RETURNING 1"
    await insert("INSERT INTO one VALUES (1) RETURNING 1", fetch=True)
    for fetch in (False, True):
        with pytest.raises(DuplicateError):
            await insert(two, "INSERT INTO one VALUES (1) RETURNING 1", fetch=fetch)
        with pytest.raises(Exception, match="nothing was released"):
            await insert(two, "SELECT 1 / 0", "INSERT INTO one VALUES (3) RETURNING 1", fetch=fetch)

    async def give_up() -> None:
        async with database.pipelined() as connection:
            await connection.execute(two)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await give_up()
    waiting = asyncio.create_task(insert(two, "SELECT pg_sleep(60)", fetch=True))
    await asyncio.sleep(0.3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await keyvault.sql("SELECT number FROM one") == [(1,)]


async def test_commits_are_on_the_disk_whatever_the_role_says(keyvault):
    """The database's owner may have loosened the defaults: keyvault's connections say their own.

    Shown to fail: without _OPTIONS in database.py.
    """
    key = await keyvault.add_active()
    for setting in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'"):
        await keyvault.sql(f"ALTER ROLE CURRENT_USER SET {setting}")
    try:
        await keyvault.sql(_OTHERS)
        shown = []
        for setting in ("synchronous_commit", "transaction_isolation"):
            fresh = await keyvault.app.database._pool.connection_class.connect(
                keyvault.deployment.database_url, **keyvault.app.database._pool.kwargs
            )
            async with fresh:
                shown.append(await (await fresh.execute(f"SHOW {setting}")).fetchone())
        assert shown == [("on",), ("read committed",)]
    finally:
        await _heals(keyvault, key)
        await keyvault.sql("ALTER ROLE CURRENT_USER RESET ALL")


async def test_a_database_that_stops_and_comes_back(tmp_path):
    """PostgreSQL stops: UNAVAILABLE, nothing is released; it comes back: leases go on unaided.

    The grant that met the stopped database is unused.
    """
    folder = scratch.folder()
    server = EmbeddedPostgres(folder)
    try:
        await asyncio.to_thread(server.start)
        url = server.create_database("keyvault_stops", "byokeep_keyvault", new_password())
        await asyncio.to_thread(migrate.upgrade, url)
        async with kv.running(kv.Deployment(tmp_path, url)) as keyvault:
            await keyvault.create_tenant()
            key = await keyvault.add_active()
            child = Child()
            request = lease_request(keyvault.deployment, grant_for(key, child), child)
            await asyncio.to_thread(server.stop)
            assert await refusal(keyvault.leases().LeaseKey(request)) == "DEPENDENCY_UNAVAILABLE"
            await asyncio.to_thread(server.start)
            await _heals(keyvault, key)
            async with asyncio.timeout(60):
                while (last := await refusal(keyvault.leases().LeaseKey(request))) != "":
                    assert last in ("DEPENDENCY_UNAVAILABLE", "AUDIT_UNAVAILABLE")
    finally:
        await asyncio.to_thread(server.stop, discard=True)
        shutil.rmtree(folder, ignore_errors=True)
