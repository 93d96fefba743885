"""Tables and migrations of keyvault agree."""

from __future__ import annotations

import psycopg
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.keyvault import migrate
from services.keyvault.schema import metadata


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
