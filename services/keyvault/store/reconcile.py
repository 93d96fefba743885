"""What the reconcile pass reads: ranges of rows and their digests, heads, what it had verified."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence

from services.keyvault.database import Connection, Database, Row

#: (tenant, key id, version): where a range of rows ends. Ordered by bytes, in the database too.
Bound = tuple[str, str, int]
FIRST: Bound = ("", "", 0)
#: Above every row that can be leased.
LAST: Bound = ("\U0010ffff", "", 0)

_RANGE = """
WHERE (tenant, key_id, version) > (%s::text, %s::text, %s::int)
  AND (tenant, key_id, version) <= (%s::text, %s::text, %s::int)
"""
_COLUMNS = """
SELECT tenant, key_id, version, state, state_sequence FROM key_version
"""
_ORDER = """
ORDER BY tenant, key_id, version LIMIT %s
"""
_ROWS = _COLUMNS + _RANGE + _ORDER
# The database renders and hashes; only 32 bytes cross. In hexadecimal a name ends where it
# ends: no two tables render the same.
_HASHED = """
SELECT sha256(convert_to(string_agg(
    encode(convert_to(tenant, 'UTF8'), 'hex') || ' ' || encode(convert_to(key_id, 'UTF8'), 'hex')
        || ' ' || version || ' ' || state || ' ' || state_sequence,
    E'\\n' ORDER BY tenant, key_id, version), 'UTF8'))
FROM key_version
"""
_DIGEST = _HASHED + _RANGE
_ROW = """
SELECT state, state_sequence FROM key_version WHERE tenant = %s AND key_id = %s AND version = %s
"""
_HEADS = """
SELECT chain, sequence FROM chain WHERE chain > %s ORDER BY chain LIMIT %s
"""
_CARRIED = """
SELECT sequence, body FROM audit_carried WHERE chain = %s AND sequence > %s
ORDER BY sequence LIMIT %s
"""
_KEYS = "SELECT count(*) FROM provider_key WHERE tenant = %s"
_PARTS = "SELECT data FROM reconcile_part ORDER BY part"
_DROP_PARTS = "DELETE FROM reconcile_part"
_ADD_PART = "INSERT INTO reconcile_part (part, data) VALUES (%s, %s)"
_SAVE_LOCK = "SELECT pg_advisory_xact_lock(hashtext('byokeep_reconcile'))"
_HOLDS = "SELECT tenant, held, state_sequence FROM tenant_hold"
_HOLD = "SELECT held, state_sequence FROM tenant_hold WHERE tenant = %s"
_BATCH = 1000


async def rows(database: Database, after: Bound, upto: Bound, limit: int) -> list[Row]:
    """Return (tenant, key id, version, state, state sequence) of a range, in order."""
    return await database.all(_ROWS, (*after, *upto, limit))


async def digest(database: Database, after: Bound, upto: Bound) -> bytes:
    """Return the digest of a range's rows, computed in the database."""
    row = await database.one(_DIGEST, (*after, *upto))
    return bytes(row[0]) if row and row[0] is not None else b""


def digest_of(read: Sequence[Row]) -> bytes:
    """Return the same digest of rows that were read."""
    if not read:
        return b""
    text = "\n".join(
        f"{row[0].encode().hex()} {row[1].encode().hex()} {row[2]} {row[3]} {row[4]}"
        for row in read
    )
    return hashlib.sha256(text.encode()).digest()


async def row(connection: Connection, tenant: str, key_id: str, version: int) -> Row | None:
    """Return (state, state sequence) of a version."""
    return await (await connection.execute(_ROW, (tenant, key_id, version))).fetchone()


async def holds(database: Database) -> dict[str, Row]:
    """Return (held, state sequence) by tenant, of those that were ever held."""
    return {row[0]: row[1:] for row in await database.all(_HOLDS)}


async def hold(connection: Connection, tenant: str) -> Row | None:
    """Return (held, state sequence) of a tenant."""
    return await (await connection.execute(_HOLD, (tenant,))).fetchone()


async def heads(database: Database, after: str, limit: int) -> list[Row]:
    """Return (chain, sequence) of chains after a name."""
    return await database.all(_HEADS, (after, limit))


async def carried(database: Database, chain: str) -> AsyncIterator[Row]:
    """Yield (sequence, body) of the events that retention kept, in order."""
    after = 0
    while found := await database.all(_CARRIED, (chain, after, _BATCH)):
        for one in found:
            yield one
        after = found[-1][0]


async def keys(database: Database, tenant: str) -> int:
    """Return how many keys a tenant has."""
    found = await database.one(_KEYS, (tenant,))
    return int(found[0]) if found else 0


async def parts(database: Database) -> list[bytes]:
    """Return the parts of what was verified."""
    return [found[0] for found in await database.all(_PARTS)]


async def save(connection: Connection, new: Sequence[bytes]) -> None:
    """Replace the parts."""
    await connection.execute(_SAVE_LOCK)
    await connection.execute(_DROP_PARTS)
    for number, data in enumerate(new):
        await connection.execute(_ADD_PART, (number, data))
