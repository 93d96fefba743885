"""SQL of attempts: claim, calls, results, end.

Each write of a worker names its attempt and fence and matches a RUNNING row, or it changes
nothing and raises `Fenced`: a worker that slept past its turn can't overwrite its successor.
A transaction that decides about a tenant's places locks the tenant's row first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from byokeep import ids
from byokeep.orchestrator.v1.review_pb2 import Finding
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from services.orchestrator.database import Database, raw
from services.orchestrator.domain import PLANS
from services.orchestrator.queue import Queue


class Fenced(Exception):  # noqa: N818 - a state, not a fault
    """The attempt is not ours any more: it was cancelled, or another took over."""


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed attempt, with all that it takes to run it."""

    attempt_id: str
    kind: str
    tenant: str
    review_id: str
    key_id: str
    key_version: int
    fence: int
    tries: int
    provider: str
    model: str
    owner: str
    actor: str
    input: bytes
    done_chunks: Sequence[str]
    calls_left: int
    validations: int
    validation_hours: float
    destroy_previous: bool


@dataclass(frozen=True, slots=True)
class Trail:
    """What the runner reports of the child that held the key."""

    lease_id: str = ""
    process_id: int = 0
    open_time: datetime | None = None
    close_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Successor:
    """The attempt that follows a failed one."""

    delay_seconds: float
    key_version: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, and what follows for its review."""

    attempt_state: str
    review_state: str
    failure: str = ""
    failure_message: str = ""
    ambiguous: bool = False
    successor: Successor | None = None


@dataclass(frozen=True, slots=True)
class ValidationEnding:
    """How a validation attempt ended; `action` is what keyvault is to be told."""

    attempt_state: str
    verdict: str
    action: str
    failure: str = ""
    models: Sequence[str] = ()
    successor: Successor | None = None


@dataclass(frozen=True, slots=True)
class Stale:
    """A RUNNING attempt whose worker gave no sign of life."""

    attempt_id: str
    kind: str
    tenant: str
    review_id: str
    key_id: str
    key_version: int
    fence: int
    tries: int
    model: str
    unfinished_call: bool
    calls_left: int


_CLAIM: Final = text("""
    WITH a AS (
        UPDATE attempt SET state = 'RUNNING', start_time = now(), heartbeat_time = now()
        WHERE id = :id AND state = 'QUEUED' AND admitted
            AND EXISTS (
                SELECT FROM tenant WHERE tenant.id = attempt.tenant AND tenant.state = 'ACTIVE')
        RETURNING *),
    r AS (
        UPDATE review SET state = 'RUNNING', start_time = now(), version = version + 1
        FROM a WHERE review.id = a.review_id
        RETURNING review.*, pg_notify('byokeep_review', review.id))
    SELECT a.id AS attempt_id, a.kind, a.tenant, coalesce(a.review_id, '') AS review_id,
        a.key_id, a.key_version, a.fence, a.tries,
        coalesce(v.provider, split_part(r.model, '/', 1)) AS provider,
        coalesce(substr(r.model, strpos(r.model, '/') + 1), '') AS model,
        coalesce(v.owner, r.owner) AS owner, coalesce(v.actor, r.actor) AS actor,
        coalesce(c.input, '') AS input,
        ARRAY(SELECT chunk_id FROM chunk_done WHERE review_id = r.id) AS done_chunks,
        coalesce(r.max_calls - r.calls_started, 0) AS calls_left,
        coalesce(v.attempts, 0) AS validations,
        CAST(coalesce(extract(epoch FROM now() - v.create_time) / 3600, 0) AS float)
            AS validation_hours,
        coalesce(v.destroy_previous, false) AS destroy_previous
    FROM a LEFT JOIN r ON true
        LEFT JOIN review_content c ON c.review_id = r.id
        LEFT JOIN key_validation v
            ON a.kind = 'VALIDATION' AND v.key_id = a.key_id AND v.version = a.key_version
    """)

_CALL_STARTED: Final = text("""
    WITH a AS (
        UPDATE attempt SET calls_started = calls_started + 1,
            lease_id = :lease_id, process_id = :process_id
        WHERE id = :id AND fence = :fence AND state = 'RUNNING'
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = :id AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    c AS (
        INSERT INTO provider_call (attempt_id, call_number, chunk_id)
        SELECT :id, :call_number, :chunk_id FROM a),
    r AS (
        UPDATE review SET calls_started = calls_started + 1, chunks_total = :chunks_total,
            version = version + 1
        FROM a WHERE review.id = a.review_id)
    SELECT 1 FROM a""")

_CHUNK_DONE: Final = text("""
    WITH a AS (
        SELECT review_id FROM attempt
        WHERE id = :id AND fence = :fence AND state = 'RUNNING' FOR UPDATE),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = :id AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    d AS (
        INSERT INTO chunk_done (review_id, chunk_id, attempt_id)
        SELECT review_id, :chunk_id, :id FROM a
        ON CONFLICT DO NOTHING RETURNING review_id, chunk_id),
    n AS (
        INSERT INTO finding (review_id, chunk_id, ordinal, path, start_line, end_line,
            severity, category, title, message, suggestion)
        SELECT d.review_id, d.chunk_id, u.ordinal, u.path, u.start_line, u.end_line,
            u.severity, u.category, u.title, u.message, u.suggestion
        FROM d, unnest(
            CAST(:paths AS text[]), CAST(:start_lines AS int[]), CAST(:end_lines AS int[]),
            CAST(:severities AS smallint[]), CAST(:categories AS smallint[]),
            CAST(:titles AS text[]), CAST(:messages AS text[]), CAST(:suggestions AS text[])
        ) WITH ORDINALITY AS u(path, start_line, end_line, severity, category, title,
            message, suggestion, ordinal)),
    r AS (
        UPDATE review SET chunks_done = chunks_done + 1, version = version + 1,
            finding_count = finding_count + cardinality(CAST(:paths AS text[])),
            dropped_findings = dropped_findings + :dropped
        FROM d WHERE review.id = d.review_id
        RETURNING review.id, chunks_done < chunks_total AS more)
    -- After the last chunk the end of the attempt follows at once, and tells of both.
    SELECT (SELECT pg_notify('byokeep_review', r.id) FROM r WHERE more) FROM a""")

_END_ATTEMPT: Final = """
    WITH a AS (
        UPDATE attempt SET state = :attempt_state, admitted = false, failure = :failure,
            end_time = now(),
            lease_id = coalesce(nullif(:lease_id, ''), lease_id),
            process_id = greatest(:process_id, process_id),
            open_time = coalesce(CAST(:open_time AS timestamptz), open_time),
            close_time = coalesce(CAST(:close_time AS timestamptz), close_time)
        WHERE id = :id AND fence = :fence AND state = 'RUNNING'
        RETURNING *),
    c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = :ambiguous
        WHERE attempt_id = :id AND finish_time IS NULL AND EXISTS (SELECT FROM a)
        RETURNING ambiguous),"""

_END_REVIEW: Final = text(
    _END_ATTEMPT
    + """
    r AS (
        UPDATE review SET state = :review_state, failure = :review_failure,
            failure_message = :failure_message, version = version + 1,
            end_time = CASE WHEN :review_state = 'QUEUED' THEN NULL ELSE now() END,
            ambiguous_calls = ambiguous_calls + (SELECT count(*) FROM c WHERE ambiguous),
            fence = review.fence + :successors
        FROM a WHERE review.id = a.review_id
        RETURNING review.id, review.fence),
    x AS (
        DELETE FROM review_content USING r
        WHERE review_content.review_id = r.id AND :review_state = 'COMPLETED'),
    n AS (
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, fence, tries,
            admitted, due_time)
        SELECT :next_id, a.kind, a.tenant, r.id, a.key_id, :next_version, r.fence,
            a.tries + 1, true, now() + make_interval(secs => :delay)
        FROM a, r WHERE :successors = 1)
    SELECT pg_notify('byokeep_review', r.id), EXISTS (
        SELECT FROM attempt p
        WHERE p.tenant = :tenant AND p.state = 'QUEUED' AND NOT p.admitted) AS parked
    FROM r"""
)

_END_VALIDATION: Final = text(
    _END_ATTEMPT
    + """
    v AS (
        UPDATE key_validation SET verdict = :verdict, models = CAST(:models AS text[]),
            attempts = attempts + 1, check_time = now(), action = :action,
            retry_time = CASE WHEN :successors = 1
                THEN now() + make_interval(secs => :delay) END,
            fence = key_validation.fence + :successors
        FROM a WHERE key_validation.key_id = a.key_id AND version = a.key_version
        RETURNING key_validation.key_id, key_validation.fence),
    n AS (
        INSERT INTO attempt (id, kind, tenant, key_id, key_version, fence, tries, admitted,
            due_time)
        SELECT :next_id, a.kind, a.tenant, a.key_id, :next_version, v.fence, a.tries + 1, true,
            now() + make_interval(secs => :delay)
        FROM a, v WHERE :successors = 1)
    SELECT pg_notify('byokeep_key', v.key_id) FROM v"""
)

LOCK_TENANT: Final = text("SELECT plan, state FROM tenant WHERE id = :tenant FOR NO KEY UPDATE")
_ADMIT: Final = text("""
    UPDATE attempt SET admitted = true, due_time = now()
    WHERE id IN (
        SELECT id FROM attempt
        WHERE tenant = :tenant AND state = 'QUEUED' AND NOT admitted
        ORDER BY id
        LIMIT greatest(0, :places - (
            SELECT count(*) FROM attempt
            WHERE tenant = :tenant AND kind = 'REVIEW' AND admitted
                AND state IN ('QUEUED', 'RUNNING'))))
    RETURNING id""")

_TRAIL_OF_CANCELLED: Final = text("""
    UPDATE attempt SET lease_id = coalesce(nullif(:lease_id, ''), lease_id),
        process_id = greatest(:process_id, process_id),
        open_time = coalesce(CAST(:open_time AS timestamptz), open_time),
        close_time = coalesce(CAST(:close_time AS timestamptz), close_time)
    WHERE id = :id AND fence = :fence AND state = 'CANCELLED'""")

_HEARTBEAT: Final = text("""
    UPDATE attempt SET heartbeat_time = now()
    WHERE id = ANY(CAST(:ids AS text[])) AND state = 'RUNNING' RETURNING id""")

_CANCEL_ATTEMPTS: Final = text("""
    WITH before AS (
        SELECT id, state FROM attempt
        WHERE review_id = :review_id AND state IN ('QUEUED', 'RUNNING') FOR UPDATE)
    UPDATE attempt SET state = 'CANCELLED', admitted = false, end_time = now()
    FROM before WHERE attempt.id = before.id
    RETURNING attempt.id, before.state = 'RUNNING' AS ran, pg_notify('byokeep_cancel', attempt.id)
    """)
_CANCEL_REVIEW: Final = text("""
    WITH c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = true
        WHERE finish_time IS NULL
            AND attempt_id IN (SELECT id FROM attempt WHERE review_id = :review_id)
        RETURNING 1),
    x AS (DELETE FROM review_content WHERE review_id = :review_id)
    UPDATE review SET state = 'CANCELLED', end_time = now(), version = version + 1,
        ambiguous_calls = ambiguous_calls + (SELECT count(*) FROM c)
    WHERE id = :review_id AND state IN ('QUEUED', 'RUNNING')
    RETURNING pg_notify('byokeep_review', id)""")

_STALE_IDS: Final = text("""
    SELECT id, tenant FROM attempt
    WHERE state = 'RUNNING' AND heartbeat_time < now() - make_interval(secs => :seconds)
    ORDER BY heartbeat_time LIMIT 100""")
_STALE: Final = text("""
    SELECT a.id AS attempt_id, a.kind, a.tenant, coalesce(a.review_id, '') AS review_id,
        a.key_id, a.key_version, a.fence, a.tries, coalesce(r.model, '') AS model,
        EXISTS (
            SELECT FROM provider_call c WHERE c.attempt_id = a.id AND c.finish_time IS NULL
        ) AS unfinished_call,
        coalesce(r.max_calls - r.calls_started, 0) AS calls_left
    FROM attempt a LEFT JOIN review r ON r.id = a.review_id
    WHERE a.id = :id AND a.state = 'RUNNING'
        AND a.heartbeat_time < now() - make_interval(secs => :seconds)
    FOR UPDATE OF a SKIP LOCKED""")

_OVERDUE: Final = text("""
    UPDATE attempt SET due_time = now()
    WHERE id IN (
        SELECT attempt.id FROM attempt JOIN tenant ON tenant.id = attempt.tenant
        WHERE attempt.state = 'QUEUED' AND admitted AND tenant.state = 'ACTIVE'
            AND due_time < now() - make_interval(secs => :seconds)
        ORDER BY attempt.id LIMIT 100 FOR UPDATE OF attempt SKIP LOCKED)
    RETURNING id""")
_PARKED_TENANTS: Final = text(
    "SELECT DISTINCT tenant FROM attempt WHERE state = 'QUEUED' AND NOT admitted"
)
_OPEN_REVIEWS: Final = text(
    "SELECT id FROM review WHERE tenant = :tenant AND state IN ('QUEUED', 'RUNNING')"
)
_CANCEL_VALIDATIONS: Final = text("""
    UPDATE attempt SET state = 'CANCELLED', admitted = false, end_time = now()
    WHERE tenant = :tenant AND kind = 'VALIDATION' AND state IN ('QUEUED', 'RUNNING')
    RETURNING pg_notify('byokeep_cancel', id)""")


class AttemptStore:
    """Attempts and what they write."""

    def __init__(self, database: Database, queue: Queue) -> None:
        """Use a database, and the queue that lives in it."""
        self._database = database
        self._queue = queue

    async def claim(self, attempt_id: str) -> Work | None:
        """Make a queued attempt RUNNING and return it; None if it is not there to be run."""
        async with self._database.statement() as connection:
            row = (await connection.execute(_CLAIM, {"id": attempt_id})).one_or_none()
        return None if row is None else Work(**row._mapping)

    async def call_started(
        self, work: Work, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made, with who makes it. Raises Fenced."""
        await self._guarded(
            _CALL_STARTED,
            {
                "id": work.attempt_id,
                "fence": work.fence,
                "lease_id": trail.lease_id,
                "process_id": trail.process_id,
                "call_number": number,
                "chunk_id": chunk_id,
                "chunks_total": chunks_total,
            },
        )

    async def chunk_done(
        self, work: Work, chunk_id: str, findings: Sequence[Finding], dropped: int
    ) -> None:
        """Store a chunk's findings; nothing if the chunk is done already. Raises Fenced."""
        await self._guarded(
            _CHUNK_DONE,
            {
                "id": work.attempt_id,
                "fence": work.fence,
                "chunk_id": chunk_id,
                "dropped": dropped,
                "paths": [one.path for one in findings],
                "start_lines": [one.start_line for one in findings],
                "end_lines": [one.end_line for one in findings],
                "severities": [int(one.severity) for one in findings],
                "categories": [int(one.category) for one in findings],
                "titles": [one.title for one in findings],
                "messages": [one.message for one in findings],
                "suggestions": [one.suggestion for one in findings],
            },
        )

    async def end_review(self, work: Work | Stale, ending: Ending, trail: Trail) -> None:
        """Store the end of a review's attempt, and queue what follows. Raises Fenced."""
        async with self._database.transaction() as connection:
            plan = await lock_tenant(connection, work.tenant)
            await self._end_review(connection, plan, work, ending, trail)

    async def end_validation(
        self, work: Work | Stale, ending: ValidationEnding, trail: Trail
    ) -> None:
        """Store the end of a validation attempt, and queue what follows. Raises Fenced."""
        async with self._database.transaction() as connection:
            await self._end_validation(connection, work, ending, trail)

    async def trail_of_cancelled(self, work: Work, trail: Trail) -> None:
        """Complete the trail of an attempt that was cancelled while its child lived."""
        parameters = {"id": work.attempt_id, "fence": work.fence, **_trail(trail)}
        async with self._database.statement() as connection:
            await connection.execute(_TRAIL_OF_CANCELLED, parameters)

    async def heartbeat(self, attempt_ids: Sequence[str]) -> set[str]:
        """Say that attempts' workers live; return those that still are ours."""
        async with self._database.statement() as connection:
            found = await connection.execute(_HEARTBEAT, {"ids": list(attempt_ids)})
            return {row.id for row in found}

    async def cancel_review(self, tenant: str, review_id: str) -> bool:
        """Cancel a review of the tenant with its attempts; False if it had ended."""
        async with self._database.transaction() as connection:
            plan = await lock_tenant(connection, tenant)
            attempts = await connection.execute(_CANCEL_ATTEMPTS, {"review_id": review_id})
            attempts.all()
            done = await connection.execute(_CANCEL_REVIEW, {"review_id": review_id})
            cancelled = done.one_or_none() is not None
            await self.admit(connection, tenant, plan)
        return cancelled

    async def cancel_all(self, tenant: str) -> None:
        """Cancel all that is queued or runs for a tenant."""
        async with self._database.statement() as connection:
            reviews = (await connection.execute(_OPEN_REVIEWS, {"tenant": tenant})).all()
            await connection.execute(_CANCEL_VALIDATIONS, {"tenant": tenant})
        for row in reviews:
            await self.cancel_review(tenant, row.id)

    async def admit(self, connection: AsyncConnection, tenant: str, plan: str) -> None:
        """Give a tenant's free places to what waited longest; the tenant's row is locked."""
        places = PLANS[plan].attempts_in_flight
        found = await connection.execute(_ADMIT, {"tenant": tenant, "places": places})
        for row in found.all():
            await self._queue.enqueue(await raw(connection), row.id)

    async def stale(self, seconds: float) -> list[tuple[str, str]]:
        """Return (id, tenant) of attempts whose worker gave no sign of life for so long."""
        async with self._database.statement() as connection:
            found = await connection.execute(_STALE_IDS, {"seconds": seconds})
            return [(row.id, row.tenant) for row in found]

    async def fence_off(
        self,
        attempt_id: str,
        tenant: str,
        seconds: float,
        decide: Any,
    ) -> Stale | None:
        """End a stale attempt as `decide(Stale)` says; None if it is not stale any more."""
        async with self._database.transaction() as connection:
            plan = await lock_tenant(connection, tenant)
            found = await connection.execute(_STALE, {"id": attempt_id, "seconds": seconds})
            row = found.one_or_none()
            if row is None:
                return None
            stale = Stale(**row._mapping)
            ending = decide(stale)
            if isinstance(ending, ValidationEnding):
                await self._end_validation(connection, stale, ending, Trail())
            else:
                await self._end_review(connection, plan, stale, ending, Trail())
            return stale

    async def requeue_overdue(self, seconds: float) -> int:
        """Enqueue attempts again whose job seems lost; return how many."""
        async with self._database.transaction() as connection:
            found = (await connection.execute(_OVERDUE, {"seconds": seconds})).all()
            for row in found:
                await self._queue.enqueue(await raw(connection), row.id)
        return len(found)

    async def admit_parked(self) -> None:
        """Give free places of every tenant to what waits for one."""
        async with self._database.statement() as connection:
            tenants = [row.tenant for row in await connection.execute(_PARKED_TENANTS)]
        for tenant in tenants:
            async with self._database.transaction() as connection:
                await self.admit(connection, tenant, await lock_tenant(connection, tenant))

    async def _end_review(
        self,
        connection: AsyncConnection,
        plan: str,
        work: Work | Stale,
        ending: Ending,
        trail: Trail,
    ) -> None:
        following = _following(ending.successor)
        row = await _one(
            connection,
            _END_REVIEW,
            {
                "id": work.attempt_id,
                "fence": work.fence,
                "tenant": work.tenant,
                "attempt_state": ending.attempt_state,
                "failure": ending.failure,
                "ambiguous": ending.ambiguous,
                "review_state": ending.review_state,
                "review_failure": ending.failure if ending.review_state == "FAILED" else "",
                "failure_message": ending.failure_message,
                **following,
                **_trail(trail),
            },
        )
        await self._follow(connection, ending.successor, following)
        if row.parked:
            await self.admit(connection, work.tenant, plan)

    async def _end_validation(
        self,
        connection: AsyncConnection,
        work: Work | Stale,
        ending: ValidationEnding,
        trail: Trail,
    ) -> None:
        following = _following(ending.successor)
        await _one(
            connection,
            _END_VALIDATION,
            {
                "id": work.attempt_id,
                "fence": work.fence,
                "attempt_state": ending.attempt_state,
                "failure": ending.failure,
                "ambiguous": False,
                "verdict": ending.verdict,
                "models": list(ending.models),
                "action": ending.action,
                **following,
                **_trail(trail),
            },
        )
        await self._follow(connection, ending.successor, following)

    async def _follow(
        self,
        connection: AsyncConnection,
        successor: Successor | None,
        following: Mapping[str, Any],
    ) -> None:
        if successor is not None:
            await self._queue.enqueue(
                await raw(connection), following["next_id"], delay_seconds=successor.delay_seconds
            )

    async def _guarded(self, statement: TextClause, parameters: Mapping[str, Any]) -> None:
        async with self._database.statement() as connection:
            await _one(connection, statement, parameters)


async def lock_tenant(connection: AsyncConnection, tenant: str) -> str:
    """Lock a tenant's places in this transaction; return its plan."""
    row = (await connection.execute(LOCK_TENANT, {"tenant": tenant})).one()
    return str(row.plan)


async def _one(
    connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, Any]
) -> Any:
    row = (await connection.execute(statement, parameters)).one_or_none()
    if row is None:
        raise Fenced
    return row


def _trail(trail: Trail) -> dict[str, Any]:
    return {
        "lease_id": trail.lease_id,
        "process_id": trail.process_id,
        "open_time": trail.open_time,
        "close_time": trail.close_time,
    }


def _following(successor: Successor | None) -> dict[str, Any]:
    return {
        "successors": 0 if successor is None else 1,
        "next_id": ids.new_id("att"),
        "next_version": 0 if successor is None else successor.key_version,
        "delay": 0.0 if successor is None else successor.delay_seconds,
    }
