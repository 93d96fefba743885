"""Which tenants are to be looked at, as their rows hint."""

from __future__ import annotations

import datetime
from collections.abc import Collection

from services.keyvault.database import Database

_PAGE = 1000
# By the index of `due_time`: by that of the names every row would be looked at.
_DUE = """
WITH found AS MATERIALIZED (
    SELECT name, sequence FROM tenant WHERE due_time <= %s
    UNION SELECT name, sequence FROM tenant WHERE name = ANY(%s::text[])
)
SELECT name, sequence FROM found WHERE name > %s ORDER BY name LIMIT %s
"""
_PUT_OFF = "UPDATE tenant SET due_time = %s WHERE name = %s AND sequence = %s RETURNING 1"
_HASTEN = """
UPDATE tenant SET due_time = %(due)s
WHERE name = %(name)s AND sequence = %(sequence)s AND due_time > %(due)s
RETURNING 1
"""


async def due(
    database: Database, now: datetime.datetime, watched: Collection[str], after: str
) -> list[tuple[str, int]]:
    """Return (name, sequence) of tenants after a name that are due now, or are watched; by name."""
    rows = await database.all(_DUE, (now, list(watched), after, _PAGE))
    return [(row[0], row[1]) for row in rows]


async def put_off(
    database: Database, name: str, sequence: int, due_time: datetime.datetime
) -> None:
    """Say when a tenant, as it was read, is to be looked at again."""
    await database.all(_PUT_OFF, (due_time, name, sequence))


async def hasten(database: Database, name: str, sequence: int, due_time: datetime.datetime) -> None:
    """Let a tenant, as it was read, be looked at no later than a time."""
    await database.all(_HASTEN, {"due": due_time, "name": name, "sequence": sequence})
