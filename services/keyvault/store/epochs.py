"""KEKs of epochs, and content keys."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from services.keyvault.database import Connection, Database

_NOW = "SELECT now()"
_ALL = "SELECT name, kek_backend FROM epoch_kek"
_INSERT = "INSERT INTO epoch_kek (name, kek_backend) VALUES (%s, %s) ON CONFLICT DO NOTHING"
_DELETE = "DELETE FROM epoch_kek WHERE name = %s AND kek_backend = %s"
_DELETE_CONTENT = """
DELETE FROM content_key WHERE 'content/' || epoch = %s AND kek_backend = %s
"""
_CONTENT = """
SELECT kek_backend, kek_version, wrapped_dek FROM content_key WHERE tenant = %s AND epoch = %s
"""
_INSERT_CONTENT = """
INSERT INTO content_key (tenant, epoch, kek_backend, kek_version, wrapped_dek)
VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_FORGET_TENANT = "DELETE FROM content_key WHERE tenant = %s"
_KNOWN = "SELECT FROM chain WHERE chain = %s"


@dataclass(frozen=True, slots=True)
class EpochKek:
    """A KEK of an epoch, and the backend that holds it."""

    name: str
    backend: str


@dataclass(frozen=True, slots=True)
class ContentRow:
    """A stored content key: the data key that it is derived from, wrapped."""

    kek_backend: str
    kek_version: int
    wrapped_dek: bytes


async def now(database: Database) -> datetime.datetime:
    """Return the database's time, which all replicas share."""
    row = await database.one(_NOW)
    assert row is not None  # noqa: S101 a SELECT without FROM
    moment: datetime.datetime = row[0]
    return moment.astimezone(datetime.UTC)


async def all_keks(database: Database) -> set[EpochKek]:
    """Return every KEK that was made and is not known to be destroyed."""
    return {EpochKek(*row) for row in await database.all(_ALL)}


async def insert(connection: Connection, one: EpochKek) -> bool:
    """Note a KEK; False where it is noted."""
    return (await connection.execute(_INSERT, (one.name, one.backend))).rowcount == 1


async def delete(connection: Connection, one: EpochKek) -> bool:
    """Forget a destroyed KEK and the content keys under it; False where it is forgotten."""
    await connection.execute(_DELETE_CONTENT, (one.name, one.backend))
    return (await connection.execute(_DELETE, (one.name, one.backend))).rowcount == 1


async def content_key(database: Database, tenant: str, epoch: str) -> ContentRow | None:
    """Return a stored content key."""
    row = await database.one(_CONTENT, (tenant, epoch))
    return ContentRow(*row) if row else None


async def insert_content_key(database: Database, tenant: str, epoch: str, row: ContentRow) -> None:
    """Store a content key; nothing where another replica was first."""
    async with database.transaction() as connection:
        await connection.execute(
            _INSERT_CONTENT, (tenant, epoch, row.kek_backend, row.kek_version, row.wrapped_dek)
        )


async def forget_tenant(connection: Connection, tenant: str) -> None:
    """Delete every content key of a tenant."""
    await connection.execute(_FORGET_TENANT, (tenant,))


async def has_chain(database: Database, chain: str) -> bool:
    """Say whether a chain exists."""
    return await database.one(_KNOWN, (chain,)) is not None
