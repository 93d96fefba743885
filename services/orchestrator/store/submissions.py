"""SQL that takes reviews, for the first time and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep import ids
from byokeep.orchestrator.v1 import review_pb2

from services.common.errors import ByokeepError
from services.orchestrator.policy.refusals import not_active
from services.orchestrator.policy.states import Fallback, Priority, TenantState
from services.orchestrator.store import requests
from services.orchestrator.store.cancelling import cancel
from services.orchestrator.store.database import Database, Session
from services.orchestrator.store.reviews import GET, OWN, ReviewRow, ReviewStore, review_of

_METHOD: Final = "SubmitReview"
_FULL_SECONDS: Final = 30

# It counts no more than may wait, however many do.
_ADMIT: Final = """
    SELECT state, (
        SELECT count(*) FROM (
            SELECT FROM attempt
            WHERE attempt.tenant = tenant.id AND attempt.state = 'QUEUED' AND kind = 'REVIEW'
            LIMIT %(most)s) one) AS waiting
    FROM tenant WHERE id = %(tenant)s FOR NO KEY UPDATE"""

_SUBMIT: Final = f"""
    WITH req AS (
        INSERT INTO request (tenant, method, scope, digest, resource)
        VALUES (%(tenant)s, 'SubmitReview', %(scope)s, %(digest)s, %(id)s)
        ON CONFLICT DO NOTHING RETURNING 1),
    day AS (
        INSERT INTO rate_bucket (scope, hour, events)
        SELECT 'reviews:' || %(tenant)s, date_trunc('hour', now()), 1 FROM req
        ON CONFLICT (scope, hour) DO UPDATE SET events = rate_bucket.events + 1),
    rev AS (
        INSERT INTO review (id, tenant, repository, pull_request, head_commit, model, chosen_model,
            model_fallback, fallback_models, key_id, key_owner, named_key, owner, actor, max_calls,
            chunks_total, priority, trace_parent)
        SELECT %(id)s, %(tenant)s, %(repository)s, %(pull_request)s, %(head_commit)s,
            %(model)s, %(chosen_model)s, %(model_fallback)s,
            CAST(%(fallback_models)s AS text[]), %(key_id)s, %(key_owner)s, %(named_key)s,
            %(owner)s, %(actor)s, %(max_calls)s, %(chunks_total)s, %(priority)s, %(trace_parent)s
        FROM req
        RETURNING *),
    content AS (
        INSERT INTO review_content (review_id, input) SELECT id, %(input)s FROM rev),
    att AS (
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, priority)
        SELECT %(attempt_id)s, 'REVIEW', %(tenant)s, id, %(key_id)s, %(key_version)s, %(priority)s
        FROM rev RETURNING pg_notify('byokeep_due', ''))
    SELECT {", ".join(f"rev.{name}" for name in OWN)}, CAST(%(key_version)s AS int) AS used_version,
        CAST(%(key_hint)s AS text) AS used_hint, coalesce((
            SELECT sum(events) FROM rate_bucket
            WHERE scope = 'reviews:' || %(tenant)s AND hour > now() - interval '24 hours'
        ), 0) AS earlier_today, coalesce((
            SELECT sum(events) FROM rate_bucket
            WHERE scope = 'calls:' || %(tenant)s AND hour > now() - interval '24 hours'
        ), 0) AS calls_today
    FROM rev, att"""  # noqa: S608 - constants

_KEEP_UNREAD: Final = """
    UPDATE review SET unread = %(unread)s, unread_count = %(unread_count)s,
        skipped_count = %(skipped_count)s
    WHERE id = %(id)s"""

# No line of text is changed: what was submitted is complete without an attempt.
_NOTHING_TO_READ: Final = """
    WITH a AS (DELETE FROM attempt WHERE id = %(attempt_id)s),
    c AS (DELETE FROM review_content WHERE review_id = %(id)s)
    UPDATE review SET state = 'COMPLETED', attempts = 0, end_time = now() WHERE id = %(id)s"""

# Of the same user: nobody ends what runs on another's key.
_OLDER: Final = """
    SELECT id FROM review
    WHERE tenant = %(tenant)s AND repository = %(repository)s AND pull_request = %(pull_request)s
        AND owner = %(owner)s AND state IN ('QUEUED', 'RUNNING') AND id <> %(id)s
        AND head_commit NOT IN ('', %(head_commit)s)
    ORDER BY id"""

_RETRY: Final = """
    WITH rev AS (
        UPDATE review SET state = 'QUEUED', failure = '', failure_message = '',
            end_time = NULL, key_id = %(key_id)s, key_owner = %(key_owner)s,
            fence = fence + 1, version = version + 1, attempts = attempts + 1,
            max_calls = calls_started + %(max_calls)s
        WHERE id = %(id)s AND tenant = %(tenant)s AND state = 'FAILED'
            AND EXISTS (SELECT FROM review_content WHERE review_id = %(id)s)
        RETURNING *, pg_notify('byokeep_review', id))
    INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, number, fence, priority)
    SELECT %(attempt_id)s, 'REVIEW', %(tenant)s, id, %(key_id)s, %(key_version)s, attempts, fence,
        priority
    FROM rev RETURNING pg_notify('byokeep_due', '')"""


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
    model_fallback: Fallback
    fallback_models: Sequence[str]
    key_id: str
    key_version: int
    key_hint: str
    key_owner: str
    named_key: bool
    priority: Priority
    trace_parent: str
    owner: str
    actor: str
    max_calls: int
    chunks_total: int
    input: bytes
    unread: bytes | None
    unread_count: int
    skipped_count: int


class SubmissionStore:
    """Takes reviews."""

    def __init__(self, database: Database, reviews: ReviewStore) -> None:
        """Use a database, and what reads the reviews that are there."""
        self._database = database
        self._reviews = reviews

    async def earlier(self, tenant: str, scope: str, digest: bytes) -> ReviewRow | None:
        """Return the review that the same submission made before. Raises REQUEST_ID_CONFLICT."""
        async with self._database.statement() as session:
            review_id = await requests.seen(session, tenant, _METHOD, scope, digest)
        return None if review_id is None else await self._reviews.get(tenant, review_id)

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
        async with self._database.of_tenant(new.tenant) as session:
            await _admit(session, new.tenant, most_waiting)
            row = await session.one(_SUBMIT, parameters)
            if row is None:
                raise requests.Repeated
            if row.earlier_today >= reviews_per_day:
                raise _daily_limit("reviews", reviews_per_day)
            if 0 < calls_per_day < row.calls_today + new.chunks_total:
                raise _daily_limit("provider calls", calls_per_day)
            if new.unread is not None:
                await session.run(_KEEP_UNREAD, parameters)
            if not new.chunks_total:
                await session.run(_NOTHING_TO_READ, parameters)
            if supersede and new.pull_request and new.head_commit:
                for older in await session.all(_OLDER, parameters):
                    await cancel(session, older.id, new.id)
            if not new.chunks_total or new.unread is not None:
                return review_of(await session.one(GET, parameters))
        return review_of(row)

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
        async with self._database.of_tenant(tenant) as session:
            await _admit(session, tenant, most_waiting)
            if not await requests.first_time(session, tenant, message):
                return
            row = await session.one(_RETRY, parameters)
            if row is None:
                raise ByokeepError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "WRONG_STATE",
                    "only a failed review whose diff is still kept can be retried; submit it again",
                )


async def _admit(session: Session, tenant: str, most_waiting: int) -> None:
    """Lock a tenant, so that its deletion waits for what is stored now, or is seen.

    Raises ByokeepError: TENANT_NOT_ACTIVE, QUEUE_FULL.
    """
    row = await session.one(_ADMIT, {"tenant": tenant, "most": most_waiting})
    if row.state != TenantState.ACTIVE:
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
