"""Tenants' rows, their parts and secrets, and the one statement that writes a change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field

from services.keyvault.database import Connection, Database, Row, columns, whole

_PAGE = 1000
_ROWS_TO_READ = """
SELECT name, generation, sequence, head_hash, state, usage, mac_key_id, mac FROM tenant
WHERE name = ANY(%s) ORDER BY name
"""
# Rows are locked in one order everywhere. What the statements after it read is therefore what the
# last holder of the lock left behind.
_ROWS_TO_WRITE = _ROWS_TO_READ + " FOR UPDATE"
_PARTS = """
SELECT p.tenant, p.part, p.state, p.usage FROM unnest(%s::text[], %s::int[]) AS w (tenant, part)
JOIN tenant_part p ON p.tenant = w.tenant AND p.part = w.part
"""
_SECRETS = """
SELECT s.tenant, s.key_id, s.version, s.wrapped_dek, s.envelope
FROM unnest(%s::text[], %s::text[], %s::int[]) AS w (tenant, key_id, version)
JOIN key_secret s ON s.tenant = w.tenant AND s.key_id = w.key_id AND s.version = w.version
"""
_CREATE = """
INSERT INTO tenant (name, generation, sequence, head_hash, state, usage, mac_key_id, mac)
VALUES (%s, 0, 0, '', '', '', '', '')
"""
# What stands beyond a locked head already, keyvault did not write: it must not keep a key from
# being revoked. `state` and `due_time` are NULL where they stay: a lease changes no indexed column
# (a HOT update), and no state.
_WRITE = """
WITH own AS (
    SELECT * FROM unnest(
        %b::text[], %b::bigint[], %b::bigint[], %b::bigint[], %b::bytea[], %b::bytea[], %b::bytea[],
        %b::text[], %b::bytea[], %b::timestamptz[]
    ) AS i (name, read, generation, sequence, hash, state, usage, mac_key, mac, due)
), added AS (
    INSERT INTO event (tenant, sequence, key_id, body, hash)
    SELECT * FROM unnest(%b::text[], %b::bigint[], %b::text[], %b::bytea[], %b::bytea[])
    ON CONFLICT (tenant, sequence) DO UPDATE SET (key_id, body, hash)
        = (excluded.key_id, excluded.body, excluded.hash)
), changed AS (
    INSERT INTO tenant_part (tenant, part, state, usage)
    SELECT * FROM unnest(%b::text[], %b::int[], %b::bytea[], %b::bytea[])
    ON CONFLICT (tenant, part) DO UPDATE SET (state, usage) = (excluded.state, excluded.usage)
), used AS (
    UPDATE tenant_part p SET usage = i.usage
    FROM unnest(%b::text[], %b::int[], %b::bytea[]) AS i (tenant, part, usage)
    WHERE p.tenant = i.tenant AND p.part = i.part
), leased AS (
    INSERT INTO lease (lease_id, tenant, key_id, version, holder, sequence, expire_time)
    SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::int[], %b::text[], %b::bigint[],
                         %b::timestamptz[])
), written AS (
UPDATE tenant t SET generation = i.generation, sequence = i.sequence, head_hash = i.hash,
    state = coalesce(i.state, t.state), usage = i.usage, mac_key_id = i.mac_key, mac = i.mac,
    due_time = coalesce(i.due, t.due_time)
FROM own i WHERE t.name = i.name AND t.sequence = i.read RETURNING 1
)
SELECT 1 / (count(*) = %s)::int FROM written
"""
_RESEAL = """
UPDATE tenant t SET generation = %s, mac_key_id = %s, mac = i.mac
FROM unnest(%s::text[], %s::bytea[]) AS i (name, mac) WHERE t.name = i.name
"""
_PUT_SECRETS = """
INSERT INTO key_secret (tenant, key_id, version, wrapped_dek, envelope)
SELECT * FROM unnest(%b::text[], %b::text[], %b::int[], %b::bytea[], %b::bytea[])
ON CONFLICT (tenant, key_id, version) DO UPDATE SET (wrapped_dek, envelope)
    = (excluded.wrapped_dek, excluded.envelope)
"""
_DROP_SECRETS = """
DELETE FROM key_secret s
USING unnest(%s::text[], %s::text[], %s::int[]) AS w (tenant, key_id, version)
WHERE s.tenant = w.tenant AND s.key_id = w.key_id AND s.version = w.version
"""
_DROP_ALL_SECRETS = "DELETE FROM key_secret WHERE tenant = %s"
# A name once, however many rows somebody made of it.
_NAMES = """
SELECT name, greatest(max(sequence), 0) FROM tenant
WHERE (%(after)s::text IS NULL OR name > %(after)s) GROUP BY name ORDER BY name LIMIT %(limit)s
"""
_COUNT = "SELECT count(*) FROM tenant WHERE name <> ''"


@dataclass(slots=True)
class Write:
    """What one transaction writes: rows, with the columns of `_WRITE` in their order."""

    #: (name, sequence that was read, then of what is written: generation, sequence, hash, state or
    #: None, usage, id of the MAC's key, MAC, due time or None)
    tenants: list[Row] = field(default_factory=list)
    #: (tenant, sequence, key id, body, hash)
    events: list[Row] = field(default_factory=list)
    #: (tenant, part, state, usage)
    parts: list[Row] = field(default_factory=list)
    #: (tenant, part, usage), where the state stays.
    used: list[Row] = field(default_factory=list)
    #: (lease id, tenant, key id, version, holder, sequence of its event, end)
    leases: list[Row] = field(default_factory=list)


#: Tenant, key id, version.
SecretName = tuple[str, str, int]


async def rows(connection: Connection, names: Collection[str], *, lock: bool) -> list[Row]:
    """Return (name, generation, sequence, head hash, state, usage, MAC key's id, MAC)."""
    statement = _ROWS_TO_WRITE if lock else _ROWS_TO_READ
    return await (await connection.execute(statement, (list(names),), binary=True)).fetchall()


async def load(
    connection: Connection,
    names: Collection[str],
    parts: Collection[tuple[str, int]],
    secrets: Collection[SecretName],
    *,
    lock: bool,
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return rows as `rows` does; (tenant, part, state, usage) of parts; (tenant, key id, version,
    wrapped data key, envelope) of versions. In a pipeline that is one round trip; the rows are
    locked before the rest is read."""
    statement = _ROWS_TO_WRITE if lock else _ROWS_TO_READ
    cursors = [await connection.execute(statement, (list(names),), binary=True)]
    if parts:
        cursors.append(await connection.execute(_PARTS, columns(parts, 2), binary=True))
    if secrets:
        cursors.append(await connection.execute(_SECRETS, columns(secrets, 3), binary=True))
    fetched = [await cursor.fetchall() for cursor in cursors]
    stored = fetched.pop() if secrets else []
    return fetched[0], whole(fetched[1] if parts else []), whole(stored)


async def create(connection: Connection, name: str) -> None:
    """Add an empty row, to be written in the same transaction."""
    await connection.execute(_CREATE, (name,))


async def write(connection: Connection, change: Write) -> None:
    """Write a change. It fails, as a whole, where a row is not what was read of it."""
    parameters = [
        *columns(change.tenants, 10),
        *columns(change.events, 5),
        *columns(change.parts, 4),
        *columns(change.used, 3),
        *columns(change.leases, 7),
    ]
    await connection.execute(_WRITE, [*parameters, len(change.tenants)])


async def reseal(
    connection: Connection, generation: int, mac_key: str, macs: Sequence[tuple[str, bytes]]
) -> None:
    """Write the generation and the MAC of rows, by name."""
    await connection.execute(_RESEAL, (generation, mac_key, *columns(macs, 2)))


async def put_secrets(connection: Connection, new: dict[SecretName, tuple[bytes, bytes]]) -> None:
    """Store (wrapped data key, envelope) of versions."""
    stored = [(*name, *secret) for name, secret in new.items()]
    await connection.execute(_PUT_SECRETS, columns(stored, 5))


async def drop_secrets(connection: Connection, gone: Collection[SecretName]) -> None:
    """Delete what is stored of versions."""
    await connection.execute(_DROP_SECRETS, columns(gone, 3))


async def drop_all_secrets(connection: Connection, tenant: str) -> None:
    """Delete what is stored of every version of a tenant's keys."""
    await connection.execute(_DROP_ALL_SECRETS, (tenant,))


async def names(connection: Connection, after: str | None, limit: int) -> dict[str, int]:
    """Return names after one, in order, each with its row's sequence; None: from the first, which
    is the deployment's own."""
    cursor = await connection.execute(_NAMES, {"after": after, "limit": limit}, binary=True)
    return dict(whole(await cursor.fetchall()))


async def every_name(database: Database) -> AsyncIterator[dict[str, int]]:
    """Yield all that `names` returns, a thousand at a time, each in a transaction of its own."""
    after: str | None = None
    while True:
        async with database.transaction() as connection:
            found = await names(connection, after, _PAGE)
        if not found:
            return
        yield found
        *_, after = found


async def count(database: Database) -> int:
    """Return how many tenants there are."""
    row = await database.one(_COUNT)
    return int(row[0]) if row else 0
