"""Jobs on tenants' KEKs: their state, and the rows that they work through."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, LiteralString

from services.keyvault.database import Connection, Database, Row

Phase = Literal[
    "QUEUED", "START", "REWRAP", "SETTLE", "TRIM", "DONE", "PARTIAL", "FAILED", "CANCELLED"
]
ENDED: frozenset[Phase] = frozenset(("DONE", "PARTIAL", "FAILED", "CANCELLED"))
#: Highest version that a minimum may have: the KEK is gone as a whole.
WHOLE = 2**31 - 1
#: A row that is locked whenever a pass comes by is left to the next one, so many times.
PASSES = 30
#: While one process is at a step that leaves the database, the others wait this long.
CLAIM = datetime.timedelta(seconds=30)

# No count is below zero in an event, whatever a row says.
_COLUMNS: LiteralString = (
    "job_id, tenant, caller, rotate, rewrap, trim, phase, target_backend, target_version, total,"
    " greatest(done, 0), greatest(failed, 0), after_key_id, after_version, passes, reason"
)
_INSERT = """
INSERT INTO kek_job (job_id, tenant, request_id, caller, rotate, rewrap, trim, phase, due_time)
VALUES (%s, %s, %s, %s, %s, %s, %s, 'QUEUED', now() + %s)
ON CONFLICT DO NOTHING
"""
_HASTEN = """
UPDATE kek_job SET due_time = least(due_time, now() + %s), end_time = NULL,
    rotate = true, rewrap = true, trim = true, target_backend = '', target_version = 0,
    total = NULL, done = 0, failed = 0, after_key_id = '', after_version = 0, passes = 0
WHERE tenant = %s AND phase = 'QUEUED' AND caller = 'keyvault'
"""
_GET = f"SELECT {_COLUMNS} FROM kek_job WHERE job_id = %s"  # noqa: S608 constant columns
_OF_REQUEST = f"SELECT {_COLUMNS} FROM kek_job WHERE tenant = %s AND request_id = %s"  # noqa: S608
_LOCK = _GET + " AND phase = %s FOR UPDATE"
# A job that is being started is not QUEUED any more: a key that is destroyed from here on needs
# a sweep of its own.
_CLAIMED: LiteralString = """
UPDATE kek_job SET due_time = now() + %s,
    phase = CASE WHEN phase = 'QUEUED' THEN 'START' ELSE phase END
"""
_CLAIM = f"""
{_CLAIMED} WHERE job_id = (
    SELECT job_id FROM kek_job
    WHERE end_time IS NULL AND phase = ANY(%s) AND due_time <= now()
    ORDER BY due_time LIMIT 1 FOR UPDATE SKIP LOCKED
) RETURNING {_COLUMNS}
"""  # noqa: S608
_CLAIM_ONE = f"""
{_CLAIMED} WHERE job_id = %s AND phase IN ('QUEUED', 'START') AND due_time <= now()
RETURNING {_COLUMNS}
"""
# The jobs of one tenant are worked off in their order, each by one process at a time; those
# of many tenants take turns. Only what is at work itself goes before: a planted job that never is
# would hold up all sweeps after it. So two of one tenant may be at work at once, where the older
# one was postponed: neither writes a row that the other has, or has changed (_SWAP), and nothing
# is trimmed before every row is proven, under the chain's lock, not to need it.
_NEXT_REWRAP = f"""
SELECT {_COLUMNS} FROM kek_job j
WHERE phase = 'REWRAP' AND due_time <= now() AND end_time IS NULL AND NOT EXISTS (
    SELECT 1 FROM kek_job o WHERE o.tenant = j.tenant AND o.phase = 'REWRAP'
      AND o.due_time <= now() AND o.end_time IS NULL
      AND (o.create_time, o.job_id) < (j.create_time, j.job_id))
ORDER BY update_time LIMIT 1 FOR UPDATE OF j SKIP LOCKED
"""  # noqa: S608
_STARTED = """
UPDATE kek_job SET phase = %s, target_backend = %s, target_version = %s, due_time = now(),
    update_time = now(), end_time = CASE WHEN %s THEN now() END
WHERE job_id = %s
"""
_MOVE = """
UPDATE kek_job SET phase = %s, reason = %s, due_time = now() + %s, update_time = now(),
    end_time = CASE WHEN %s THEN now() END
WHERE job_id = %s
"""
_CANCEL = """
UPDATE kek_job SET phase = 'CANCELLED', end_time = now(), update_time = now()
WHERE tenant = %s AND end_time IS NULL
"""
_FORGET_ENDED = "DELETE FROM kek_job WHERE end_time < now() - interval '30 days'"
_OPEN = "SELECT count(*) FROM kek_job WHERE end_time IS NULL"

_LEFT_WHERE: LiteralString = """
FROM key_version v
WHERE v.tenant = %(tenant)s AND v.wrapped_dek IS NOT NULL
  AND (v.kek_backend <> %(backend)s OR v.kek_version < %(target)s)
"""
# What this very job failed on is left alone: it would fail again.
_NOT_FAILED: LiteralString = """
  AND NOT EXISTS (SELECT 1 FROM unopened_version u WHERE u.tenant = v.tenant
    AND u.key_id = v.key_id AND u.version = v.version AND u.job_id = %(job)s)
"""
_LEFT = "SELECT count(*) " + _LEFT_WHERE
_LEFT_ROWS = "SELECT v.key_id, v.version " + _LEFT_WHERE
_TO_DO = _LEFT + _NOT_FAILED
_BATCH = (
    "SELECT v.key_id, v.version, v.kek_backend, v.wrapped_dek, v.kek_version, v.wrap_mac,"
    " sha256(v.envelope) "
    + _LEFT_WHERE
    + _NOT_FAILED
    + "  AND (v.key_id, v.version) > (%(after_key)s, %(after_version)s)"
    " ORDER BY v.key_id, v.version LIMIT %(limit)s"
)
_ENVELOPES = """
SELECT v.key_id, v.version, k.owner, k.provider, v.envelope
FROM key_version v JOIN provider_key k USING (tenant, key_id)
JOIN unnest(%s::text[], %s::int[]) AS i (key_id, version)
  ON i.key_id = v.key_id AND i.version = v.version
WHERE v.tenant = %s AND v.envelope IS NOT NULL
"""
# Only where the row still is what was read: whoever destroyed, moved or rewrapped it in the
# meantime wins. A row that somebody has locked is left for the next pass, so that this never
# waits with rows in its hands.
_SWAP = """
WITH input AS (
    SELECT * FROM unnest(
        %(keys)b::text[], %(versions)b::int[], %(old)b::bytea[], %(new)b::bytea[],
        %(kek_versions)b::int[], %(macs)b::bytea[], %(envelopes)b::bytea[]
    ) AS i (key_id, version, old, new, kek_version, mac, envelope)
), free AS (
    SELECT v.key_id, v.version, i.new, i.kek_version, i.mac, i.envelope
    FROM key_version v JOIN input i ON v.key_id = i.key_id AND v.version = i.version
    WHERE v.tenant = %(tenant)s AND v.wrapped_dek = i.old
    FOR UPDATE OF v SKIP LOCKED
)
UPDATE key_version v
SET wrapped_dek = f.new, kek_version = f.kek_version, kek_backend = %(backend)s,
    wrap_mac = f.mac, envelope = coalesce(f.envelope, v.envelope)
FROM free f WHERE v.tenant = %(tenant)s AND v.key_id = f.key_id AND v.version = f.version
"""
_WRAPS = """
SELECT key_id, version, kek_backend, kek_version, wrapped_dek, wrap_mac, sha256(envelope)
FROM key_version WHERE tenant = %s
"""
# Under no version that there is: the next pass wraps it again.
_DOUBT = """
UPDATE key_version v SET kek_version = 0
FROM unnest(%s::text[], %s::int[]) AS i (key_id, version)
WHERE v.tenant = %s AND v.key_id = i.key_id AND v.version = i.version
  AND v.wrapped_dek IS NOT NULL
"""
# A count that somebody else made as high as it goes stays there, and stops nothing.
_PROGRESS = """
UPDATE kek_job SET total = coalesce(total, %(total)s),
    done = least(done, 9223372036854775807 - %(done)s) + %(done)s,
    failed = least(failed, 9223372036854775807 - %(failed)s) + %(failed)s,
    after_key_id = %(after_key)s, after_version = %(after_version)s,
    update_time = clock_timestamp()
WHERE job_id = %(job)s
"""
_AGAIN = """
UPDATE kek_job SET phase = 'REWRAP', after_key_id = '', after_version = 0, passes = passes + 1,
    due_time = now() + interval '1 second', update_time = now()
WHERE job_id = %s
"""
_POSTPONE = """
UPDATE kek_job SET due_time = now() + interval '5 seconds' WHERE job_id = %s AND end_time IS NULL
"""
_UNOPENED = """
INSERT INTO unopened_version (tenant, key_id, version, reason, job_id)
SELECT %s, i.key_id, i.version, i.reason, %s
FROM unnest(%s::text[], %s::int[], %s::text[]) AS i (key_id, version, reason)
ON CONFLICT (tenant, key_id, version) DO UPDATE
SET reason = excluded.reason, update_time = now(),
    job_id = coalesce(excluded.job_id, unopened_version.job_id)
"""
_OPENED = """
DELETE FROM unopened_version u USING key_version v
WHERE u.tenant = %(tenant)s AND v.tenant = u.tenant AND v.key_id = u.key_id
  AND v.version = u.version AND v.kek_backend = %(backend)s AND v.kek_version >= %(target)s
  AND u.job_id IS NOT NULL
"""
_FAILURES = """
SELECT key_id, version, reason FROM unopened_version WHERE job_id = %s
ORDER BY key_id, version LIMIT %s
"""
_UNDECRYPTABLE = """
SELECT count(DISTINCT (u.tenant, u.key_id)) FROM unopened_version u
JOIN key_version v USING (tenant, key_id, version) WHERE v.wrapped_dek IS NOT NULL
"""

_MINIMUM = "SELECT version FROM kek_minimum WHERE tenant = %s AND backend = %s"
_RAISE = """
INSERT INTO kek_minimum (tenant, backend, version) VALUES (%s, %s, %s)
ON CONFLICT (tenant, backend) DO UPDATE SET version = greatest(kek_minimum.version,
    excluded.version)
"""
# A job that was begun when another backend was the primary one: it may be destroying a KEK that
# is the tenant's again.
_ELSEWHERE: LiteralString = """
SELECT FROM kek_job WHERE tenant = %(tenant)s AND end_time IS NULL
  AND target_backend NOT IN ('', %(backend)s)
"""
_LOWER_ONE = f"""
DELETE FROM kek_minimum WHERE tenant = %(tenant)s AND backend = %(backend)s
  AND version > %(newest)s AND NOT EXISTS ({_ELSEWHERE})
"""  # noqa: S608
_TENANT_KEKS = """
SELECT substr(c.chain, 9), v.kek_backend, min(v.kek_version), max(v.kek_version), count(v.version)
FROM (SELECT chain FROM chain WHERE chain <> 'system' AND chain > %s ORDER BY chain LIMIT %s) c
LEFT JOIN key_version v ON v.tenant = substr(c.chain, 9) AND v.wrapped_dek IS NOT NULL
GROUP BY c.chain, v.kek_backend ORDER BY c.chain, v.kek_backend
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job, as stored."""

    job_id: str
    tenant: str
    caller: str
    rotate: bool
    rewrap: bool
    trim: bool
    phase: Phase
    target_backend: str
    target_version: int
    total: int | None
    done: int
    failed: int
    after_key_id: str
    after_version: int
    passes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Order:
    """What a job is to do: rotate first, wrap again, trim what is old at the end."""

    rotate: bool
    rewrap: bool
    trim: bool


@dataclass(frozen=True, slots=True)
class Swap:
    """A row's wrapped data key as it was read, and what it becomes; with a new envelope where
    the row moves to another backend."""

    key_id: str
    version: int
    old: bytes
    new: bytes
    kek_version: int
    mac: bytes
    envelope: bytes | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that can't be wrapped again, and why: an ErrorReason name."""

    key_id: str
    version: int
    reason: str


async def insert(
    connection: Connection,
    job_id: str,
    tenant: str,
    request_id: str,
    caller: str,
    order: Order,
    wait: datetime.timedelta,
) -> None:
    """Queue a job; nothing where that request, or a waiting sweep of the tenant, is there."""
    await connection.execute(
        _INSERT,
        (job_id, tenant, request_id, caller, order.rotate, order.rewrap, order.trim, wait),
    )


async def hasten(connection: Connection, tenant: str, wait: datetime.timedelta) -> None:
    """Let a tenant's waiting sweep be one, and wait no longer than this, whatever its row says."""
    await connection.execute(_HASTEN, (wait, tenant))


async def get(database: Database, job_id: str) -> Job | None:
    """Return a job."""
    row = await database.one(_GET, (job_id,))
    return Job(*row) if row else None


async def of_request(database: Database, tenant: str, request_id: str) -> Job | None:
    """Return the job of a request."""
    row = await database.one(_OF_REQUEST, (tenant, request_id))
    return Job(*row) if row else None


async def claim(database: Database, phases: Sequence[Phase]) -> Job | None:
    """Take a job that is due in one of some phases, for a while."""
    row = await database.one(_CLAIM, (CLAIM, list(phases)))
    return Job(*row) if row else None


async def claim_one(database: Database, job_id: str) -> Job | None:
    """Take one job that waits to be started, for a while."""
    row = await database.one(_CLAIM_ONE, (CLAIM, job_id))
    return Job(*row) if row else None


async def lock(connection: Connection, job_id: str, phase: Phase) -> Job | None:
    """Lock a job that is still in that phase. The tenant's chain is locked before."""
    row = await (await connection.execute(_LOCK, (job_id, phase))).fetchone()
    return Job(*row) if row else None


async def next_rewrap(connection: Connection) -> Job | None:
    """Lock the job whose next batch is due, for this transaction; none that is locked."""
    row = await (await connection.execute(_NEXT_REWRAP)).fetchone()
    return Job(*row) if row else None


async def started(
    connection: Connection, job: Job, phase: Phase, backend: str, target: int
) -> None:
    """Store what a job aims at."""
    await connection.execute(_STARTED, (phase, backend, target, phase in ENDED, job.job_id))


async def move(
    connection: Connection,
    job: Job,
    phase: Phase,
    reason: str = "",
    wait: datetime.timedelta = datetime.timedelta(),
) -> None:
    """Store a job's next phase, due after a wait."""
    await connection.execute(_MOVE, (phase, reason, wait, phase in ENDED, job.job_id))


async def cancel(connection: Connection, tenant: str) -> None:
    """End the jobs of a tenant that is shredded. Its minimum stays until it has a KEK again: a data
    key that was made before must not be stored."""
    await connection.execute(_CANCEL, (tenant,))


async def forget_ended(database: Database) -> None:
    """Delete jobs that ended a month ago."""
    async with database.transaction() as connection:
        await connection.execute(_FORGET_ENDED)


async def open_count(database: Database) -> int:
    """Return how many jobs have not ended."""
    row = await database.one(_OPEN)
    return int(row[0]) if row else 0


async def left(connection: Connection, job: Job, *, to_do: bool) -> int:
    """Return how many rows are not at the job's target; `to_do`: without those that failed."""
    cursor = await connection.execute(_TO_DO if to_do else _LEFT, _parameters(job))
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def left_rows(connection: Connection, job: Job) -> list[Row]:
    """Return (key id, version) of the rows that are not at the job's target."""
    return await (await connection.execute(_LEFT_ROWS, _parameters(job))).fetchall()


async def batch(connection: Connection, job: Job, limit: int) -> list[Row]:
    """Return (key id, version, backend, wrapped data key, KEK version, MAC) of the next rows."""
    parameters = {
        **_parameters(job),
        "after_key": job.after_key_id,
        "after_version": job.after_version,
        "limit": limit,
    }
    return await (await connection.execute(_BATCH, parameters, binary=True)).fetchall()


async def envelopes(
    connection: Connection, tenant: str, keys: Sequence[str], versions: Sequence[int]
) -> list[Row]:
    """Return (key id, version, owner, provider, envelope) of some versions."""
    cursor = await connection.execute(_ENVELOPES, (list(keys), list(versions), tenant))
    return await cursor.fetchall()


async def swap(connection: Connection, job: Job, swaps: Sequence[Swap]) -> int:
    """Store new wrapped data keys where the old ones still are; return how many were."""
    cursor = await connection.execute(
        _SWAP,
        {
            "tenant": job.tenant,
            "backend": job.target_backend,
            "keys": [one.key_id for one in swaps],
            "versions": [one.version for one in swaps],
            "old": [one.old for one in swaps],
            "new": [one.new for one in swaps],
            "kek_versions": [one.kek_version for one in swaps],
            "macs": [one.mac for one in swaps],
            "envelopes": [one.envelope for one in swaps],
        },
    )
    return cursor.rowcount


async def wraps(connection: Connection, tenant: str) -> list[Row]:
    """Return (key id, version, backend, KEK version, wrapped data key, MAC) of every version."""
    return await (await connection.execute(_WRAPS, (tenant,), binary=True)).fetchall()


async def doubt(connection: Connection, tenant: str, versions: Collection[tuple[str, int]]) -> int:
    """Have versions wrapped again, whatever their rows say; return how many can be."""
    keys, numbers = [one[0] for one in versions], [one[1] for one in versions]
    return (await connection.execute(_DOUBT, (keys, numbers, tenant))).rowcount


async def progress(
    connection: Connection, job: Job, total: int, done: int, failed: int, last: Row
) -> None:
    """Count a batch, and remember where the pass stands."""
    await connection.execute(
        _PROGRESS,
        {
            "total": total,
            "done": done,
            "failed": failed,
            "after_key": last[0],
            "after_version": last[1],
            "job": job.job_id,
        },
    )


async def next_pass(connection: Connection, job: Job) -> None:
    """Begin the rows anew, a second from now."""
    await connection.execute(_AGAIN, (job.job_id,))


async def postpone(database: Database, job: Job) -> None:
    """Let a job wait for what is in its way."""
    async with database.transaction() as connection:
        await connection.execute(_POSTPONE, (job.job_id,))


async def unopened(
    connection: Connection, tenant: str, failures: Sequence[Failure], job_id: str | None
) -> None:
    """Note versions whose data key does not open."""
    keys, versions, reasons = (
        [one.key_id for one in failures],
        [one.version for one in failures],
        [one.reason for one in failures],
    )
    await connection.execute(_UNOPENED, (tenant, job_id, keys, versions, reasons))


async def opened(connection: Connection, job: Job) -> None:
    """Forget what an earlier job could not wrap again and this one could."""
    await connection.execute(_OPENED, _parameters(job))


async def failures(database: Database, job_id: str, limit: int) -> list[Failure]:
    """Return versions that a job failed on."""
    return [Failure(*row) for row in await database.all(_FAILURES, (job_id, limit))]


async def undecryptable(database: Database) -> int:
    """Return how many keys have a version that was found not to open."""
    row = await database.one(_UNDECRYPTABLE)
    return int(row[0]) if row else 0


async def minimum(connection: Connection, tenant: str, backend: str) -> int:
    """Return the oldest version of a tenant's KEK under which something may be stored."""
    row = await (await connection.execute(_MINIMUM, (tenant, backend))).fetchone()
    return int(row[0]) if row else 0


async def raise_minimum(connection: Connection, tenant: str, backend: str, version: int) -> None:
    """Raise it. The tenant's chain is locked: who stores a version looks under that lock."""
    await connection.execute(_RAISE, (tenant, backend, version))


async def lower_minimum(connection: Connection, tenant: str, backend: str, newest: int) -> None:
    """Forget it where it is above the newest version: the KEK was made anew since."""
    await connection.execute(_LOWER_ONE, {"tenant": tenant, "backend": backend, "newest": newest})


async def elsewhere(database: Database, tenant: str, backend: str) -> bool:
    """Say whether a job of a tenant is not over that aims at another backend."""
    return await database.one(_ELSEWHERE, {"tenant": tenant, "backend": backend}) is not None


async def tenant_keks(database: Database, after: str, limit: int) -> list[Row]:
    """Return (tenant, backend, oldest version, newest version, rows) of the next tenants."""
    return await database.all(_TENANT_KEKS, (f"tenants/{after}" if after else "", limit))


def _parameters(job: Job) -> dict[str, object]:
    return {
        "tenant": job.tenant,
        "backend": job.target_backend,
        "target": job.target_version,
        "job": job.job_id,
    }
