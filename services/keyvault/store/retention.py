"""What retention reads of a chain, keeps of it, and drops."""

from __future__ import annotations

from collections.abc import Sequence

from services.keyvault.database import Connection, Database, Row

_CHAINS = """
SELECT chain, pruned_sequence FROM chain
WHERE chain > %s AND sequence > pruned_sequence ORDER BY chain LIMIT %s
"""
_EVENT = "SELECT body, hash FROM audit_event WHERE chain = %s AND sequence = %s"
_DROP_CARRIED = "DELETE FROM audit_carried WHERE chain = %s AND sequence = ANY(%s::bigint[])"
_CARRY = """
INSERT INTO audit_carried (chain, sequence, body)
SELECT chain, sequence, body FROM audit_event
WHERE chain = %s AND sequence = ANY(%s::bigint[])
"""
_PRUNED = """
UPDATE chain SET pruned_sequence = %s, pruned_hash = %s
WHERE chain = %s AND pruned_sequence = %s RETURNING 1
"""
_DROP = """
DELETE FROM audit_event WHERE chain = %(chain)s AND sequence IN (
    SELECT e.sequence FROM audit_event e JOIN chain c ON c.chain = e.chain
    WHERE e.chain = %(chain)s AND e.sequence <= c.pruned_sequence
    ORDER BY e.sequence LIMIT %(limit)s
) RETURNING 1
"""
_PAGE = 1000


async def chains(database: Database, after: str) -> list[Row]:
    """Return (chain, pruned sequence) of chains that may have something to drop."""
    return await database.all(_CHAINS, (after, _PAGE))


async def event(database: Database, chain: str, sequence: int) -> Row | None:
    """Return (body, hash) of an event."""
    return await database.one(_EVENT, (chain, sequence))


async def carry(
    connection: Connection, chain: str, kept: Sequence[int], dropped: Sequence[int]
) -> None:
    """Keep events of a chain apart, and drop some that were kept before."""
    await connection.execute(_DROP_CARRIED, (chain, list(dropped)))
    await connection.execute(_CARRY, (chain, list(kept)))


async def prune(
    connection: Connection, chain: str, before: int, sequence: int, digest: bytes
) -> bool:
    """Say where a chain's retention ends; False where somebody else has said so meanwhile."""
    cursor = await connection.execute(_PRUNED, (sequence, digest, chain, before))
    return await cursor.fetchone() is not None


async def drop(database: Database, chain: str) -> int:
    """Delete up to a thousand events before the end of retention; return how many."""
    return len(await database.all(_DROP, {"chain": chain, "limit": _PAGE}))
