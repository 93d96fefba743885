"""Events and heads of chains, for reading."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.keyvault.database import Database, Row

_PAGE = """
SELECT sequence, body FROM audit_event
WHERE chain = %(chain)s AND sequence > %(after)s
  AND (%(key_id)s = '' OR key_id = %(key_id)s)
ORDER BY sequence LIMIT %(limit)s
"""
_LINKS = """
SELECT sequence, body, previous_hash, hash FROM audit_event
WHERE chain = %s AND sequence > %s ORDER BY sequence LIMIT %s
"""
_PRUNED = "SELECT pruned_sequence, pruned_hash FROM chain WHERE chain = %s"
_HEAD = "SELECT sequence, hash FROM chain WHERE chain = %s"
_BATCH = 1000


async def page(
    database: Database, chain: str, key_id: str, after: int, limit: int
) -> list[tuple[int, bytes]]:
    """Return (sequence, body) of events above a sequence number."""
    rows = await database.all(
        _PAGE, {"chain": chain, "key_id": key_id, "after": after, "limit": limit}
    )
    return [(row[0], row[1]) for row in rows]


async def links(database: Database, chain: str, after: int = 0) -> AsyncIterator[Row]:
    """Yield (sequence, body, previous hash, hash) of a chain in order."""
    while rows := await database.all(_LINKS, (chain, after, _BATCH)):
        for row in rows:
            yield row
        after = rows[-1][0]


async def head(database: Database, chain: str) -> tuple[int, bytes] | None:
    """Return sequence and hash of a chain's head."""
    row = await database.one(_HEAD, (chain,))
    return (row[0], row[1]) if row else None


async def pruned(database: Database, chain: str) -> tuple[int, bytes]:
    """Return sequence and hash of the last event that retention dropped; 0 where none."""
    found = await database.one(_PRUNED, (chain,))
    return (found[0], found[1] or b"") if found else (0, b"")
