"""The Merkle log of chain heads: its leaves, the nodes over them, its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from services.keyvault.database import Connection, Database, Row, columns, whole
from services.keyvault.event import Head
from services.keyvault.merkle import Frontier, Node, nodes_of

_BATCH = 10_000
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('byokeep_log'))"
_SIZE = "SELECT coalesce(max(index) + 1, 0) FROM log_leaf"
_LEAF = "SELECT index, generation, tenant, sequence, head_hash, blind, leaf_hash FROM log_leaf "
_LEAVES = _LEAF + "WHERE index >= %s AND index < %s ORDER BY index LIMIT %s"
_LEAF_AT = _LEAF + "WHERE tenant = %s AND index < %s ORDER BY index DESC LIMIT 1"
# What stands beyond the end already, keyvault did not write.
_CUT = "DELETE FROM log_leaf WHERE index >= %s"
_ADD = """
WITH leaf AS (
    INSERT INTO log_leaf (index, generation, tenant, sequence, head_hash, blind, leaf_hash)
    SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::text[], %b::bigint[], %b::bytea[],
                         %b::bytea[], %b::bytea[])
)
INSERT INTO log_node (level, index, hash)
SELECT * FROM unnest(%s::smallint[], %s::bigint[], %b::bytea[])
ON CONFLICT (level, index) DO UPDATE SET hash = excluded.hash
"""
_NODES = """
SELECT level, index, hash FROM log_node
JOIN unnest(%(levels)s::smallint[], %(indexes)s::bigint[]) AS wanted (level, index)
USING (level, index)
UNION ALL
SELECT 0, index, leaf_hash FROM log_leaf
WHERE index IN (SELECT unnest(%(leaves)s::bigint[]))
"""
_ADD_CHECKPOINT = """
INSERT INTO log_checkpoint (size, note) VALUES (%s, %s) ON CONFLICT DO NOTHING
"""
_CHECKPOINT = "SELECT note FROM log_checkpoint WHERE size = %s"
_CHECKPOINTS = """
SELECT size, note FROM log_checkpoint WHERE size < %s ORDER BY size DESC LIMIT %s
"""
_RESET = (
    "DELETE FROM log_node",
    "DELETE FROM log_checkpoint WHERE size > %(size)s",
    "DELETE FROM log_snapshot",
)
_PARTS = "SELECT data FROM log_snapshot ORDER BY part"
_DROP_PARTS = "DELETE FROM log_snapshot"
_ADD_PART = "INSERT INTO log_snapshot (part, data) VALUES (%s, %s)"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tenant's head in the log: a row, in the order of its columns."""

    index: int
    generation: int
    tenant: str
    sequence: int
    head_hash: bytes
    blind: bytes
    leaf_hash: bytes

    @property
    def head(self) -> Head:
        """The head that it stands for."""
        return Head(self.generation, self.sequence, self.head_hash)


async def lock(connection: Connection) -> None:
    """Let one replica at a time extend the log."""
    await connection.execute(_LOCK)


async def size(connection: Connection) -> int:
    """Return the number of leaves."""
    row = await (await connection.execute(_SIZE)).fetchone()
    return int(row[0]) if row else 0


async def leaves(connection: Connection, start: int, end: int) -> list[Leaf]:
    """Return leaves from `start` up to, not with, `end`: at most 10,000."""
    cursor = await connection.execute(_LEAVES, (start, end, _BATCH), binary=True)
    return [Leaf(*row) for row in whole(await cursor.fetchall())]


async def add(
    connection: Connection,
    end: int,
    new: Sequence[Leaf],
    completed: Sequence[tuple[int, int, bytes]],
) -> None:
    """Append leaves to a log that ends at `end`, and the nodes that are completed by then."""
    await connection.execute(_CUT, (end,))
    leaves_ = columns([astuple(leaf) for leaf in new], 7)
    await connection.execute(_ADD, [*leaves_, *columns(completed, 3)])


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


async def newest_leaf(database: Database, tenant: str, log_size: int) -> Leaf | None:
    """Return a tenant's newest leaf in a log of some size."""
    row = await database.one(_LEAF_AT, (tenant, log_size))
    return Leaf(*row) if row and None not in row else None


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


async def reset(connection: Connection, log_size: int) -> None:
    """Drop what was derived of the log, for it is read anew up to a size."""
    for statement in _RESET:
        await connection.execute(statement, {"size": log_size})


async def snapshot(connection: Connection) -> list[bytes]:
    """Return the parts of the snapshot."""
    return [row[0] for row in whole(await (await connection.execute(_PARTS)).fetchall())]


async def save(connection: Connection, parts: Sequence[bytes]) -> None:
    """Replace the snapshot. The log is locked."""
    await connection.execute(_DROP_PARTS)
    for number, data in enumerate(parts):
        await connection.execute(_ADD_PART, (number, data))
