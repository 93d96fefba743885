"""SQL of reviews: submit, read, retry, retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, LiteralString

import grpc
from byokeep import ids
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2

from services.common.errors import ByokeepError
from services.orchestrator.policy.refusals import not_active
from services.orchestrator.store import requests, sql, sql_waits
from services.orchestrator.store.attempts import cancel
from services.orchestrator.store.database import Database, Row, Session

SUBMIT: Final = "SubmitReview"
_FULL_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class ReviewRow:
    """A review; its content and findings stand elsewhere.

    `wait_reason` is empty where it does not wait, or for its turn alone; `wait_until` is None where
    an event ends the wait; `wait_stalled` is since when it waits for this reason and others.
    """

    id: str
    tenant: str
    state: str
    repository: str
    pull_request: int
    head_commit: str
    model: str
    chosen_model: str
    model_fallback: str
    key_id: str
    named_key: bool
    key_owner: str
    owner: str
    failure: str
    failure_message: str
    superseded_by: str
    calls_started: int
    ambiguous_calls: int
    chunks_done: int
    chunks_total: int
    finding_count: int
    dropped_findings: int
    unread_count: int
    skipped_count: int
    attempts: int
    version: int
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    used_version: int = 0
    used_hint: str = ""
    answer_bytes: int = 0
    wait_reason: str = ""
    wait_cause: str = ""
    wait_since: datetime | None = None
    wait_stalled: datetime | None = None
    wait_until: datetime | None = None
    progress_calls: int | None = None
    progress_place: int | None = None
    prompt_version: str = ""


@dataclass(frozen=True, slots=True)
class ReviewFilter:
    """Some of a tenant's reviews: empty fields say nothing, and without `of_users` those that run
    on keys of users are left out."""

    tenant: str
    of_users: bool
    states: Sequence[str] = ()
    failures: Sequence[str] = ()
    repository: str = ""
    pull_request: int = 0
    owner: str = ""
    submitted_after: datetime | None = None
    submitted_before: datetime | None = None


_NAMES: Final = tuple(ReviewRow.__dataclass_fields__)
_JOINED: Final = ("used_", "wait_", "answer_", "progress_", "prompt_")
_OWN: Final = tuple(name for name in _NAMES if not name.startswith(_JOINED))
# The version of the key that a review's newest attempt runs on, or ran.
_USED: Final = """
    LEFT JOIN LATERAL (
        SELECT attempt.key_version, (
            SELECT hint FROM key_validation known
            WHERE known.tenant = attempt.tenant AND known.key_id = attempt.key_id
                AND known.version = attempt.key_version) AS hint
        FROM attempt WHERE attempt.review_id = review.id ORDER BY number DESC LIMIT 1) used ON true
"""
_USED_COLUMNS: Final = """
    coalesce(used.key_version, 0) AS used_version, coalesce(used.hint, '') AS used_hint,"""
_WAIT: Final = """coalesce(wait.reason, '') AS wait_reason,
    coalesce(wait.cause, '') AS wait_cause, wait.since AS wait_since,
    wait.stalled AS wait_stalled, nullif(wait.until, 'infinity') AS wait_until"""
_SELECT: Final = f"""
SELECT {", ".join(f"review.{name}" for name in _OWN)}, {_USED_COLUMNS} {_WAIT}"""
_COLUMNS: Final = f"""
{_SELECT}
FROM review {sql_waits.WAIT} {_USED}
"""
_SUBMIT: Final = sql.SUBMIT.format(columns=", ".join(f"rev.{name}" for name in _OWN))
_BESIDE: Final = """state = 'QUEUED' AND kind = 'REVIEW' AND attempt.tenant = review.tenant
                AND attempt.key_id = last.key_id"""
# How many calls the attempt that runs has started; how many go before the one that waits, of those
# of its key: of its lane and of those before it, never more than a thousand rows each.
_WHOLE: Final = f"""
{_SELECT},
    coalesce(last.answer_bytes, 0) AS answer_bytes, last.calls_started AS progress_calls,
    CASE WHEN last.state = 'QUEUED' THEN (
        SELECT least(count(*), 1000) + 1 FROM (
            (SELECT FROM attempt WHERE {_BESIDE} AND priority = last.priority
                AND (due_time, id) < (last.due_time, last.id) LIMIT 1000)
            UNION ALL
            (SELECT FROM attempt WHERE {_BESIDE} AND priority < last.priority LIMIT 1000)) earlier)
        END AS progress_place,
    coalesce((
        SELECT prompt_version FROM attempt
        WHERE attempt.review_id = review.id AND prompt_version <> ''
        ORDER BY number DESC LIMIT 1), '') AS prompt_version
FROM review {sql_waits.WAIT} {_USED}
    LEFT JOIN LATERAL (
        SELECT id, key_id, state, calls_started, answer_bytes, priority, due_time FROM attempt
        WHERE attempt.review_id = review.id AND attempt.state IN ('QUEUED', 'RUNNING')
        ORDER BY number DESC LIMIT 1) last ON true
"""  # noqa: S608 - constants
_GET: Final = _WHOLE + "WHERE review.id = %(id)s AND review.tenant = %(tenant)s"
_FILTER: Final[Mapping[str, LiteralString]] = {
    "states": "state = ANY(%(states)s)",
    "failures": "failure = ANY(%(failures)s)",
    "repository": "repository = %(repository)s",
    "pull_request": "pull_request = %(pull_request)s",
    "owner": "owner = %(owner)s",
    "submitted_after": "create_time >= %(submitted_after)s",
    "submitted_before": "create_time < %(submitted_before)s",
}
_DELETE: Final = "DELETE FROM review WHERE id = %(id)s AND tenant = %(tenant)s"
_UNREAD: Final = "SELECT unread FROM review WHERE id = %(id)s"
# Chunk after chunk until they are so many bytes: one at least.
_FINDINGS: Final = """
SELECT chunk_id, position, findings, chunks FROM (
    SELECT chunk_id, position, findings, count(*) OVER () AS chunks,
        sum(length(findings)) OVER (ORDER BY position) - length(findings) AS before
    FROM chunk_done
    WHERE review_id = %(review_id)s AND findings IS NOT NULL AND position > %(after)s) one
WHERE before < %(bytes)s ORDER BY position
"""


@dataclass(frozen=True, slots=True)
class Submission:
    """A review that is to be stored, its input sealed; `scope` and `digest` make it idempotent."""

    id: str
    tenant: str
    scope: str
    digest: bytes
    repository: str
    pull_request: int
    head_commit: str
    model: str
    chosen_model: str
    model_fallback: str
    fallback_models: Sequence[str]
    key_id: str
    key_version: int
    key_hint: str
    key_owner: str
    named_key: bool
    priority: int
    trace_parent: str
    owner: str
    actor: str
    max_calls: int
    chunks_total: int
    input: bytes
    unread: bytes | None
    unread_count: int
    skipped_count: int


@dataclass(frozen=True, slots=True)
class SealedFindings:
    """Findings of chunks, sealed, as they follow one another; `after` is the place of the last
    chunk where there are more, else 0."""

    chunks: Sequence[tuple[str, bytes]]
    after: int = 0


class ReviewStore:
    """Reviews, their content and findings."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def earlier(self, tenant: str, scope: str, digest: bytes) -> ReviewRow | None:
        """Return the review that the same submission made before. Raises REQUEST_ID_CONFLICT."""
        async with self._database.statement() as session:
            review_id = await requests.seen(session, tenant, SUBMIT, scope, digest)
        return None if review_id is None else await self.get(tenant, review_id)

    async def submit(
        self,
        new: Submission,
        *,
        reviews_per_day: int,
        calls_per_day: int,
        most_waiting: int,
        supersede: bool,
    ) -> ReviewRow:
        """Store a review with its content and first attempt: all or nothing; `supersede`: older
        reviews of its pull request, of another head commit, are cancelled.

        Raises:
            Repeated: its request id came before.
            ByokeepError: TENANT_NOT_ACTIVE, DAILY_LIMIT, QUEUE_FULL.
        """
        parameters = {name: getattr(new, name) for name in Submission.__dataclass_fields__}
        parameters["attempt_id"] = ids.new_id("att")
        parameters["fallback_models"] = list(new.fallback_models)
        async with self._database.transaction() as session:
            await _admit(session, new.tenant, most_waiting)
            row = await session.one(_SUBMIT, parameters)
            if row is None:
                raise requests.Repeated
            if row.earlier_today >= reviews_per_day:
                raise _daily_limit("reviews", reviews_per_day)
            if 0 < calls_per_day < row.calls_today + new.chunks_total:
                raise _daily_limit("provider calls", calls_per_day)
            if new.unread is not None:
                await session.run(sql.KEEP_UNREAD, parameters)
            if not new.chunks_total:
                await session.run(sql.NOTHING_TO_READ, parameters)
            if supersede and new.pull_request and new.head_commit:
                for older in await session.all(sql.OLDER, parameters):
                    await cancel(session, older.id, new.id)
            if not new.chunks_total or new.unread is not None:
                return _review(await session.one(_GET, parameters))
        return _review(row)

    async def get(self, tenant: str, review_id: str) -> ReviewRow:
        """Return a review of the tenant. Raises ByokeepError: NOT_FOUND."""
        parameters = {"id": review_id, "tenant": tenant}
        async with self._database.statement() as session:
            row = await session.one(_GET, parameters)
        if row is None:
            raise ByokeepError(
                grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such review", resource="review"
            )
        return _review(row)

    async def unread(self, review_id: str) -> bytes | None:
        """Return a review's unread parts and skipped files, sealed; None where there are none, or
        no more."""
        async with self._database.statement() as session:
            sealed: bytes | None = (await session.one(_UNREAD, {"id": review_id})).unread
        return sealed

    async def findings(self, review_id: str, after: int, most_bytes: int) -> SealedFindings:
        """Return a review's findings of the chunks after a place, of as many as begin within so
        many bytes."""
        parameters = {"review_id": review_id, "after": after, "bytes": most_bytes}
        async with self._database.statement() as session:
            found = await session.all(_FINDINGS, parameters)
        more = bool(found) and found[-1].chunks > len(found)
        return SealedFindings(
            [(row.chunk_id, row.findings) for row in found], found[-1].position if more else 0
        )

    async def page(
        self, wanted: ReviewFilter, last: str, limit: int, *, newest_first: bool = True
    ) -> Sequence[ReviewRow]:
        """Return reviews of a filter by id, so by age, after `last`, which may be empty."""
        given = {name: getattr(wanted, name) for name in _FILTER}
        conditions: list[LiteralString] = [
            condition for name, condition in _FILTER.items() if given[name]
        ]
        if not wanted.of_users:
            conditions.append("owner = ''")
        if last:
            conditions.append("id < %(last)s" if newest_first else "id > %(last)s")
        statement = _COLUMNS + " AND ".join(["WHERE tenant = %(tenant)s", *conditions])
        statement += f" ORDER BY id {'DESC' if newest_first else 'ASC'} LIMIT %(limit)s"
        parameters = {
            **given,
            "states": list(wanted.states),
            "failures": list(wanted.failures),
            "tenant": wanted.tenant,
            "last": last,
            "limit": limit,
        }
        async with self._database.statement() as session:
            return [_review(row) for row in await session.all(statement, parameters)]

    async def delete(self, message: review_pb2.DeleteReviewRequest, tenant: str) -> None:
        """Delete a review of the tenant with all that belongs to it."""
        review_id = last_of(message.name)
        async with self._database.transaction() as session:
            if await requests.first_time(session, tenant, message):
                await cancel(session, review_id)
                await session.run(_DELETE, {"id": review_id, "tenant": tenant})

    async def carried_out(
        self, message: review_pb2.RetryReviewRequest | review_pb2.DeleteReviewRequest, tenant: str
    ) -> bool:
        """Whether this request was carried out before. Raises REQUEST_ID_CONFLICT."""
        async with self._database.statement() as session:
            return await requests.again(session, tenant, message)

    async def retry(
        self,
        message: review_pb2.RetryReviewRequest,
        tenant: str,
        review_id: str,
        *,
        key_id: str,
        key_version: int,
        key_owner: str,
        max_calls: int,
        most_waiting: int,
    ) -> None:
        """Queue a further attempt of a failed review.

        Raises ByokeepError: WRONG_STATE, TENANT_NOT_ACTIVE, QUEUE_FULL.
        """
        parameters = {
            "id": review_id,
            "tenant": tenant,
            "attempt_id": ids.new_id("att"),
            "key_id": key_id,
            "key_version": key_version,
            "key_owner": key_owner,
            "max_calls": max_calls,
        }
        async with self._database.transaction() as session:
            await _admit(session, tenant, most_waiting)
            if not await requests.first_time(session, tenant, message):
                return
            row = await session.one(sql.RETRY, parameters)
            if row is None:
                raise ByokeepError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "WRONG_STATE",
                    "only a failed review whose diff is still kept can be retried; submit it again",
                )

    async def sweep(self, *, content_hours: int, findings_days: int, review_days: int) -> None:
        """Delete what was kept long enough."""
        async with self._database.statement() as session:
            await session.run(sql.DROP_CONTENT, {"hours": content_hours})
            await session.run(sql.DROP_FINDINGS, {"days": findings_days})
            while await session.run(sql.DROP_REVIEWS, {"days": review_days}):
                pass
            await session.run(sql.DROP_KEY_CHECKS, {"days": review_days})
            await session.run(sql.DROP_REQUESTS)
            await session.run(sql.DROP_BUCKETS)


async def _admit(session: Session, tenant: str, most_waiting: int) -> None:
    """Lock a tenant, so that its deletion waits for what is stored now, or is seen.

    Raises ByokeepError: TENANT_NOT_ACTIVE, QUEUE_FULL.
    """
    row = await session.one(sql.ADMIT, {"tenant": tenant, "most": most_waiting})
    if row.state != "ACTIVE":
        raise not_active(tenant, row.state)
    if row.waiting >= most_waiting:
        raise ByokeepError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{most_waiting} reviews of the tenant wait already, as many as its plan allows",
            retry_after_seconds=_FULL_SECONDS,
            waiting=str(most_waiting),
        )


def _daily_limit(what: str, limit: int) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DAILY_LIMIT",
        f"this would be more than the tenant's {limit} {what} within 24 hours; try again later",
        retry_after_seconds=3600,
        limit=str(limit),
        window="1d",
    )


def _review(row: Row) -> ReviewRow:
    return ReviewRow(**{name: getattr(row, name) for name in _NAMES if name in row._fields})
