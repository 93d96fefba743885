"""Tables and migrations of keyvault agree."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.keyvault import migrate
from services.keyvault.database import Database
from services.keyvault.ledger import clock
from services.keyvault.schema import metadata
from services.keyvault.sql import events, index, ledger, log, upkeep
from tests.harness import keyvault as kv

_LEASES = 20
_DUE = "SELECT due_time FROM tenant WHERE name = 'acme'"
_UPDATES = "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
_OTHERS = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
AND backend_type = 'client backend'
"""


def test_models_and_migrations_agree(empty_database_url):
    empty = empty_database_url("keyvault")
    migrate.upgrade(empty)
    url = sqlalchemy.make_url(empty).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_migrating_twice_changes_nothing(empty_database_url):
    empty = empty_database_url("keyvault")
    migrate.upgrade(empty)
    migrate.upgrade(empty)


def test_all_text_has_one_collation(empty_database_url):
    """An index in one collation serves no join with a column of another: a lease would read a
    whole table. Shown to fail with a column of plain `Text`."""
    empty = empty_database_url("keyvault")
    migrate.upgrade(empty)
    other = """
        SELECT table_name, column_name FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name <> 'alembic_version'
          AND data_type IN ('text', 'character varying') AND collation_name IS DISTINCT FROM 'C'
    """
    with psycopg.connect(empty) as connection:
        assert connection.execute(other).fetchall() == []


async def test_no_statement_of_a_call_or_sweep_reads_a_table_whole(empty_database_url):
    """Plans are made once a connection, and of tables that may be empty then. Shown to fail
    without `enable_seqscan=off`, and without the index of what is due."""
    empty = empty_database_url("keyvault")
    migrate.upgrade(empty)
    names, keys, numbers, blobs = ["t"], ["k"], [1], [b"x"]
    statements: list[tuple[str, Sequence[object]]] = [
        (ledger._ROWS_TO_READ, (names,)),
        (ledger._ROWS_TO_WRITE, (names,)),
        (ledger._PARTS, (names, numbers)),
        (ledger._SECRETS, (names, keys, numbers)),
        (ledger._PUT_SECRETS, (names, keys, numbers, blobs, blobs)),
        (ledger._DROP_SECRETS, (names, keys, numbers)),
        (events._BODIES, ("t", 0, 1, 1)),
        (index._CLOSE, (names,)),
        (index._FIND, (names,)),
        (log._LEAVES, (0, 1, 1)),
        (log._LEAF_AT, ("t", 1)),
        (upkeep._DUE, (clock(), names, "", 1)),
    ]
    database = Database(empty, 1)
    await database.open()
    try:
        for statement, parameters in statements:
            plan = [row[0] for row in await database.all("EXPLAIN " + statement, parameters)]
            assert not [line for line in plan if "Seq Scan" in line], plan
        async with database.transaction() as connection:
            nothing = [[] for _ in range(ledger._WRITE.count("%b"))]
            cursor = await connection.execute("EXPLAIN " + ledger._WRITE, [*nothing, 0])
            plan += [row[0] for row in await cursor.fetchall()]
            assert not [line for line in plan if "Seq Scan" in line], plan
    finally:
        await database.close()
    assert any("tenant_due" in line for line in plan), plan


async def test_a_lease_changes_no_indexed_column(tmp_path, keyvault_database_url):
    """So that PostgreSQL writes the row anew on the same page, and no index with it. Shown to fail
    with `due_time` written by every lease."""
    deployment = kv.Deployment(tmp_path, keyvault_database_url)
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        # The first lease that lives says when the tenant is to be looked at.
        assert await kv.try_lease(keyvault, key) == ""
    before = await _updates(deployment)
    async with kv.running(deployment) as keyvault:
        due = await keyvault.sql(_DUE)
        for _ in range(_LEASES):
            assert await kv.try_lease(keyvault, key) == ""
        assert await keyvault.sql(_DUE) == due
    after = await _updates(deployment)
    for table in ("tenant", "tenant_part"):
        updates, hot = (new - old for new, old in zip(after[table], before[table], strict=True))
        assert updates >= _LEASES
        # Whatever reads meanwhile may keep a page from being cleared.
        assert hot >= updates * 3 / 4, (table, updates, hot)


async def _updates(deployment) -> dict[str, tuple[int, int]]:
    """By table: rows that were updated, and how many of those on their own page."""
    async with kv.database(deployment) as connection, asyncio.timeout(60):
        # A connection tells what it did when it ends.
        while await (await connection.execute(_OTHERS)).fetchone():
            await asyncio.sleep(0.02)
        rows = await connection.execute(_UPDATES)
        return {row[0]: (row[1], row[2]) for row in await rows.fetchall()}
