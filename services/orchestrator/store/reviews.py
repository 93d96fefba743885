"""SQL of reviews: read, list, cancel, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, LiteralString

import grpc
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2

from services.common.errors import ByokeepError
from services.orchestrator.policy.states import ReviewState
from services.orchestrator.store import requests
from services.orchestrator.store.cancelling import cancel
from services.orchestrator.store.database import Database, Row
from services.orchestrator.store.waits import WAIT


@dataclass(frozen=True, slots=True)
class ReviewRow:
    """A review; its content and findings stand elsewhere.

    `wait_reason` is empty where it does not wait, or for its turn alone; `wait_until` is None where
    an event ends the wait; `wait_stalled` is since when it waits for this reason and others.
    """

    id: str
    tenant: str
    state: ReviewState
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
    states: Sequence[ReviewState] = ()
    failures: Sequence[str] = ()
    repository: str = ""
    pull_request: int = 0
    owner: str = ""
    submitted_after: datetime | None = None
    submitted_before: datetime | None = None


_NAMES: Final = tuple(ReviewRow.__dataclass_fields__)
_JOINED: Final = ("used_", "wait_", "answer_", "progress_", "prompt_")
OWN: Final = tuple(name for name in _NAMES if not name.startswith(_JOINED))
# Of a review that goes on, the newest attempt is the one that waits or runs.
_NEWEST: Final = """
    LEFT JOIN LATERAL (
        SELECT id, key_id, key_version, state, calls_started, answer_bytes, priority, due_time, (
            SELECT hint FROM key_validation known
            WHERE known.tenant = attempt.tenant AND known.key_id = attempt.key_id
                AND known.version = attempt.key_version) AS hint
        FROM attempt WHERE attempt.review_id = review.id ORDER BY number DESC LIMIT 1
        ) newest ON true
"""
_SELECT: Final = f"""
SELECT {", ".join(f"review.{name}" for name in OWN)},
    coalesce(newest.key_version, 0) AS used_version, coalesce(newest.hint, '') AS used_hint,
    coalesce(wait.reason, '') AS wait_reason,
    coalesce(wait.cause, '') AS wait_cause, wait.since AS wait_since,
    wait.stalled AS wait_stalled, nullif(wait.until, 'infinity') AS wait_until"""
_FROM: Final = f"FROM review {WAIT} {_NEWEST}"
_BESIDE: Final = """state = 'QUEUED' AND kind = 'REVIEW' AND attempt.tenant = review.tenant
                AND attempt.key_id = newest.key_id"""
# How many calls the attempt that runs has started; how many go before the one that waits, of those
# of its key: of its lane and of those before it, never more than a thousand rows each.
_WHOLE: Final = f"""
{_SELECT},
    CASE WHEN newest.state IN ('QUEUED', 'RUNNING') THEN newest.answer_bytes ELSE 0 END
        AS answer_bytes,
    CASE WHEN newest.state IN ('QUEUED', 'RUNNING') THEN newest.calls_started END
        AS progress_calls,
    CASE WHEN newest.state = 'QUEUED' THEN (
        SELECT least(count(*), 1000) + 1 FROM (
            (SELECT FROM attempt WHERE {_BESIDE} AND priority = newest.priority
                AND (due_time, id) < (newest.due_time, newest.id) LIMIT 1000)
            UNION ALL
            (SELECT FROM attempt WHERE {_BESIDE} AND priority < newest.priority LIMIT 1000)
            ) earlier)
        END AS progress_place,
    coalesce((
        SELECT prompt_version FROM attempt
        WHERE attempt.review_id = review.id AND prompt_version <> ''
        ORDER BY number DESC LIMIT 1), '') AS prompt_version
{_FROM}
"""  # noqa: S608 - constants
GET: Final = _WHOLE + "WHERE review.id = %(id)s AND review.tenant = %(tenant)s"
_FILTER: Final[Mapping[str, LiteralString]] = {
    "states": "review.state = ANY(%(states)s)",
    "failures": "review.failure = ANY(%(failures)s)",
    "repository": "review.repository = %(repository)s",
    "pull_request": "review.pull_request = %(pull_request)s",
    "owner": "review.owner = %(owner)s",
    "submitted_after": "review.create_time >= %(submitted_after)s",
    "submitted_before": "review.create_time < %(submitted_before)s",
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

    async def get(self, tenant: str, review_id: str) -> ReviewRow:
        """Return a review of the tenant. Raises ByokeepError: NOT_FOUND."""
        parameters = {"id": review_id, "tenant": tenant}
        async with self._database.statement() as session:
            row = await session.one(GET, parameters)
        if row is None:
            raise ByokeepError(
                grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such review", resource="review"
            )
        return review_of(row)

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
            conditions.append("review.owner = ''")
        if last:
            conditions.append("review.id < %(last)s" if newest_first else "review.id > %(last)s")
        statement = f"{_SELECT} {_FROM} " + " AND ".join(
            ["WHERE review.tenant = %(tenant)s", *conditions]
        )
        statement += f" ORDER BY review.id {'DESC' if newest_first else 'ASC'} LIMIT %(limit)s"
        parameters = {
            **given,
            "states": list(wanted.states),
            "failures": list(wanted.failures),
            "tenant": wanted.tenant,
            "last": last,
            "limit": limit,
        }
        async with self._database.statement() as session:
            return [review_of(row) for row in await session.all(statement, parameters)]

    async def cancel(self, review_id: str) -> bool:
        """Cancel a review with its attempts; False if it had ended."""
        async with self._database.transaction() as session:
            return await cancel(session, review_id)

    async def delete(self, message: review_pb2.DeleteReviewRequest, tenant: str) -> None:
        """Delete a review of the tenant with all that belongs to it."""
        review_id = last_of(message.name)
        async with self._database.transaction() as session:
            if await requests.first_time(session, tenant, message):
                await cancel(session, review_id)
                await session.run(_DELETE, {"id": review_id, "tenant": tenant})


def review_of(row: Row) -> ReviewRow:
    """Return a row of a statement that selects some of ReviewRow's columns."""
    values = {name: getattr(row, name) for name in _NAMES if name in row._fields}
    return ReviewRow(**values | {"state": ReviewState(row.state)})
