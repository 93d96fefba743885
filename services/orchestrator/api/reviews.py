"""ReviewService: RPC ↔ policy and store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import grpc
from byokeep import ids, names
from byokeep.orchestrator.v1 import review_pb2, review_pb2_grpc, settings_pb2

from services.common import load, tracing
from services.common.errors import ByokeepError
from services.orchestrator.api import access, filters, paging, planning
from services.orchestrator.api.choosing import Chooser
from services.orchestrator.api.findings import Findings
from services.orchestrator.api.settings import ceilings
from services.orchestrator.api.showing import message, name_of
from services.orchestrator.compute.child import Job
from services.orchestrator.compute.pool import Compute
from services.orchestrator.config import Settings
from services.orchestrator.custody import content
from services.orchestrator.policy import bounds
from services.orchestrator.policy.keys import hint_of
from services.orchestrator.policy.states import (
    OPEN,
    TERMINAL,
    Fallback,
    Priority,
    ReviewState,
)
from services.orchestrator.store import requests
from services.orchestrator.store.events import REVIEW, Events
from services.orchestrator.store.reviews import ReviewRow, ReviewStore
from services.orchestrator.store.submissions import Submission, SubmissionStore

# Nothing tells of how far an answer is: that is stored with each beat.
_RUNNING_SECONDS: Final = 2.5
# Nothing tells of the start of an attempt and of its first call, see PICK.
_STARTING_SECONDS: Final = 1.0
_LONGEST_SECONDS: Final = 5.0
_BULK: Final = 500
# What says of one review that it can't be retried, and nothing of the next.
_OF_ONE: Final = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED)


class ReviewServicer(review_pb2_grpc.ReviewServiceServicer):
    """Takes reviews and shows them."""

    def __init__(
        self,
        settings: Settings,
        reviews: ReviewStore,
        submissions: SubmissionStore,
        contents: content.ContentKeys,
        chooser: Chooser,
        planner: planning.Planner,
        compute: Compute,
        events: Events,
    ) -> None:
        """Use the stores, and what chooses keys and models."""
        self._settings = settings
        self._reviews = reviews
        self._submissions = submissions
        self._contents = contents
        self._findings = Findings(reviews, contents)
        self._chooser = chooser
        self._planner = planner
        self._compute = compute
        self._events = events

    async def SubmitReview(
        self, request: review_pb2.SubmitReviewRequest, context: object
    ) -> review_pb2.SubmitReviewResponse:
        """Store a review and enqueue it; the same submission returns the same review."""
        rights = access.current()
        rights.require_active()
        self._require_sender(rights, request.input)
        scope, digest = _scope(request), requests.digest_of(request.input)
        refused: ByokeepError | None = None
        try:
            row: ReviewRow | None = await self._submit(rights, request, scope, digest)
        except requests.Repeated:
            row = None
        except ByokeepError as error:
            row, refused = None, error
        if row is None:
            # What was taken once stays taken, whatever would be said of it today.
            row = await self._submissions.earlier(rights.tenant.id, scope, digest)
        if row is None:
            raise refused or requests.conflict()
        return review_pb2.SubmitReviewResponse(review=self._message(row))

    async def DryRunReview(
        self, request: review_pb2.DryRunReviewRequest, context: object
    ) -> review_pb2.DryRunReviewResponse:
        """Say what a review would do."""
        rights = access.current()
        rights.require_active()
        self._require_sender(rights, request.input)
        chosen = await self._chooser.choose(rights, request.input)
        answer = await self._planner.plan(rights.tenant.id, request.input, chosen.model)
        answer.model = str(chosen.model)
        answer.chosen_model = str(chosen.instead_of or "")
        answer.key_id = names.last_of(chosen.key.name)
        answer.max_calls_per_review = self._ceilings(rights).max_calls_per_review
        return answer

    async def GetReview(
        self, request: review_pb2.GetReviewRequest, context: object
    ) -> review_pb2.GetReviewResponse:
        """Return a review with a page of its findings."""
        row = await self._readable(access.current(), names.last_of(request.name))
        review, token = await self._with_findings(row, int(request.page_token or 0))
        return review_pb2.GetReviewResponse(review=review, next_page_token=token)

    async def ListReviews(
        self, request: review_pb2.ListReviewsRequest, context: object
    ) -> review_pb2.ListReviewsResponse:
        """List the reviews that the caller may see, newest first."""
        rights = access.current()
        limit = paging.size(request.page_size)
        wanted = filters.read(request.filter, rights.tenant.id, of_users=rights.may_read_users)
        rows = await self._reviews.page(wanted, paging.after(request), limit + 1)
        page, last = paging.cut(rows, limit, lambda row: row.id, self._message)
        return review_pb2.ListReviewsResponse(
            reviews=page, next_page_token=paging.following(request, last)
        )

    async def WatchReview(
        self, request: review_pb2.WatchReviewRequest, context: object
    ) -> AsyncIterator[review_pb2.WatchReviewResponse]:
        """Stream a review as it changes, until it has ended."""
        rights, review_id = access.current(), names.last_of(request.name)
        seen: ReviewRow | None = None
        began = time.monotonic()
        with self._events.subscribe(REVIEW, review_id) as changes:
            while True:
                async with load.turn():
                    if seen is not None:
                        rights = await access.again()
                    row = await self._readable(rights, review_id)
                    ended = row.state in TERMINAL
                    review, token = await self._with_findings(row) if ended else (None, "")
                if review is not None:
                    yield review_pb2.WatchReviewResponse(review=review, next_page_token=token)
                    return
                if row != seen:
                    yield review_pb2.WatchReviewResponse(review=self._message(row))
                seen = row
                # Who has waited long may see a start late; of an end all are told.
                starting = min(
                    max(_STARTING_SECONDS, (time.monotonic() - began) / 4), _LONGEST_SECONDS
                )
                await changes.wait(_RUNNING_SECONDS if row.progress_calls else starting)

    async def CancelReview(
        self, request: review_pb2.CancelReviewRequest, context: object
    ) -> review_pb2.CancelReviewResponse:
        """Cancel a review; one that is cancelled already stays so."""
        rights, review_id = access.current(), names.last_of(request.name)
        tenant = rights.tenant.id
        row = await self._reviews.get(tenant, review_id)
        rights.require_user(row.owner, "name")
        if row.state not in TERMINAL:
            await self._reviews.cancel(review_id)
            row = await self._reviews.get(tenant, review_id)
        if row.state is not ReviewState.CANCELLED:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "WRONG_STATE",
                f"the review is {row.state} already",
                state=row.state,
            )
        return review_pb2.CancelReviewResponse(review=self._message(row))

    async def RetryReview(
        self, request: review_pb2.RetryReviewRequest, context: object
    ) -> review_pb2.RetryReviewResponse:
        """Start a further attempt of a failed review, on the key that is active now."""
        rights, review_id = access.current(), names.last_of(request.name)
        rights.require_active()
        row = await self._reviews.get(rights.tenant.id, review_id)
        rights.require_user(row.owner, "name")
        if not await self._submissions.carried_out(request, rights.tenant.id):
            await self._retry(rights, row, request)
            row = await self._reviews.get(rights.tenant.id, review_id)
        return review_pb2.RetryReviewResponse(review=self._message(row))

    async def CancelReviews(
        self, request: review_pb2.CancelReviewsRequest, context: object
    ) -> review_pb2.CancelReviewsResponse:
        """Cancel reviews, each for itself."""
        rows, token = await self._bulk(request, OPEN)
        done = [row for row in rows if await self._reviews.cancel(row.id)]
        return review_pb2.CancelReviewsResponse(names=map(name_of, done), next_page_token=token)

    async def RetryReviews(
        self, request: review_pb2.RetryReviewsRequest, context: object
    ) -> review_pb2.RetryReviewsResponse:
        """Start a further attempt of failed reviews, each for itself."""
        rights = access.current()
        rights.require_active()
        rows, token = await self._bulk(request, frozenset({ReviewState.FAILED}))
        answer = review_pb2.RetryReviewsResponse(next_page_token=token)
        for row in rows:
            one = review_pb2.RetryReviewRequest(
                name=name_of(row), request_id=_request_id_of(request.request_id, row.id)
            )
            try:
                await self._retry(rights, row, one)
                answer.names.append(one.name)
            except ByokeepError as error:
                if error.code not in _OF_ONE:
                    raise
                answer.refused.add(name=one.name, reason=error.reason, message=str(error))
        return answer

    async def DeleteReview(
        self, request: review_pb2.DeleteReviewRequest, context: object
    ) -> review_pb2.DeleteReviewResponse:
        """Delete a review with all that belongs to it."""
        rights = access.current()
        tenant = rights.tenant.id
        if not await self._submissions.carried_out(request, tenant):
            row = await self._reviews.get(tenant, names.last_of(request.name))
            rights.require_user(row.owner, "name")
            await self._reviews.delete(request, tenant)
        return review_pb2.DeleteReviewResponse()

    async def ExportReview(
        self, request: review_pb2.ExportReviewRequest, context: object
    ) -> review_pb2.ExportReviewResponse:
        """Return a review that has ended in another form."""
        row = await self._readable(access.current(), names.last_of(request.name))
        if row.state not in TERMINAL:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "WRONG_STATE",
                "only a review that has ended can be exported",
                state=row.state,
            )
        parts, _ = await self._findings.opened(row, 0, bounds.ALL_BYTES)
        review = b"".join((self._message(row).SerializeToString(), *parts))
        answer = await self._compute.run(row.tenant, Job(request.format), review)
        return review_pb2.ExportReviewResponse.FromString(answer)

    async def _bulk(
        self,
        request: review_pb2.CancelReviewsRequest | review_pb2.RetryReviewsRequest,
        states: frozenset[ReviewState],
    ) -> tuple[Sequence[ReviewRow], str]:
        """Return reviews that a filter names and the caller may change, and the next token."""
        rights = access.current()
        wanted = filters.read(
            request.filter, rights.tenant.id, of_users=rights.may_assert_users, states=states
        )
        rows = await self._reviews.page(
            wanted, paging.after(request), _BULK + 1, newest_first=False
        )
        last = rows[_BULK - 1].id if len(rows) > _BULK else ""
        return rows[:_BULK], paging.following(request, last)

    async def _retry(
        self, rights: access.Rights, row: ReviewRow, request: review_pb2.RetryReviewRequest
    ) -> None:
        rights.require_user_keys(row.owner)
        key = await self._chooser.key_again(rights, row)
        await self._submissions.retry(
            request,
            rights.tenant.id,
            row.id,
            key_id=names.last_of(key.name),
            key_version=key.active_version,
            key_owner=key.owner,
            max_calls=self._ceilings(rights).max_calls_per_review,
            most_waiting=rights.plan.reviews_waiting,
        )

    async def _submit(
        self,
        rights: access.Rights,
        request: review_pb2.SubmitReviewRequest,
        scope: str,
        digest: bytes,
    ) -> ReviewRow:
        wanted = request.input
        chosen = await self._chooser.choose(rights, wanted)
        plan = await self._planner.plan(rights.tenant.id, wanted, chosen.model)
        most = self._ceilings(rights)
        planning.require_calls(plan.calls, most.max_calls_per_review)
        content_key = await self._contents.current(rights.tenant.id)
        review_id = ids.new_id("rev")
        return await self._submissions.submit(
            Submission(
                id=review_id,
                tenant=rights.tenant.id,
                scope=scope,
                digest=digest,
                repository=wanted.repository,
                pull_request=wanted.pull_request,
                head_commit=wanted.head_commit,
                model=str(chosen.model),
                chosen_model=str(chosen.instead_of or ""),
                model_fallback=Fallback.NOT_USABLE if chosen.instead_of else Fallback.NONE,
                fallback_models=list(map(str, chosen.fallbacks)),
                key_id=names.last_of(chosen.key.name),
                key_version=chosen.key.active_version,
                key_hint=hint_of(chosen.key, chosen.key.active_version),
                key_owner=chosen.key.owner,
                named_key=bool(wanted.key),
                priority=Priority(request.priority == review_pb2.PRIORITY_BATCH),
                trace_parent=tracing.traceparent(),
                owner=wanted.user,
                actor=rights.actor(wanted.user),
                max_calls=most.max_calls_per_review,
                chunks_total=plan.calls,
                input=content_key.seal(review_id, content.INPUT, wanted.SerializeToString()),
                unread=content.seal_unread(content_key, review_id, plan.unread, plan.skipped_files),
                unread_count=plan.unread_count,
                skipped_count=plan.skipped_count,
            ),
            reviews_per_day=most.max_reviews_per_day,
            calls_per_day=most.max_calls_per_day,
            most_waiting=rights.plan.reviews_waiting,
            supersede=not (request.keep_older or rights.tenant.keep_superseded),
        )

    def _require_sender(self, rights: access.Rights, wanted: review_pb2.ReviewInput) -> None:
        rights.require_user(wanted.user, "input.user")
        rights.require_user_keys(wanted.user)
        planning.require_size(wanted, self._ceilings(rights).max_diff_bytes)

    def _message(self, row: ReviewRow) -> review_pb2.Review:
        return message(row, self._settings.wait_seconds)

    def _ceilings(self, rights: access.Rights) -> settings_pb2.Ceilings:
        return ceilings(rights.tenant, rights.plan, self._settings)

    async def _readable(self, rights: access.Rights, review_id: str) -> ReviewRow:
        row = await self._reviews.get(rights.tenant.id, review_id)
        rights.require_reader(row.owner, "name")
        return row

    async def _with_findings(self, row: ReviewRow, after: int = 0) -> tuple[review_pb2.Review, str]:
        """Return a review with the findings after a place, and the next page's token."""
        parts, last = await self._findings.opened(row, after, bounds.PAGE_BYTES)
        review = self._message(row)
        for part in parts:
            found = review_pb2.Review.FromString(part)
            found.findings.sort(key=lambda finding: (finding.path, finding.start_line))
            review.MergeFrom(found)
        return review, str(last or "")


def _request_id_of(request_id: str, review_id: str) -> str:
    """The id of one retry of many: the same each time that the many are asked for."""
    return hashlib.sha256(f"{request_id} {review_id}".encode()).hexdigest()


def _scope(request: review_pb2.SubmitReviewRequest) -> str:
    wanted = request.input
    return f"{wanted.repository}#{wanted.pull_request}@{wanted.head_commit}:{request.request_id}"
