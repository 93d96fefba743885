"""Tables and migrations of keyvault agree."""

from __future__ import annotations

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
