"""Events of chains, for reading."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.keyvault.database import Connection, Database, Row, whole

_BODIES = """
SELECT sequence, body FROM event WHERE tenant = %s AND sequence > %s AND sequence <= %s
ORDER BY sequence LIMIT %s
"""
_PAGE = """
SELECT sequence, body FROM event
WHERE tenant = %(tenant)s AND sequence > %(after)s AND (%(key_id)s = '' OR key_id = %(key_id)s)
ORDER BY sequence LIMIT %(limit)s
"""
_LINKS = """
SELECT sequence, body, hash FROM event WHERE tenant = %s AND sequence > %s
ORDER BY sequence LIMIT %s
"""
_DROP = """
DELETE FROM event WHERE tenant = %(tenant)s AND sequence IN (
    SELECT sequence FROM event WHERE tenant = %(tenant)s AND sequence <= %(upto)s
    ORDER BY sequence LIMIT %(limit)s
) RETURNING 1
"""
_BATCH = 1000


async def bodies(connection: Connection, tenant: str, after: int, upto: int) -> list[Row]:
    """Return (sequence, body) of up to a thousand events in a range, in order."""
    cursor = await connection.execute(_BODIES, (tenant, after, upto, _BATCH), binary=True)
    return whole(await cursor.fetchall())


async def page(
    database: Database, tenant: str, key_id: str, after: int, limit: int
) -> list[tuple[int, bytes]]:
    """Return (sequence, body) of events above a sequence number."""
    rows = await database.all(
        _PAGE, {"tenant": tenant, "key_id": key_id, "after": after, "limit": limit}
    )
    return [(row[0], row[1]) for row in rows]


async def links(database: Database, tenant: str, after: int = 0) -> AsyncIterator[Row]:
    """Yield (sequence, body, hash) of a chain in order."""
    while rows := await database.all(_LINKS, (tenant, after, _BATCH)):
        for row in rows:
            yield row
        after = rows[-1][0]


async def drop(database: Database, tenant: str, upto: int) -> int:
    """Delete up to a thousand events, the oldest first; return how many."""
    return len(await database.all(_DROP, {"tenant": tenant, "upto": upto, "limit": _BATCH}))
