"""Events and the log of chain heads, for reading and for the Merkle log."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.keyvault.database import Connection, Database, Row

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
_HEAD = "SELECT sequence, hash FROM chain WHERE chain = %s"
_CHAINS = "SELECT chain, sequence, hash FROM chain ORDER BY chain"
_LOG_LOCK = "SELECT pg_advisory_xact_lock(hashtext('byokeep_log'))"
_UNLOGGED = """
SELECT chain, sequence, hash FROM chain WHERE sequence > logged_sequence ORDER BY chain LIMIT 1000
"""
_LOG_SIZE = "SELECT count(*) FROM log_leaf"
_LEAVES = "SELECT leaf_hash FROM log_leaf WHERE index < %s AND index >= %s ORDER BY index"
_ADD_LEAF = """
INSERT INTO log_leaf (index, chain, sequence, blind, leaf_hash) VALUES (%s, %s, %s, %s, %s)
"""
_LOGGED = "UPDATE chain SET logged_sequence = %s WHERE chain = %s"
_LEAF_HEADS = """
SELECT l.index, l.chain, l.sequence, l.blind, l.leaf_hash, e.hash
FROM log_leaf l LEFT JOIN audit_event e ON e.chain = l.chain AND e.sequence = l.sequence
WHERE l.index >= %s ORDER BY l.index LIMIT %s
"""
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


async def chains(database: Database) -> list[Row]:
    """Return (chain, sequence, hash) of every chain."""
    return await database.all(_CHAINS)


async def leaf_heads(database: Database, start: int) -> list[Row]:
    """Return (index, chain, sequence, blind, leaf hash, hash of that event or None) of leaves."""
    return await database.all(_LEAF_HEADS, (start, _BATCH))


async def lock_log(connection: Connection) -> None:
    """Let one replica at a time extend the log."""
    await connection.execute(_LOG_LOCK)


async def unlogged(connection: Connection) -> list[Row]:
    """Return (chain, sequence, hash) of heads that the log has not taken in."""
    return await (await connection.execute(_UNLOGGED)).fetchall()


async def log_size(connection: Connection) -> int:
    """Return the number of leaves."""
    row = await (await connection.execute(_LOG_SIZE)).fetchone()
    return int(row[0]) if row else 0


async def leaves(connection: Connection, start: int, end: int) -> list[bytes]:
    """Return the hashes of leaves from `start` up to but not with `end`."""
    return [row[0] for row in await (await connection.execute(_LEAVES, (end, start))).fetchall()]


async def add_leaf(
    connection: Connection, index: int, head: Row, blind: bytes, leaf_hash: bytes
) -> None:
    """Append a leaf for a chain's head."""
    chain, sequence, _ = head
    await connection.execute(_ADD_LEAF, (index, chain, sequence, blind, leaf_hash))
    await connection.execute(_LOGGED, (sequence, chain))
