"""SQL of attempts that run: calls, chunks, beats. Picking and ending have modules of their own.

Each write of a worker names its attempt, fence and turn, and matches a RUNNING row, or it changes
nothing and raises `Fenced`: a worker that slept past its turn can't overwrite its successor. Each
is one round trip and one transaction; an attempt's row is locked before its review's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Final, LiteralString, TypeAlias

from byokeep.orchestrator.v1.review_pb2 import Finding

from services.common.errors import internal
from services.orchestrator.custody import content
from services.orchestrator.policy.states import AttemptKind
from services.orchestrator.store.database import Database, Row, Session


class Fenced(Exception):
    """The attempt is not ours any more: it was cancelled, or another took over."""


class DailyLimit(Exception):
    """The tenant's ceiling of provider calls in 24 hours is reached: the call may not be made."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the queue, the runner and keyvault know of any attempt.

    `owner` is whose key it runs on. `turn` above 0: it was taken over in the middle of a call.
    """

    attempt_id: str
    tenant: str
    key_id: str
    key_version: int
    fence: int
    tries: int
    turn: int
    runner_id: str
    provider: str
    owner: str
    actor: str


@dataclass(frozen=True, slots=True)
class ReviewAttempt(Attempt):
    """An attempt of a review, after `calls_made` calls of its own.

    `input` is sealed as it comes from the table; `content_key` is there once it is opened.
    """

    kind: ClassVar = AttemptKind.REVIEW
    review_id: str
    wait_reason: str
    waited_seconds: float
    calls_made: int
    chunks_total: int
    model: str
    plan_model: str
    fallback_models: Sequence[str]
    input: bytes
    done_chunks: Sequence[str]
    calls_left: int
    trace_parent: str
    retry_ambiguous: bool
    content_key: content.ContentKey | None = None


@dataclass(frozen=True, slots=True)
class KeyAttempt(Attempt):
    """A look at a version of a key: a VALIDATION of one that is staged, a CHECK of one that serves.

    `reviews_wait`: of a CHECK, whether reviews wait for what it says.
    """

    kind: AttemptKind
    validations: int
    validation_hours: float
    destroy_previous: bool
    reviews_wait: bool


AnyAttempt: TypeAlias = ReviewAttempt | KeyAttempt


@dataclass(frozen=True, slots=True)
class Trail:
    """What the runner reports of the child that held the key."""

    runner_id: str = ""
    lease_id: str = ""
    process_id: int = 0
    prompt_version: str = ""
    open_time: datetime | None = None
    close_time: datetime | None = None


# A review's call is counted before it is stored, and not at all above the tenant's ceiling: the
# row of the hour orders all who count. The hours before it don't change any more.
_CALL_STARTED: Final = """
    WITH due AS (
        SELECT attempt.kind, tenant.id AS tenant, tenant.max_calls_per_day AS ceiling,
            (SELECT coalesce(sum(events), 0) FROM rate_bucket
             WHERE scope = 'calls:' || tenant.id AND hour > now() - interval '24 hours'
                AND hour < date_trunc('hour', now())) AS earlier
        FROM attempt JOIN tenant ON tenant.id = attempt.tenant
        WHERE attempt.id = %(id)s AND fence = %(fence)s AND turn = %(turn)s
            AND attempt.state = 'RUNNING'
        FOR UPDATE OF attempt),
    day AS (
        INSERT INTO rate_bucket (scope, hour, events)
        SELECT 'calls:' || tenant, date_trunc('hour', now()), 1 FROM due
        WHERE kind = 'REVIEW' AND (ceiling = 0 OR earlier < ceiling)
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1
            WHERE (SELECT ceiling = 0 OR earlier + rate_bucket.events < ceiling FROM due)
        RETURNING 1),
    a AS (
        UPDATE attempt SET calls_started = calls_started + 1,
            runner_id = coalesce(nullif(%(runner_id)s, ''), runner_id),
            lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
            process_id = greatest(%(process_id)s, process_id),
            prompt_version = %(prompt_version)s
        FROM due
        WHERE attempt.id = %(id)s AND (due.kind <> 'REVIEW' OR EXISTS (SELECT FROM day))
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)),
    c AS (
        INSERT INTO provider_call (attempt_id, call_number, chunk_id)
        SELECT %(id)s, %(call_number)s, %(chunk_id)s FROM a),
    r AS (
        UPDATE review SET calls_started = calls_started + 1, chunks_total = %(chunks_total)s,
            version = version + 1
        FROM a WHERE review.id = a.review_id)
    SELECT EXISTS (SELECT FROM a) AS stored FROM due"""

# The beat makes a take-over that waited for this row look at it again.
_ANSWERED: Final = """
    WITH a AS (
        UPDATE attempt SET heartbeat_time = now(), answer_bytes = 0, stalled_since = NULL
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        RETURNING review_id),
    f AS (
        UPDATE provider_call SET finish_time = now()
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)),"""
CHUNK_DONE: Final = (
    _ANSWERED  # noqa: S608 - constants
    + """
    d AS (
        INSERT INTO chunk_done (review_id, chunk_id, attempt_id, findings, position)
        SELECT review_id, %(chunk_id)s, %(id)s, CAST(%(findings)s AS bytea), chunks_done + 1
        FROM a JOIN review ON review.id = a.review_id
        ON CONFLICT DO NOTHING RETURNING review_id),
    r AS (
        UPDATE review SET chunks_done = chunks_done + 1, version = version + 1,
            finding_count = finding_count + %(finding_count)s,
            dropped_findings = dropped_findings + %(dropped)s
        FROM d WHERE review.id = d.review_id
        RETURNING review.id, chunks_done < chunks_total AS more)
    -- After the last chunk the end of the attempt follows at once, and tells of both.
    SELECT (SELECT pg_notify('byokeep_review', r.id) FROM r WHERE more) FROM a"""
)
# What takes the place of a chunk that the provider found too long.
_CHUNK_SPLIT: Final = (
    _ANSWERED  # noqa: S608 - constants
    + """
    r AS (
        UPDATE review SET chunks_total = %(chunks_total)s, version = version + 1
        FROM a WHERE review.id = a.review_id
        RETURNING pg_notify('byokeep_review', id))
    SELECT (SELECT count(*) FROM r) FROM a"""
)

_TRAIL_OF_CANCELLED: Final = """
    UPDATE attempt SET lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
        process_id = greatest(%(process_id)s, process_id),
        open_time = coalesce(CAST(%(open_time)s AS timestamptz), open_time),
        close_time = coalesce(CAST(%(close_time)s AS timestamptz), close_time)
    WHERE id = %(id)s AND fence = %(fence)s AND state = 'CANCELLED'"""

_TAKEN_OVER: Final = """
    SELECT 1 FROM attempt
    WHERE id = %(id)s AND fence = %(fence)s AND turn > %(turn)s AND state = 'RUNNING'"""

_HEARTBEAT: Final = """
    UPDATE attempt SET heartbeat_time = now(), answer_bytes = told.bytes
    FROM unnest(CAST(%(ids)s AS text[]), CAST(%(answer_bytes)s AS bigint[])) AS told (id, bytes)
    WHERE attempt.id = told.id AND state = 'RUNNING' RETURNING attempt.id"""


class AttemptStore:
    """What an attempt writes while it runs."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def taken_over(self, attempt: Attempt) -> bool:
        """Say whether another worker goes on with an attempt that was this one's."""
        async with self._database.statement() as session:
            return await session.one(_TAKEN_OVER, held(attempt)) is not None

    async def call_started(
        self, attempt: Attempt, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made, with who makes it.

        Raises Fenced, DailyLimit.
        """
        row = await self._guarded(
            _CALL_STARTED,
            {
                **held(attempt),
                "runner_id": trail.runner_id,
                "lease_id": trail.lease_id,
                "process_id": trail.process_id,
                "prompt_version": trail.prompt_version,
                "call_number": number,
                "chunk_id": chunk_id,
                "chunks_total": chunks_total,
            },
        )
        if not row.stored:
            raise DailyLimit

    async def chunk_done(
        self, attempt: ReviewAttempt, chunk_id: str, findings: Sequence[Finding], dropped: int
    ) -> None:
        """Store a chunk's findings; nothing if the chunk is done already. Raises Fenced."""
        await self._guarded(
            CHUNK_DONE,
            {
                **held(attempt),
                "chunk_id": chunk_id,
                "dropped": dropped,
                "finding_count": len(findings),
                "findings": _sealed(attempt, chunk_id, findings) if findings else None,
            },
        )

    async def chunk_split(self, attempt: ReviewAttempt, chunks_total: int) -> None:
        """Store that a chunk became several, and that its call is answered. Raises Fenced."""
        await self._guarded(_CHUNK_SPLIT, {**held(attempt), "chunks_total": chunks_total})

    async def trail_of_cancelled(self, attempt: Attempt, trail: Trail) -> None:
        """Complete the trail of an attempt that was cancelled while its child lived."""
        parameters = {**held(attempt), **trailed(trail)}
        async with self._database.statement() as session:
            await session.run(_TRAIL_OF_CANCELLED, parameters)

    async def heartbeat(self, answer_bytes: Mapping[str, int]) -> set[str]:
        """Say that attempts' workers live, and how many bytes of an open call's answer each has;
        return those that still are ours."""
        parameters = {"ids": list(answer_bytes), "answer_bytes": list(answer_bytes.values())}
        async with self._database.statement() as session:
            found = await session.all(_HEARTBEAT, parameters)
        return {row.id for row in found}

    async def _guarded(self, statement: LiteralString, parameters: Mapping[str, Any]) -> Row:
        async with self._database.statement() as session:
            return await guarded(session, statement, parameters)


async def guarded(session: Session, statement: LiteralString, parameters: Mapping[str, Any]) -> Row:
    """Run a statement that returns a row where the attempt still is its worker's. Raises Fenced."""
    row = await session.one(statement, parameters)
    if row is None:
        raise Fenced
    return row


def held(attempt: Attempt) -> dict[str, Any]:
    """Return what a worker's write must match."""
    return {"id": attempt.attempt_id, "fence": attempt.fence, "turn": attempt.turn}


def trailed(trail: Trail) -> dict[str, Any]:
    """Return what the end of an attempt stores of its child."""
    return {
        "runner_id": trail.runner_id,
        "lease_id": trail.lease_id,
        "process_id": trail.process_id,
        "open_time": trail.open_time,
        "close_time": trail.close_time,
    }


def _sealed(attempt: ReviewAttempt, chunk_id: str, findings: Sequence[Finding]) -> bytes:
    if attempt.content_key is None:
        raise internal()
    return content.seal_findings(attempt.content_key, attempt.review_id, chunk_id, findings)
