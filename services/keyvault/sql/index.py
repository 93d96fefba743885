"""The index of leases, for people and watchers: what counts of a lease stands in its tenant's
usage. A lease that ends is told to the watchers by number."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from services.common import logs
from services.keyvault.database import Connection, Database, Row, aside

log = logging.getLogger(__name__)

_CLOSE = """
UPDATE lease SET end_time = coalesce(end_time, now()) WHERE lease_id = ANY(%s)
"""
# Numbers must become visible in their order, or a watcher would miss one.
_ORDER = "SELECT pg_advisory_xact_lock(hashtext('byokeep_revocation'))"
_END = """
UPDATE lease SET end_time = now() WHERE lease_id = ANY(%s) RETURNING lease_id, holder
"""
# A number below one that was there before is news to no watcher.
_TELL = """
WITH told AS (
    INSERT INTO revocation (lease_id, holder) SELECT * FROM unnest(%s::text[], %s::text[])
    RETURNING sequence
)
SELECT (SELECT min(sequence) FROM told) > (SELECT max(sequence) FROM revocation)
"""
_OF_TENANT = "SELECT lease_id FROM lease WHERE tenant = %s AND end_time IS NULL"
_FIND = """
SELECT l.lease_id, l.tenant, l.key_id, l.holder, coalesce(e.body, '')
FROM lease l LEFT JOIN event e ON e.tenant = l.tenant AND e.sequence = l.sequence
WHERE l.lease_id = ANY(%s)
"""
_COUNT = "SELECT count(*) FROM lease WHERE end_time IS NULL AND expire_time > now()"
_NEWS = "SELECT sequence, lease_id, holder FROM revocation WHERE sequence > %s ORDER BY sequence"
# No number is below zero in a message, whatever a row says.
_NEWEST = "SELECT greatest(max(sequence), 0) FROM revocation"
_LIVE = """
SELECT lease_id FROM lease
WHERE holder = %s AND end_time IS NULL AND expire_time > now()
"""
_FORGET = "DELETE FROM revocation WHERE create_time < now() - interval '7 days'"
_FORGET_CLOSED = """
DELETE FROM lease WHERE end_time IS NOT NULL AND expire_time < now() - interval '1 day'
"""
_UNTOLD = "watchers_not_told"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the index has a lease, and its LEASED event as it is stored, if it is: hints, until the
    tenant's usage bears them out."""

    tenant: str
    key_id: str
    holder: str
    body: bytes


async def close(connection: Connection, lease_ids: Collection[str]) -> None:
    """Mark leases as closed."""
    await connection.execute(_CLOSE, (list(lease_ids),))


async def end(connection: Connection, lease_ids: Collection[str]) -> None:
    """Mark leases as ended, and tell the watchers. What somebody did to the index keeps no key from
    being revoked: the log says so then."""
    rows: list[Row] = []
    async with aside(connection, _UNTOLD):
        rows = await (await connection.execute(_END, (list(lease_ids),))).fetchall()
    # Apart: a lease that nobody can be told of has ended all the same.
    async with aside(connection, _UNTOLD):
        await connection.execute(_ORDER)
        columns = [row[0] for row in rows], [row[1] for row in rows]
        answer = await (await connection.execute(_TELL, columns)).fetchone()
        told = answer is None or answer[0] is not False
        if not told or len(rows) < len(lease_ids):
            logs.event(log, _UNTOLD, level=logging.CRITICAL)


async def of_tenant(connection: Connection, tenant: str) -> list[str]:
    """Return the leases of a tenant that have not ended, as the index says."""
    return [row[0] for row in await (await connection.execute(_OF_TENANT, (tenant,))).fetchall()]


async def find(database: Database, lease_ids: Collection[str]) -> dict[str, Place]:
    """Return where leases are, by id: those that the index has."""
    rows = await database.all(_FIND, (list(lease_ids),))
    return {row[0]: Place(*row[1:]) for row in rows}


async def live_count(database: Database) -> int:
    """Return how many leases live now."""
    row = await database.one(_COUNT)
    return int(row[0]) if row else 0


async def news(database: Database, since: int) -> list[Row]:
    """Return (sequence, lease id, holder) of revocations above a number."""
    return await database.all(_NEWS, (since,))


async def newest(database: Database) -> int:
    """Return the number of the newest revocation; 0 where there is none."""
    row = await database.one(_NEWEST)
    return int(row[0]) if row else 0


async def live(database: Database, holder: str) -> list[str]:
    """Return the ids of a holder's live leases."""
    return [row[0] for row in await database.all(_LIVE, (holder,))]


async def forget(database: Database) -> None:
    """Forget revocations that every watcher has long been told of, and leases that nobody asks for
    any more."""
    async with database.transaction() as connection:
        await connection.execute(_FORGET)
        await connection.execute(_FORGET_CLOSED)
