"""Tables and migrations of keyvault agree."""

from __future__ import annotations

import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.keyvault import migrate
from services.keyvault.schema import metadata


def test_models_and_migrations_agree(keyvault_database_url):
    migrate.upgrade(keyvault_database_url)
    url = sqlalchemy.make_url(keyvault_database_url).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_migrating_twice_changes_nothing(keyvault_database_url):
    migrate.upgrade(keyvault_database_url)
    migrate.upgrade(keyvault_database_url)
