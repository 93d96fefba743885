"""Intake keys and requests."""

from __future__ import annotations

import datetime
from dataclasses import astuple, dataclass

from services.keyvault.database import Database

_KEY = """
SELECT key_id, suite, public, kek_backend, kek_version, wrapped_dek, envelope, not_before,
       not_after
FROM intake_key
"""
_NEWEST = _KEY + "WHERE suite = %s AND not_after > now() + %s ORDER BY not_before DESC LIMIT 1"
_GET = _KEY + "WHERE key_id = %s AND not_after + interval '5 minutes' > now()"
_INSERT = """
INSERT INTO intake_key (key_id, suite, public, kek_backend, kek_version, wrapped_dek, envelope,
                        not_before, not_after)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_FORGET_CLOSED = "DELETE FROM intake_key WHERE not_after + interval '5 minutes' < now()"
# Counted before it is opened, and again where it comes again without an answer.
_BEGIN = """
INSERT INTO intake_request AS r (tenant, request_id, digest, actor, key_id)
VALUES (%(tenant)s, %(request_id)s, %(digest)s, %(actor)s, %(key_id)s)
ON CONFLICT (tenant, request_id) DO UPDATE SET openings = r.openings
    + CASE WHEN r.digest = %(digest)s AND r.refusal IS NULL THEN 1 ELSE 0 END
RETURNING digest, refusal
"""
_RECENT = """
SELECT coalesce(sum(openings) FILTER (WHERE actor = %s), 0), coalesce(sum(openings), 0)
FROM intake_request WHERE tenant = %s AND create_time > now() - interval '1 hour'
"""
_REFUSED = "UPDATE intake_request SET refusal = %s WHERE tenant = %s AND request_id = %s"
_FORGET = "DELETE FROM intake_request WHERE create_time < now() - interval '7 days'"


@dataclass(frozen=True, slots=True)
class IntakeKey:
    """An intake key, its private part wrapped: a row, in the order of its columns."""

    key_id: str
    suite: int
    public: bytes
    kek_backend: str
    kek_version: int
    wrapped_dek: bytes
    envelope: bytes
    not_before: datetime.datetime
    not_after: datetime.datetime


@dataclass(frozen=True, slots=True)
class Request:
    """A sealed key that came in: digest of what was sent, and why it was refused for good."""

    digest: bytes
    refusal: str | None


async def newest(database: Database, suite: int, remaining: datetime.timedelta) -> IntakeKey | None:
    """Return the newest intake key of a suite whose window lasts at least that much longer."""
    row = await database.one(_NEWEST, (suite, remaining))
    return IntakeKey(*row) if row else None


async def get(database: Database, key_id: str) -> IntakeKey | None:
    """Return an intake key that is not closed (window and five minutes)."""
    row = await database.one(_GET, (key_id,))
    return IntakeKey(*row) if row else None


async def insert(database: Database, key: IntakeKey) -> None:
    """Store an intake key."""
    async with database.transaction() as connection:
        await connection.execute(_INSERT, astuple(key))


async def forget(database: Database) -> None:
    """Forget the intake keys that are closed, whose KEKs die with their epoch, and requests older
    than a week."""
    async with database.transaction() as connection:
        await connection.execute(_FORGET_CLOSED)
        await connection.execute(_FORGET)


async def begin(
    database: Database, tenant: str, request_id: str, digest: bytes, actor: str, key_id: str
) -> Request:
    """Count a request before it is opened; return it, or the earlier one with the same id."""
    parameters = {
        "tenant": tenant,
        "request_id": request_id,
        "digest": digest,
        "actor": actor,
        "key_id": key_id,
    }
    async with database.transaction() as connection:
        row = await (await connection.execute(_BEGIN, parameters)).fetchone()
    assert row is not None  # noqa: S101 RETURNING of an upsert
    return Request(*row)


async def recent(database: Database, tenant: str, actor: str) -> tuple[int, int]:
    """Return how many seals were opened in the last hour: of the actor, and of the tenant."""
    row = await database.one(_RECENT, (actor, tenant))
    return (int(row[0]), int(row[1])) if row else (0, 0)


async def refused(database: Database, tenant: str, request_id: str, rule: str) -> None:
    """Note that a request is refused for good."""
    async with database.transaction() as connection:
        await connection.execute(_REFUSED, (rule, tenant, request_id))
