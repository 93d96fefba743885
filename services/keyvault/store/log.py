"""The Merkle log of chain heads: its leaves, the nodes over them, its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.keyvault.database import Connection, Database, Row
from services.keyvault.merkle import Frontier, Node, nodes_of

#: Heads that one tick takes in.
HEADS = 5000
_BATCH = 1000
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('byokeep_log'))"
# The predicate is that of the index chain_unlogged: nothing is read where nothing changed.
_UNLOGGED = """
(SELECT chain, sequence, hash FROM chain
 WHERE sequence <> logged_sequence AND sequence > 0 ORDER BY chain LIMIT %s)
UNION
SELECT chain, sequence, hash FROM chain WHERE chain = ANY(%s) AND sequence > 0
"""
_SIZE = "SELECT coalesce(max(index) + 1, 0) FROM log_leaf"
_LEAVES = "SELECT leaf_hash FROM log_leaf WHERE index >= %s AND index < %s ORDER BY index"
_ADD = """
WITH leaf AS (
    INSERT INTO log_leaf (index, chain, sequence, blind, head_hash, leaf_hash)
    SELECT * FROM unnest(%(indexes)s::bigint[], %(chains)s::text[], %(sequences)s::bigint[],
                         %(blinds)s::bytea[], %(heads)s::bytea[], %(leaves)s::bytea[])
), node AS (
    INSERT INTO log_node (level, index, hash)
    SELECT * FROM unnest(%(levels)s::smallint[], %(positions)s::bigint[], %(nodes)s::bytea[])
)
UPDATE chain SET logged_sequence = taken.sequence
FROM unnest(%(chains)s::text[], %(sequences)s::bigint[]) AS taken (chain, sequence)
WHERE chain.chain = taken.chain
"""
_NODES = """
SELECT level, index, hash FROM log_node
JOIN unnest(%(levels)s::smallint[], %(indexes)s::bigint[]) AS wanted (level, index)
USING (level, index)
UNION ALL
SELECT 0, index, leaf_hash FROM log_leaf
WHERE index IN (SELECT unnest(%(leaves)s::bigint[]))
"""
_LEAF_HEADS = """
SELECT l.index, l.chain, l.sequence, l.blind, l.head_hash, l.leaf_hash, e.hash
FROM log_leaf l LEFT JOIN audit_event e ON e.chain = l.chain AND e.sequence = l.sequence
WHERE l.index >= %s AND l.index < %s ORDER BY l.index LIMIT %s
"""
_NEWEST_LEAF = """
SELECT l.index, l.sequence, l.blind, e.hash
FROM log_leaf l JOIN audit_event e ON e.chain = l.chain AND e.sequence = l.sequence
WHERE l.chain = %s AND l.index < %s ORDER BY l.sequence DESC LIMIT 1
"""
_ADD_CHECKPOINT = """
INSERT INTO log_checkpoint (size, note) VALUES (%s, %s) ON CONFLICT DO NOTHING
"""
_CHECKPOINT = "SELECT note FROM log_checkpoint WHERE size = %s"
_CHECKPOINTS = """
SELECT size, note FROM log_checkpoint WHERE size < %s ORDER BY size DESC LIMIT %s
"""
# What a resumed log starts from: leaves without a gap, and every head to be taken in again.
_FIRST_GAP = """
SELECT min(index) FROM (SELECT index, row_number() OVER (ORDER BY index) - 1 AS place
                        FROM log_leaf) numbered
WHERE index <> place
"""
_RESET = (
    "DELETE FROM log_leaf WHERE index >= %(gap)s",
    "DELETE FROM log_node",
    "DELETE FROM log_checkpoint WHERE size > (SELECT coalesce(max(index) + 1, 0) FROM log_leaf)",
    "UPDATE chain SET logged_sequence = 0 WHERE logged_sequence > 0",
)
_ADD_NODES = """
INSERT INTO log_node (level, index, hash)
SELECT * FROM unnest(%s::smallint[], %s::bigint[], %s::bytea[])
"""
_NO_GAP = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Leaf:
    """A head that becomes a leaf, and the nodes (level, index, hash) that it completes."""

    index: int
    chain: str
    sequence: int
    blind: bytes
    head: bytes
    hash: bytes
    completes: Sequence[tuple[int, int, bytes]]


async def lock(connection: Connection) -> None:
    """Let one replica at a time extend the log."""
    await connection.execute(_LOCK)


async def unlogged(connection: Connection, owed: Iterable[str]) -> list[Row]:
    """Return (chain, sequence, hash) of heads that the log has not taken in, as their rows say;
    and of chains that are owed to it whatever those say."""
    return await (await connection.execute(_UNLOGGED, (HEADS, list(owed)))).fetchall()


async def size(connection: Connection) -> int:
    """Return the number of leaves."""
    row = await (await connection.execute(_SIZE)).fetchone()
    return int(row[0]) if row else 0


async def leaves(connection: Connection, start: int, end: int) -> list[bytes]:
    """Return the hashes of leaves from `start` up to, not with, `end`: at most 1,000."""
    cursor = await connection.execute(_LEAVES, (start, min(end, start + _BATCH)))
    return [row[0] for row in await cursor.fetchall()]


async def add(connection: Connection, new: Sequence[Leaf]) -> None:
    """Append leaves, with the nodes that they complete."""
    nodes = [node for leaf in new for node in leaf.completes]
    await connection.execute(
        _ADD,
        {
            "indexes": [leaf.index for leaf in new],
            "chains": [leaf.chain for leaf in new],
            "sequences": [leaf.sequence for leaf in new],
            "blinds": [leaf.blind for leaf in new],
            "heads": [leaf.head for leaf in new],
            "leaves": [leaf.hash for leaf in new],
            "levels": [node[0] for node in nodes],
            "positions": [node[1] for node in nodes],
            "nodes": [node[2] for node in nodes],
        },
    )


async def nodes(connection: Connection, wanted: Iterable[Node]) -> dict[Node, bytes]:
    """Return the hashes of complete subtrees, those that are there."""
    wanted = list(wanted)
    inner = [node for node in wanted if node[0]]
    cursor = await connection.execute(
        _NODES,
        {
            "levels": [level for level, _ in inner],
            "indexes": [index for _, index in inner],
            "leaves": [index for level, index in wanted if not level],
        },
    )
    return {(level, index): digest for level, index, digest in await cursor.fetchall()}


async def frontier(connection: Connection, log_size: int) -> Frontier | None:
    """Return the frontier of the log at a size, from O(log n) nodes; None where one is missing."""
    wanted = nodes_of((0, log_size))
    found = await nodes(connection, wanted)
    if any(node not in found for node in wanted):
        return None
    return Frontier(log_size, [found[node] for node in wanted])


async def leaf_heads(database: Database, start: int, end: int) -> list[Row]:
    """Return (index, chain, sequence, blind, leaf hash, hash of that event or None) of leaves
    from `start` up to, not with, `end`: at most 1,000."""
    return await database.all(_LEAF_HEADS, (start, end, _BATCH))


async def newest_leaf(connection: Connection, chain: str, log_size: int) -> Row | None:
    """Return (index, sequence, blind, hash of that event) of a chain's newest leaf in a log of
    some size."""
    return await (await connection.execute(_NEWEST_LEAF, (chain, log_size))).fetchone()


async def add_checkpoint(database: Database, log_size: int, note: str) -> None:
    """Keep a signed note; nothing where one of that size is kept."""
    await database.all(_ADD_CHECKPOINT + " RETURNING size", (log_size, note))


async def checkpoint(database: Database, log_size: int) -> str | None:
    """Return the signed note of a size."""
    row = await database.one(_CHECKPOINT, (log_size,))
    return row[0] if row else None


async def checkpoints(database: Database, below: int, limit: int) -> list[Row]:
    """Return (size, note) of checkpoints below a size, newest first."""
    return await database.all(_CHECKPOINTS, (below, limit))


async def reset(connection: Connection) -> Frontier:
    """Take the leaves as they are for the truth: drop what follows a gap, and derive the nodes
    again. Return the log's frontier."""
    row = await (await connection.execute(_FIRST_GAP)).fetchone()
    gap = row[0] if row and row[0] is not None else _NO_GAP
    for statement in _RESET:
        await connection.execute(statement, {"gap": gap})
    rebuilt = Frontier()
    while found := await leaves(connection, rebuilt.size, _NO_GAP):
        new = [node for leaf in found for node in rebuilt.append(leaf)]
        columns = [list(column) for column in zip(*new, strict=True)] or [[], [], []]
        await connection.execute(_ADD_NODES, columns)
    return rebuilt
