"""Content keys, and what of each backend epochs need."""

from __future__ import annotations

from dataclasses import dataclass

from services.keyvault.database import Connection, Database, Row

_CONTENT = """
SELECT kek_backend, kek_version, wrapped_dek FROM content_key WHERE tenant = %s AND epoch = %s
"""
_INSERT_CONTENT = """
INSERT INTO content_key (tenant, epoch, kek_backend, kek_version, wrapped_dek)
VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_FORGET_EPOCH = "DELETE FROM content_key WHERE epoch = %s AND kek_backend = %s RETURNING 1"
_FORGET_TENANT = "DELETE FROM content_key WHERE tenant = %s"
_NEEDED = """
SELECT kek_backend, max(epoch), NULL::timestamptz FROM content_key GROUP BY kek_backend
UNION ALL
SELECT kek_backend, NULL, max(not_after) FROM intake_key
WHERE not_after < now() + interval '1 day' GROUP BY kek_backend
"""


@dataclass(frozen=True, slots=True)
class ContentRow:
    """A stored content key: the data key that it is derived from, wrapped."""

    kek_backend: str
    kek_version: int
    wrapped_dek: bytes


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


async def forget_epoch(database: Database, epoch: str, backend: str) -> None:
    """Delete the content keys of an epoch whose KEK is over."""
    await database.all(_FORGET_EPOCH, (epoch, backend))


async def forget_tenant(connection: Connection, tenant: str) -> None:
    """Delete every content key of a tenant."""
    await connection.execute(_FORGET_TENANT, (tenant,))


async def needed(database: Database) -> list[Row]:
    """Return (backend, last epoch of a content key or None, end of the last intake key or None)."""
    return await database.all(_NEEDED)
