"""Keys and their versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
import psycopg.errors

from services.keyvault.database import Connection, Database, Row
from services.keyvault.domain import Key, State, Version

_STATES = frozenset(int(state) for state in State)
# Text is longer than any that keyvault writes only in a row that somebody else wrote: what is
# left of it fails its MAC, and fits into an answer.
_COLUMNS = """
SELECT k.tenant, k.key_id, left(k.provider, 300), left(k.owner, 300), left(k.display_name, 300),
       k.revision, k.create_time,
       v.version, v.state, v.state_sequence, v.state_mac, left(v.hint, 300),
       left(v.kek_backend, 300), v.kek_version, v.create_time, v.state_time
FROM provider_key k JOIN key_version v USING (tenant, key_id)
"""
_GET = _COLUMNS + "WHERE k.tenant = %s AND k.key_id = %s ORDER BY v.version"
# A key lives as long as something of it can be opened, whatever else its rows say; and what has
# no version is no key, and fills no page; nor does what has an id that no request can name
# (custody.proto): nobody could destroy it, and a tenant's deletion would never end.
_PAGE_WHERE = """
WHERE k.tenant = %(tenant)s AND k.key_id IN (
    SELECT p.key_id FROM provider_key p
    WHERE p.tenant = %(tenant)s AND p.key_id > %(after)s
      AND p.key_id ~ '^key_[0-9a-z]{26}$' AND EXISTS (
        SELECT FROM key_version e WHERE e.tenant = p.tenant AND e.key_id = p.key_id
          AND (%(destroyed)s OR e.wrapped_dek IS NOT NULL OR e.envelope IS NOT NULL))
    ORDER BY p.key_id LIMIT %(limit)s
) ORDER BY k.key_id, v.version
"""
_PAGE = _COLUMNS + _PAGE_WHERE
_OF_TENANT = _COLUMNS + "WHERE k.tenant = %s ORDER BY k.key_id, v.version"
_STORED = """
SELECT key_id, count(*) FILTER (WHERE wrapped_dek IS NOT NULL OR envelope IS NOT NULL)
FROM key_version WHERE tenant = %s GROUP BY key_id ORDER BY key_id
"""
_ERASE = """
UPDATE key_version SET wrapped_dek = NULL, wrap_mac = NULL, envelope = NULL
WHERE tenant = %(tenant)s AND (wrapped_dek IS NOT NULL OR envelope IS NOT NULL)
  AND (%(key_id)s::text IS NULL OR key_id = %(key_id)s)
  AND (%(version)s::integer IS NULL OR version = %(version)s)
"""
_INSERT_KEY = """
INSERT INTO provider_key (tenant, key_id, provider, owner, display_name)
VALUES (%s, %s, %s, %s, %s)
"""
_INSERT_VERSION = """
INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,
                         kek_backend, kek_version, wrapped_dek, wrap_mac, envelope)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_SET_STATE = """
UPDATE key_version SET state = %s, state_sequence = %s, state_mac = %s, state_time = now(),
    wrapped_dek = CASE WHEN %s THEN NULL ELSE wrapped_dek END,
    wrap_mac = CASE WHEN %s THEN NULL ELSE wrap_mac END,
    envelope = CASE WHEN %s THEN NULL ELSE envelope END
WHERE tenant = %s AND key_id = %s AND version = %s
"""
_TOUCH = """
UPDATE provider_key SET revision = least(revision, 9223372036854775806) + 1,
    destroy_time = CASE WHEN %s THEN coalesce(destroy_time, now()) ELSE destroy_time END
WHERE tenant = %s AND key_id = %s
"""
_SAME_NAME = """
SELECT key_id FROM provider_key
WHERE tenant = %s AND provider = %s AND owner = %s AND display_name = %s AND destroy_time IS NULL
"""
# SUPERSEDED, as a number that the index of such rows has too.
_PAST_GRACE = """
SELECT DISTINCT tenant, key_id FROM key_version
WHERE state = 3 AND state_time < now() - interval '24 hours'
"""


@dataclass(frozen=True, slots=True)
class StoredSecret:
    """What a version needs to be opened, besides its context."""

    hint: str
    kek_backend: str
    kek_version: int
    wrapped_dek: bytes
    wrap_mac: bytes
    envelope: bytes


async def get(connection: Connection, tenant: str, key_id: str) -> Key | None:
    """Return a key with its versions."""
    rows = await (await connection.execute(_GET, (tenant, key_id))).fetchall()
    return next(iter(_keys(rows)), None)


async def of_tenant(connection: Connection, tenant: str) -> list[Key]:
    """Return every key of a tenant."""
    return _keys(await (await connection.execute(_OF_TENANT, (tenant,))).fetchall())


async def stored(database: Database, tenant: str) -> dict[str, int]:
    """Return, by id, how many versions of each of a tenant's keys have ciphertext."""
    return dict(await database.all(_STORED, (tenant,)))


async def erase(
    connection: Connection, tenant: str, key_id: str | None = None, version: int | None = None
) -> int:
    """Delete all ciphertext of a tenant's keys, or of one, or of a version of it, whatever its
    rows say; return of how many versions there was some."""
    parameters = {"tenant": tenant, "key_id": key_id, "version": version}
    return (await connection.execute(_ERASE, parameters)).rowcount


async def page(
    database: Database, tenant: str, after: str, limit: int, *, destroyed: bool
) -> list[Key]:
    """Return up to `limit` keys whose id is above `after`."""
    parameters = {"tenant": tenant, "after": after, "limit": limit, "destroyed": destroyed}
    return _keys(await database.all(_PAGE, parameters))


async def same_name(
    connection: Connection, tenant: str, provider: str, owner: str, display_name: str
) -> str | None:
    """Return the id of the key that has this name."""
    cursor = await connection.execute(_SAME_NAME, (tenant, provider, owner, display_name))
    row = await cursor.fetchone()
    return row[0] if row else None


async def insert_key(connection: Connection, key: Key) -> bool:
    """Store a new key, without versions; False where its id or name exists."""
    try:
        await connection.execute(
            _INSERT_KEY, (key.tenant, key.key_id, key.provider, key.owner, key.display_name)
        )
    except psycopg.errors.UniqueViolation:
        return False
    return True


async def insert_version(
    connection: Connection, key: Key, version: Version, secret: StoredSecret
) -> None:
    """Store a new version."""
    await connection.execute(
        _INSERT_VERSION,
        (
            key.tenant,
            key.key_id,
            version.version,
            int(version.state),
            version.state_sequence,
            version.state_mac,
            secret.hint,
            secret.kek_backend,
            secret.kek_version,
            secret.wrapped_dek,
            secret.wrap_mac,
            secret.envelope,
        ),
    )


async def set_state(connection: Connection, key: Key, version: Version) -> bool:
    """Store a version's state; DESTROYED deletes its ciphertext in the same statement. False where
    there is no such row."""
    gone = version.state is State.DESTROYED
    cursor = await connection.execute(
        _SET_STATE,
        (
            int(version.state),
            version.state_sequence,
            version.state_mac,
            gone,
            gone,
            gone,
            key.tenant,
            key.key_id,
            version.version,
        ),
    )
    return cursor.rowcount > 0


async def touch(connection: Connection, key: Key, *, destroyed: bool) -> None:
    """Count a change of a key; a destroyed key gives its name free."""
    await connection.execute(_TOUCH, (destroyed, key.tenant, key.key_id))


async def past_grace(database: Database) -> list[Row]:
    """Return (tenant, key id) of keys with a superseded version past its grace."""
    return await database.all(_PAST_GRACE)


def _keys(rows: Sequence[Row]) -> list[Key]:
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row[0], row[1]), []).append(row)
    return [key_of(own[0], [row[7:16] for row in own]) for own in grouped.values()]


def key_of(row: Row, versions: Sequence[Row]) -> Key:
    """Return a key from its seven columns and the nine of each of its versions."""
    tenant, key_id, provider, owner, display_name, revision, create_time = row[:7]
    return Key(
        tenant,
        key_id,
        provider,
        owner,
        display_name,
        revision,
        create_time,
        tuple(Version(one[0], state_of(one[1]), *one[2:]) for one in versions),
    )


def state_of(number: int) -> State:
    """Return a stored state; UNSPECIFIED for a number that keyvault does not write."""
    return State(number) if number in _STATES else State.UNSPECIFIED
