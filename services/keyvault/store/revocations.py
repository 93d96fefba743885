"""What watchers are told: revocations by number, and a holder's live leases."""

from __future__ import annotations

from services.keyvault.database import Database, Row

_NEWS = "SELECT sequence, lease_id, holder FROM revocation WHERE sequence > %s ORDER BY sequence"
# No number is below zero in a message, whatever a row says.
_NEWEST = "SELECT greatest(max(sequence), 0) FROM revocation"
_LIVE = """
SELECT lease_id FROM lease
WHERE holder = %s AND end_time IS NULL AND expire_time > now()
"""


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
