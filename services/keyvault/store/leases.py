"""Leases: redemption, release, revocation."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from byokeep.keyvault.v1 import grant_pb2

from services.keyvault import chain
from services.keyvault.database import Connection, Cursor, Database, Row
from services.keyvault.domain import Key, State
from services.keyvault.store.keys import key_of

# One statement locks the tenant's chain and the version: PostgreSQL re-reads locked
# rows after it waited, so a revocation that committed meanwhile is seen.
_LOCK = """
SELECT c.sequence, c.hash, clock_timestamp(),
       k.tenant, k.key_id, k.provider, k.owner, k.display_name, k.revision, k.create_time,
       v.version, v.state, v.state_sequence, v.state_mac, v.hint, v.kek_backend, v.kek_version,
       v.create_time, v.state_time, v.wrapped_dek, v.envelope
FROM chain c
JOIN provider_key k ON k.tenant = %(tenant)s AND k.key_id = %(key_id)s
JOIN key_version v
  ON v.tenant = k.tenant AND v.key_id = k.key_id AND v.version = %(version)s
WHERE c.chain = %(chain)s
FOR UPDATE OF c, v
"""
# Lease, event and chain head in one statement; nothing of it where the grant was
# redeemed before or the cap is reached.
_REDEEM = """
WITH redeemed AS (
    INSERT INTO lease (lease_id, grant_id, tenant, key_id, version, holder, attempt_id,
                       review_id, fence, purpose, expire_time)
    SELECT %(lease_id)s, %(grant_id)s, %(tenant)s, %(key_id)s, %(version)s, %(holder)s,
           %(attempt_id)s, %(review_id)s, %(fence)s, %(purpose)s, %(expire_time)s
    WHERE (SELECT count(*) FROM lease
           WHERE tenant = %(tenant)s AND end_time IS NULL AND expire_time > now()) < %(cap)s
    ON CONFLICT (grant_id) DO NOTHING
    RETURNING 1
), event AS (
    INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)
    SELECT %(chain)s, %(sequence)s, %(key_id)s, %(body)s, %(previous)s, %(hash)s FROM redeemed
), head AS (
    UPDATE chain SET sequence = %(sequence)s, hash = %(hash)s
    WHERE chain = %(chain)s AND EXISTS (SELECT 1 FROM redeemed)
)
SELECT count(*) FROM redeemed
"""
_GRANT_USED = "SELECT 1 FROM lease WHERE grant_id = %s"
# As _LOCK, from a lease; its row is locked too, so that it is closed once.
_LOCK_LEASE = """
SELECT c.sequence, c.hash, clock_timestamp(),
       k.provider, k.owner, v.state, l.release_time IS NOT NULL,
       l.lease_id, l.grant_id, l.tenant, l.key_id, l.version, l.holder, l.attempt_id, l.review_id,
       l.fence, l.purpose, l.expire_time
FROM lease l
JOIN chain c ON c.chain = 'tenants/' || l.tenant
JOIN provider_key k ON k.tenant = l.tenant AND k.key_id = l.key_id
JOIN key_version v ON v.tenant = l.tenant AND v.key_id = l.key_id AND v.version = l.version
WHERE l.lease_id = %s
FOR UPDATE OF c, l, v
"""
_CLOSE = """
UPDATE lease SET end_time = coalesce(end_time, now()), release_time = now(), outcome = %s
WHERE lease_id = %s AND release_time IS NULL
RETURNING 1
"""
# With its event, in one statement, under the lock of _LOCK_LEASE.
_CLOSE_RECORDED = """
WITH closed AS (
    UPDATE lease
    SET end_time = coalesce(end_time, now()), release_time = now(), outcome = %(outcome)s
    WHERE lease_id = %(lease_id)s
), event AS (
    INSERT INTO audit_event (chain, sequence, key_id, body, previous_hash, hash)
    VALUES (%(chain)s, %(sequence)s, %(key_id)s, %(body)s, %(previous)s, %(hash)s)
)
UPDATE chain SET sequence = %(sequence)s, hash = %(hash)s WHERE chain = %(chain)s
"""
# Numbers must become visible in their order, or a watcher would miss one.
_REVOCATION_ORDER = "SELECT pg_advisory_xact_lock(hashtext('byokeep_revocation'))"
_REVOKE = """
WITH ended AS (
    UPDATE lease SET end_time = now(), outcome = %(outcome)s
    WHERE tenant = %(tenant)s AND key_id = %(key_id)s AND end_time IS NULL
      AND version = ANY(%(versions)s)
    RETURNING lease_id, holder
)
INSERT INTO revocation (lease_id, holder) SELECT lease_id, holder FROM ended
"""
_NEWS = "SELECT sequence, lease_id, holder FROM revocation WHERE sequence > %s ORDER BY sequence"
_NEWEST = "SELECT coalesce(max(sequence), 0) FROM revocation"
_LIVE = """
SELECT lease_id FROM lease
WHERE holder = %s AND end_time IS NULL AND expire_time > now()
"""
_LIVE_COUNT = "SELECT count(*) FROM lease WHERE end_time IS NULL AND expire_time > now()"
_OVERDUE = """
SELECT lease_id FROM lease
WHERE release_time IS NULL AND expire_time < now() - interval '5 seconds'
ORDER BY expire_time LIMIT 500
"""


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
    """A key version whose row and chain are locked: `key` has this version alone."""

    head: chain.Head
    key: Key
    wrapped_dek: bytes
    envelope: bytes


async def lock(connection: Connection, grant: grant_pb2.Grant) -> Locked | None:
    """Lock and return the chain head, key and version that a grant names."""
    name = chain.tenant_chain(grant.tenant)
    cursor = await connection.execute(
        _LOCK,
        {
            "tenant": grant.tenant,
            "key_id": grant.key_id,
            "version": grant.key_version,
            "chain": name,
        },
    )
    row = await cursor.fetchone()
    if row is None:
        return None
    head = chain.Head(name, row[0], row[1], row[2])
    return Locked(head, key_of(row[3:10], [row[10:19]]), row[19], row[20])


async def redeem(
    connection: Connection, lease: Lease, head: chain.Head, link: chain.Link, cap: int
) -> Cursor:
    """Store a redemption with its event; nothing where the grant is used up or the cap reached.

    The count of redemptions, 0 or 1, is in the cursor once the transaction is over.
    """
    return await connection.execute(
        _REDEEM,
        {
            "lease_id": lease.lease_id,
            "grant_id": lease.grant_id,
            "tenant": lease.tenant,
            "version": lease.version,
            "holder": lease.holder,
            "attempt_id": lease.attempt_id,
            "review_id": lease.review_id,
            "fence": lease.fence,
            "purpose": lease.purpose,
            "expire_time": lease.expire_time,
            "cap": cap,
            **_event_parameters(head, link),
        },
    )


async def grant_used(database: Database, grant_id: str) -> bool:
    """Say whether a grant was redeemed before."""
    return await database.one(_GRANT_USED, (grant_id,)) is not None


@dataclass(frozen=True, slots=True)
class LockedLease:
    """A lease whose row, chain and key version are locked."""

    head: chain.Head
    provider: str
    owner: str
    state: State
    released: bool
    lease: Lease


async def lock_lease(connection: Connection, lease_id: str) -> LockedLease | None:
    """Lock and return a lease."""
    row = await (await connection.execute(_LOCK_LEASE, (lease_id,))).fetchone()
    if row is None:
        return None
    lease = Lease(*row[7:])
    head = chain.Head(chain.tenant_chain(lease.tenant), row[0], row[1], row[2])
    return LockedLease(head, row[3], row[4], State(row[5]), row[6], lease)


async def close_recorded(
    connection: Connection, lease: Lease, outcome: int, head: chain.Head, link: chain.Link
) -> None:
    """Close a locked lease, with its event."""
    await connection.execute(
        _CLOSE_RECORDED,
        {"lease_id": lease.lease_id, "outcome": outcome, **_event_parameters(head, link)},
    )


def _event_parameters(head: chain.Head, link: chain.Link) -> dict[str, object]:
    return {
        "chain": head.chain,
        "sequence": link.sequence,
        "key_id": link.key_id,
        "body": link.body,
        "previous": link.previous_hash,
        "hash": link.hash,
    }


async def close(connection: Connection, lease_id: str, outcome: int) -> bool:
    """Close a lease, and end it where it lives; False where it was closed before."""
    return await (await connection.execute(_CLOSE, (outcome, lease_id))).fetchone() is not None


async def revoke(
    connection: Connection, tenant: str, key_id: str, versions: Sequence[int], outcome: int
) -> None:
    """End every live lease of some versions, and number them for watchers."""
    await connection.execute(_REVOCATION_ORDER)
    await connection.execute(
        _REVOKE,
        {"tenant": tenant, "key_id": key_id, "versions": list(versions), "outcome": outcome},
    )


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


async def live_count(database: Database) -> int:
    """Return how many leases live now."""
    row = await database.one(_LIVE_COUNT)
    return int(row[0]) if row else 0


async def overdue(database: Database) -> list[str]:
    """Return ids of leases that were never released."""
    return [row[0] for row in await database.all(_OVERDUE)]
