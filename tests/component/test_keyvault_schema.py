"""Tables and migrations of keyvault agree."""

from __future__ import annotations

import json

import psycopg
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.keyvault import migrate
from services.keyvault.database import Database
from services.keyvault.schema import metadata
from services.keyvault.store import keys, leases


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
    without `enable_seqscan=off`, and without the index of what is superseded."""
    empty = empty_database_url("keyvault")
    migrate.upgrade(empty)
    ids = ["x"]
    wanted = json.dumps([{"tenant": "t", "key_id": "k", "version": 1}])
    closed = json.dumps([{"lease_id": "x", "outcome": 1}])
    statements: list[tuple[str, tuple[object, ...]]] = [
        (leases._LOCK, (ids,)),
        (leases._VERSIONS, (ids, wanted)),
        (leases._LOCK_OF_LEASES, (ids,)),
        (leases._OF_LEASES, (ids,)),
        (leases._CLOSE, (closed,)),
        (keys._PAST_GRACE, ()),
    ]
    database = Database(empty, 1)
    await database.open()
    try:
        for statement, parameters in statements:
            plan = [row[0] for row in await database.all("EXPLAIN " + statement, parameters)]
            assert not [line for line in plan if "Seq Scan" in line], plan
    finally:
        await database.close()
    assert any("key_version_superseded" in line for line in plan), plan
