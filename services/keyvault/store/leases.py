"""Leases: redemption and closing, many in one transaction; what lives, what is overdue.

A group's rows travel as one JSON parameter: an array parameter for each column would
cost keyvault more than all the rest of its transaction.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from services.common import logs
from services.keyvault import chain
from services.keyvault.database import Connection, Database, Row, aside
from services.keyvault.domain import Key, State
from services.keyvault.limits import Meter, windows
from services.keyvault.store.holds import Hold
from services.keyvault.store.keys import key_of, state_of

log = logging.getLogger(__name__)
# First the chains are locked, always in this order; what is read by the statements after
# it is therefore what the last holder of the lock left behind: every change of a key, a
# lease, a meter or a hold is made under the lock of its tenant's chain.
_LOCK = "SELECT FROM chain WHERE chain = ANY(%s) ORDER BY chain FOR UPDATE"
_LOCK_OF_LEASES = """
SELECT FROM chain WHERE chain IN (SELECT 'tenants/' || tenant FROM lease WHERE lease_id = ANY(%s))
ORDER BY chain FOR UPDATE
"""
_VERSIONS = """
SELECT c.sequence, c.hash, clock_timestamp(),
       k.tenant, k.key_id, k.provider, k.owner, k.display_name, k.revision, k.create_time,
       v.version, v.state, v.state_sequence, v.state_mac, v.hint, v.kek_backend, v.kek_version,
       v.create_time, v.state_time, v.wrapped_dek, v.envelope,
       h.held, h.state_sequence, h.state_mac,
       t.in_flight, t.minute, t.minute_count, t.day, t.day_count,
       m.in_flight, m.minute, m.minute_count, m.day, m.day_count,
       ARRAY(SELECT grant_id FROM lease WHERE grant_id = ANY(%s))
FROM json_to_recordset(%s::json) AS wanted (tenant text, key_id text, version bigint)
JOIN chain c ON c.chain = 'tenants/' || wanted.tenant
JOIN provider_key k ON k.tenant = wanted.tenant AND k.key_id = wanted.key_id
JOIN key_version v
  ON v.tenant = k.tenant AND v.key_id = k.key_id AND v.version = wanted.version
LEFT JOIN tenant_hold h ON h.tenant = k.tenant
LEFT JOIN lease_meter t ON t.tenant = k.tenant AND t.key_id = ''
LEFT JOIN lease_meter m ON m.tenant = k.tenant AND m.key_id = k.key_id
"""
_REDEEMED = """
WITH item AS (
    SELECT * FROM json_to_recordset(%s::json) AS item (
        lease_id text, grant_id text, tenant text, version integer, holder text,
        attempt_id text, review_id text, fence bigint, purpose smallint, expire_time timestamptz,
        minute bigint, day bigint,
"""
# In one order of grants everywhere: the unique index makes two transactions wait for each other.
_COUNTED = """
)), redeemed AS (
    INSERT INTO lease (lease_id, grant_id, tenant, key_id, version, holder, attempt_id,
                       review_id, fence, purpose, expire_time)
    SELECT lease_id, grant_id, tenant, key_id, version, holder, attempt_id,
           review_id, fence, purpose, expire_time FROM item ORDER BY grant_id
), counted AS (
    INSERT INTO lease_meter AS m (tenant, key_id, in_flight, minute, minute_count, day, day_count)
    SELECT tenant, coalesce(key_id, ''), count(*), max(minute), count(*), max(day), count(*)
    FROM item GROUP BY GROUPING SETS ((tenant), (tenant, key_id))
    ON CONFLICT (tenant, key_id) DO UPDATE SET
        in_flight = m.in_flight + excluded.in_flight,
        minute = greatest(m.minute, excluded.minute),
        minute_count = excluded.minute_count
            + CASE WHEN m.minute >= excluded.minute THEN m.minute_count ELSE 0 END,
        day = greatest(m.day, excluded.day),
        day_count = excluded.day_count
            + CASE WHEN m.day >= excluded.day THEN m.day_count ELSE 0 END
)
"""
# Leases, their counts, their events and the heads of the chains: one statement.
_REDEEM = _REDEEMED + chain.ITEM + _COUNTED + chain.RECORD
# A lease ends on the record also where its key's rows are hidden, or say what can't be.
_OF_LEASES = """
SELECT c.sequence, c.hash, clock_timestamp(),
       coalesce(k.provider, ''), coalesce(k.owner, ''), coalesce(v.state, 0),
       l.release_time IS NOT NULL,
       l.lease_id, l.grant_id, l.tenant, l.key_id, greatest(l.version, 0), l.holder, l.attempt_id,
       l.review_id, greatest(l.fence, 0), l.purpose, l.expire_time
FROM lease l
JOIN chain c ON c.chain = 'tenants/' || l.tenant
LEFT JOIN provider_key k ON k.tenant = l.tenant AND k.key_id = l.key_id
LEFT JOIN key_version v ON v.tenant = l.tenant AND v.key_id = l.key_id AND v.version = l.version
WHERE l.lease_id = ANY(%s)
"""
# Whoever ends leases counts them down, by the rows that did end.
_UNCOUNT = """
UPDATE lease_meter AS m SET in_flight = greatest(m.in_flight, gone.number) - gone.number
FROM (SELECT tenant, coalesce(key_id, '') AS key_id, count(*) AS number
      FROM ended GROUP BY GROUPING SETS ((tenant), (tenant, key_id))) AS gone
WHERE m.tenant = gone.tenant AND m.key_id = gone.key_id
"""
_CLOSED = """
, ended AS (
    SELECT lease.tenant, lease.key_id FROM lease JOIN item USING (lease_id) WHERE end_time IS NULL
), closed AS (
    UPDATE lease
    SET end_time = coalesce(end_time, now()), release_time = now(), outcome = item.outcome
    FROM item WHERE lease.lease_id = item.lease_id AND release_time IS NULL
)
"""
_TO_CLOSE = """
WITH item AS (
    SELECT * FROM json_to_recordset(%s::json) AS item (lease_id text, outcome smallint)
)
"""
_TO_CLOSE_RECORDED = """
WITH item AS (
    SELECT * FROM json_to_recordset(%s::json) AS item (lease_id text, outcome smallint,
"""
_CLOSE = _TO_CLOSE + _CLOSED + _UNCOUNT
_UNCOUNTED = ", uncounted AS (" + _UNCOUNT + ")"
_CLOSE_RECORDED = _TO_CLOSE_RECORDED + chain.ITEM + "))" + _CLOSED + _UNCOUNTED + chain.RECORD
# Numbers must become visible in their order, or a watcher would miss one.
_REVOCATION_ORDER = "SELECT pg_advisory_xact_lock(hashtext('byokeep_revocation'))"
_REVOKE_ENDED = """
WITH ended AS (
    UPDATE lease SET end_time = now(), outcome = %(outcome)s
    WHERE tenant = %(tenant)s AND end_time IS NULL
      AND (%(key_id)s::text IS NULL OR key_id = %(key_id)s)
      AND (%(versions)s::integer[] IS NULL OR version = ANY(%(versions)s))
      AND (%(lease_id)s::text IS NULL OR lease_id = %(lease_id)s)
    RETURNING lease_id, tenant, key_id, holder
), told AS (
    INSERT INTO revocation (lease_id, holder) SELECT lease_id, holder FROM ended WHERE %(told)s
    RETURNING sequence
)
"""
# A number below one that was there before is news to no watcher.
_NUMBER_ENDED = """
SELECT count(*), (SELECT min(sequence) FROM told) > (SELECT max(sequence) FROM revocation)
FROM ended
"""
_REVOKE = _REVOKE_ENDED + _UNCOUNTED + _NUMBER_ENDED
_UNTOLD = "watchers_not_told"
_LIVE_COUNT = "SELECT count(*) FROM lease WHERE end_time IS NULL AND expire_time > now()"
# A time as text: not every time that a row can have is one in Python.
_OVERDUE = """
SELECT expire_time::text, lease_id FROM lease
WHERE release_time IS NULL AND expire_time < now() - interval '5 seconds'
  AND (expire_time, lease_id) > (%s::timestamptz, %s)
ORDER BY expire_time, lease_id LIMIT %s
"""

#: Tenant, key id, version.
VersionName = tuple[str, str, int]
#: When a lease expired, as the database writes it, and its id.
Overdue = tuple[str, str]
OLDEST: Overdue = ("-infinity", "")


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease, as stored."""

    lease_id: str
    grant_id: str
    tenant: str
    key_id: str
    version: int
    holder: str
    attempt_id: str
    review_id: str
    fence: int
    purpose: int
    expire_time: datetime.datetime


@dataclass(frozen=True, slots=True)
class Locked:
    """A key version under its chain's lock: `key` has this version alone."""

    head: chain.Head
    key: Key
    wrapped_dek: bytes
    envelope: bytes
    hold: Hold | None
    tenant_meter: Meter
    key_meter: Meter


@dataclass(frozen=True, slots=True)
class LockedLease:
    """A lease under its chain's lock."""

    head: chain.Head
    provider: str
    owner: str
    state: State
    released: bool
    lease: Lease


async def lock(
    connection: Connection, versions: Collection[VersionName], grants: Collection[str]
) -> tuple[dict[VersionName, Locked], set[str]]:
    """Lock tenants' chains; return the versions that exist, and which grants are used up.

    Where no version exists, nothing is said of grants.
    """
    await connection.execute(_LOCK, (sorted({chain.tenant_chain(one[0]) for one in versions}),))
    wanted = json.dumps([{"tenant": t, "key_id": k, "version": v} for t, k, v in versions])
    cursor = await connection.execute(_VERSIONS, (list(grants), wanted), binary=True)
    rows = await cursor.fetchall()
    found = {(row[3], row[4], row[10]): _locked(row) for row in rows}
    return found, set(rows[0][34]) if rows else set()


def _locked(row: Row) -> Locked:
    head = chain.Head(chain.tenant_chain(row[3]), row[0], row[1], row[2])
    hold = None if row[21] is None else (row[21], row[22], row[23])
    meters = [Meter(*own) if own[0] is not None else Meter() for own in (row[24:29], row[29:34])]
    return Locked(head, key_of(row[3:10], [row[10:19]]), row[19], row[20], hold, *meters)


async def redeem(
    connection: Connection, leases: Iterable[tuple[Lease, chain.Link]], now: datetime.datetime
) -> None:
    """Store redemptions with their events, and count them; their chains are locked.

    `now` is the database's time. Links are in the order of their chains.
    """
    minute, day = windows(now)
    items = [
        {
            "lease_id": one.lease_id,
            "grant_id": one.grant_id,
            "tenant": one.tenant,
            "version": one.version,
            "holder": one.holder,
            "attempt_id": one.attempt_id,
            "review_id": one.review_id,
            "fence": one.fence,
            "purpose": one.purpose,
            "expire_time": one.expire_time.isoformat(),
            "minute": minute,
            "day": day,
            **link.item(chain.tenant_chain(one.tenant)),
        }
        for one, link in leases
    ]
    await connection.execute(_REDEEM, (json.dumps(items),))


async def lock_leases(connection: Connection, lease_ids: Collection[str]) -> dict[str, LockedLease]:
    """Lock the chains of leases; return those that exist."""
    ids = list(lease_ids)
    await connection.execute(_LOCK_OF_LEASES, (ids,))
    rows = await (await connection.execute(_OF_LEASES, (ids,), binary=True)).fetchall()
    return {row[7]: _locked_lease(row) for row in rows}


def _locked_lease(row: Row) -> LockedLease:
    lease = Lease(*row[7:])
    head = chain.Head(chain.tenant_chain(lease.tenant), row[0], row[1], row[2])
    return LockedLease(head, row[3], row[4], state_of(row[5]), row[6], lease)


async def close(connection: Connection, lease_id: str, outcome: int) -> None:
    """Close a lease and end it where it lives; its chain is locked."""
    await connection.execute(_CLOSE, (json.dumps([{"lease_id": lease_id, "outcome": outcome}]),))


async def close_recorded(
    connection: Connection, closed: Iterable[tuple[Lease, int, chain.Link]]
) -> None:
    """Close leases with an outcome and an event each; their chains are locked."""
    items = [
        {"lease_id": lease.lease_id, "outcome": outcome}
        | link.item(chain.tenant_chain(lease.tenant))
        for lease, outcome, link in closed
    ]
    await connection.execute(_CLOSE_RECORDED, (json.dumps(items),))


async def revoke(
    connection: Connection,
    tenant: str,
    key_id: str | None,
    versions: Collection[int] | None,
    outcome: int,
    lease_id: str | None = None,
) -> int:
    """End a tenant's live leases, or those of versions of a key, or one; number them for watchers.

    The tenant's chain is locked. Returns how many ended. Where somebody made it impossible to tell
    watchers, the leases end all the same, and the log says so.
    """
    await connection.execute(_REVOCATION_ORDER)
    parameters = {
        "tenant": tenant,
        "key_id": key_id,
        "versions": None if versions is None else list(versions),
        "lease_id": lease_id,
        "outcome": outcome,
    }
    row: Row | None = None
    async with aside(connection, _UNTOLD):
        row = await _revoke(connection, {**parameters, "told": True})
    if row is None:
        row = await _revoke(connection, {**parameters, "told": False})
    elif row[1] is False:
        logs.event(log, _UNTOLD, level=logging.CRITICAL)
    return int(row[0]) if row else 0


async def _revoke(connection: Connection, parameters: dict[str, object]) -> Row | None:
    return await (await connection.execute(_REVOKE, parameters)).fetchone()


async def live_count(database: Database) -> int:
    """Return how many leases live now."""
    row = await database.one(_LIVE_COUNT)
    return int(row[0]) if row else 0


async def overdue(database: Database, after: Overdue, limit: int) -> list[Overdue]:
    """Return leases that were never released, the oldest first."""
    return [(row[0], row[1]) for row in await database.all(_OVERDUE, (*after, limit))]
