"""Ciphertext of keyvault's own keys."""

from __future__ import annotations

from services.keyvault.database import Connection, Database, Row, whole

# Two first starts at once make one set of keys.
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('byokeep_system_key'))"
_ALL = """
SELECT kind, key_id, kek_backend, wrapped_dek, envelope FROM system_key ORDER BY create_time
"""
_NAMES = "SELECT kind, key_id FROM system_key"
_INSERT = """
INSERT INTO system_key (kind, key_id, kek_backend, kek_version, wrapped_dek, envelope)
VALUES (%s, %s, %s, %s, %s, %s)
"""
_MOVE = """
UPDATE system_key SET kek_backend = %s, kek_version = %s, wrapped_dek = %s, envelope = %s
WHERE kind = %s AND key_id = %s AND wrapped_dek = %s RETURNING 1
"""
_COUNTS = "SELECT kek_backend, count(*) FROM system_key GROUP BY kek_backend"


async def lock(connection: Connection) -> None:
    """Let one process at a time make keys."""
    await connection.execute(_LOCK)


async def rows(database: Database) -> list[Row]:
    """Return (kind, key id, backend, wrapped data key, envelope), oldest first."""
    return whole(await database.all(_ALL))


async def names(database: Database) -> set[tuple[str, str]]:
    """Return (kind, key id) of every key."""
    return {(row[0], row[1]) for row in whole(await database.all(_NAMES))}


async def kinds(connection: Connection) -> set[str]:
    """Return the kinds of which there is a key."""
    return {row[0] for row in await (await connection.execute(_NAMES)).fetchall()}


async def insert(
    connection: Connection,
    kind: str,
    key_id: str,
    kek: tuple[str, int],
    secret: tuple[bytes, bytes],
) -> None:
    """Store (wrapped data key, envelope) of a key, under (backend, version) of a KEK."""
    await connection.execute(_INSERT, (kind, key_id, *kek, *secret))


async def move(
    database: Database,
    kind: str,
    key_id: str,
    kek: tuple[str, int],
    secret: tuple[bytes, bytes],
    before: bytes,
) -> None:
    """Replace what is stored of a key, where its wrapped data key still is what was read."""
    await database.all(_MOVE, (*kek, *secret, kind, key_id, before))


async def counts(database: Database) -> list[Row]:
    """Return (backend, keys of keyvault itself)."""
    return await database.all(_COUNTS)
