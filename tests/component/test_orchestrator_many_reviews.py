"""What is done to several reviews: superseding, filters, bulk, deleting; and how far one is."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import psycopg
import pytest
from byokeep.errors import error_info
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2, settings_pb2
from google.protobuf.field_mask_pb2 import FieldMask

from tests.harness.orchestrator import (
    Conversation,
    RunnerGone,
    Stack,
    fails,
    finding,
    one_chunk,
    request_id,
    running,
)

COMPLETED = review_pb2.REVIEW_STATE_COMPLETED
FAILED = review_pb2.REVIEW_STATE_FAILED
CANCELLED = review_pb2.REVIEW_STATE_CANCELLED
QUEUED = review_pb2.REVIEW_STATE_QUEUED
Filter = review_pb2.ReviewFilter


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        yield started


async def held(talk: Conversation) -> None:
    """A call that is answered by a cancellation alone."""
    await talk.accept("c1")
    await talk.call("c1")
    await talk.cancelled.wait()
    await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST, ambiguous_call=True)


async def set_policy(stack: Stack, **values: bool) -> None:
    await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", **values),
            update_mask=FieldMask(paths=list(values)),
            request_id=request_id(),
        )
    )


async def listed(stack: Stack, **fields: Any) -> list[str]:
    request = review_pb2.ListReviewsRequest(parent="tenants/acme", filter=Filter(**fields))
    answer = await stack.client("acme").reviews.ListReviews(request)
    return [one.name for one in answer.reviews]


# --- submitting


@pytest.mark.parametrize("change", ["a submission", "a setting"])
async def test_changes_of_one_tenant_leave_connections_for_the_others(
    stack: Stack, change: str
) -> None:
    """Was shown to fail without turns: each waited for its tenant's row with a connection."""
    await stack.tenant("other")
    stack.keyvault.add("other")
    await stack.submit(tenant="acme")

    async def change_it(number: int) -> None:
        if change == "a submission":
            await stack.submit(title=str(number))
        else:
            await set_policy(stack, retry_ambiguous=bool(number % 2))

    async with await psycopg.AsyncConnection.connect(stack.database_url) as holding:
        await holding.execute("SELECT FROM tenant WHERE id = 'acme' FOR UPDATE")
        waiting = [asyncio.create_task(change_it(n)) for n in range(30)]
        await stack.until("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        for _ in range(8):
            await stack.submit(tenant="other")
    await asyncio.gather(*waiting)


# --- superseding


async def test_a_newer_head_ends_what_runs_and_what_waits(stack: Stack) -> None:
    """Shown to fail with `supersede=False`: both older ones went on."""
    stack.runner.default = held
    await stack.runner.tell(places=1)
    await stack.until_room(1)
    old = await stack.submit(pull_request=7, head_commit="a" * 40)
    await stack.until("SELECT 1 FROM provider_call")
    # Whatever waits goes on waiting when `old` is cancelled.
    await stack.runner.tell(places=0)
    await stack.until_room(0)
    waiting = await stack.submit(pull_request=7, head_commit="b" * 40)
    others = [
        await stack.submit(pull_request=8, head_commit="a" * 40),
        await stack.submit(pull_request=7, head_commit="a" * 40, repository="acme/other"),
        await stack.submit(pull_request=7),
        await stack.submit(pull_request=7, head_commit="a" * 40, model="openai/gpt-6-luna"),
    ]
    # The last one of these is of the first one's commit: it took the place of `waiting`.
    assert (await stack.get(waiting)).superseded_by == others[-1].name
    stack.runner.default = one_chunk
    new = await stack.submit(pull_request=7, head_commit="c" * 40)
    await stack.runner.tell(places=1)
    for older, by in ((old, waiting), (others[-1], new)):
        found = await stack.ended(older)
        assert (found.state, found.superseded_by) == (CANCELLED, by.name)
    assert (await stack.get(old)).ambiguous_calls == 1
    for one in (new, *others[:-1]):
        assert (await stack.ended(one)).state == COMPLETED
    assert stack.runner.talks[0].cancelled.is_set()


@pytest.mark.parametrize("by", ["review", "tenant", "user"])
async def test_what_is_kept_beside_a_newer_head(stack: Stack, by: str) -> None:
    stack.runner.default = held
    stack.keyvault.add("acme", owner="ann", display_name="ann")
    if by == "tenant":
        await set_policy(stack, keep_superseded=True)
    old = await stack.submit(pull_request=7, head_commit="a" * 40)
    user = "ann" if by == "user" else ""
    await stack.client("acme").reviews.SubmitReview(
        review_pb2.SubmitReviewRequest(
            parent="tenants/acme",
            input=review_pb2.ReviewInput(
                repository="acme/shop",
                diff=b"--- a\n+++ b\n@@ -1 +1 @@\n-a\n+b\n",
                pull_request=7,
                head_commit="b" * 40,
                user=user,
            ),
            request_id=request_id(),
            keep_older=by == "review",
        )
    )
    assert (await stack.get(old)).state != CANCELLED


async def test_two_racing_submissions_leave_one(stack: Stack) -> None:
    stack.runner.default = held
    both = await asyncio.gather(
        *(stack.submit(pull_request=7, head_commit=letter * 40) for letter in "ab")
    )
    states = [(await stack.get(one)).state for one in both]
    assert states.count(CANCELLED) == 1


# --- how many may wait


async def test_a_full_queue_says_when_to_come_again(orchestrator_database_url, tmp_path) -> None:
    own = tmp_path / "plans.toml"
    own.write_text("[plans.team]\nreviews_waiting = 2\n")
    async with running(orchestrator_database_url, tmp_path, plans_file=own) as stack:
        await stack.tenant()
        await stack.tenant("other")
        for tenant in ("acme", "other"):
            stack.keyvault.add(tenant)
        await stack.runner.tell(places=0)
        await stack.until_room(0)
        first, _ = [await stack.submit() for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.submit()
        info = error_info(refused.value)
        assert (info.code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert info.retry_after_seconds == 30
        await stack.submit("other")
        cancel = review_pb2.CancelReviewRequest(name=first.name, request_id=request_id())
        await stack.client("acme").reviews.CancelReview(cancel)
        await stack.submit()


# --- filters


async def test_filters_say_which(stack: Stack) -> None:
    stack.keyvault.add("acme", owner="ann", display_name="ann")
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_REFUSED)]
    failed = await stack.ended(await stack.submit(repository="acme/a", pull_request=1))
    done = await stack.ended(await stack.submit(repository="acme/a", pull_request=2))
    of_user = await stack.ended(await stack.submit(repository="acme/b", user="ann"))
    assert await listed(stack, states=[FAILED]) == [failed.name]
    assert await listed(stack, states=[FAILED, COMPLETED], repository="acme/a") == [
        done.name,
        failed.name,
    ]
    assert await listed(stack, failures=[review_pb2.FAILURE_REASON_REFUSED]) == [failed.name]
    assert await listed(stack, failures=[review_pb2.FAILURE_REASON_TIMEOUT]) == []
    assert await listed(stack, pull_request=2) == [done.name]
    assert await listed(stack, user="ann") == [of_user.name]
    assert await listed(stack, submitted_after=done.create_time) == [of_user.name, done.name]
    assert await listed(stack, submitted_before=done.create_time) == [failed.name]


async def test_a_token_holds_for_its_own_filter_alone(stack: Stack) -> None:
    for _ in range(3):
        await stack.submit(repository="acme/a")
    client = stack.client("acme").reviews

    async def page(token: str, **fields: Any) -> review_pb2.ListReviewsResponse:
        request = review_pb2.ListReviewsRequest(
            parent="tenants/acme", page_size=2, page_token=token, filter=Filter(**fields)
        )
        answer: review_pb2.ListReviewsResponse = await client.ListReviews(request)
        return answer

    token = (await page("", repository="acme/a")).next_page_token
    assert len((await page(token, repository="acme/a")).reviews) == 1
    for other in (token[:-1] + ("0" if token[-1] != "0" else "1"), "rev_" + "0" * 26 + token[-17:]):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await page(other, repository="acme/b")
        assert error_info(refused.value).metadata["field"] == "page_token"
    with pytest.raises(grpc.aio.AioRpcError):
        await page(token)


@pytest.mark.parametrize(
    ("method", "fields", "refused_field"),
    [
        ("CancelReviews", {}, "filter"),
        ("RetryReviews", {}, "filter"),
        ("CancelReviews", {"states": [COMPLETED]}, "filter.states"),
        ("RetryReviews", {"states": [QUEUED]}, "filter.states"),
        ("CancelReviews", {"submitted_after": {"seconds": 10**13}}, "filter.submitted_after"),
    ],
)
async def test_nonsense_is_refused(
    stack: Stack, method: str, fields: dict[str, Any], refused_field: str
) -> None:
    request = getattr(review_pb2, f"{method}Request")(
        parent="tenants/acme", filter=Filter(**fields), request_id=request_id()
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(stack.client("acme").reviews, method)(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(refused.value).metadata["field"] == refused_field


# --- all at once


async def test_many_are_cancelled(stack: Stack) -> None:
    stack.runner.default = held
    ours = [await stack.submit(repository="acme/a") for _ in range(3)]
    other = await stack.submit(repository="acme/b")
    client = stack.client("acme").reviews
    request = review_pb2.CancelReviewsRequest(
        parent="tenants/acme", filter=Filter(repository="acme/a"), request_id=request_id()
    )
    answer = await client.CancelReviews(request)
    assert (list(answer.names), answer.next_page_token) == ([one.name for one in ours], "")
    assert list((await client.CancelReviews(request)).names) == []
    assert {(await stack.get(one)).state for one in ours} == {CANCELLED}
    assert (await stack.get(other)).state != CANCELLED


async def test_many_are_retried_once_and_who_can_not_is_named(stack: Stack) -> None:
    stack.runner.default = fails(review_pb2.FAILURE_REASON_REFUSED)
    ours = [await stack.ended(await stack.submit()) for _ in range(3)]
    await stack.sql("DELETE FROM review_content WHERE review_id = %s", last_of(ours[1].name))
    client = stack.client("acme").reviews
    request = review_pb2.RetryReviewsRequest(
        parent="tenants/acme",
        filter=Filter(failures=[review_pb2.FAILURE_REASON_REFUSED]),
        request_id=request_id(),
    )
    answer = await client.RetryReviews(request)
    assert list(answer.names) == [ours[0].name, ours[2].name]
    assert [(one.name, one.reason) for one in answer.refused] == [(ours[1].name, "WRONG_STATE")]
    for one in (ours[0], ours[2]):
        assert (await stack.ended(one)).attempts == 2
    # They have failed again; the same request is not carried out twice.
    await client.RetryReviews(request)
    assert (await stack.get(ours[0])).attempts == 2


# --- deleting


async def test_a_deleted_review_leaves_nothing(stack: Stack) -> None:
    stack.runner.default = held
    review = await stack.submit()
    await stack.until("SELECT 1 FROM provider_call")
    client = stack.client("acme").reviews
    request = review_pb2.DeleteReviewRequest(name=review.name, request_id=request_id())
    await client.DeleteReview(request)
    await client.DeleteReview(request)
    async with asyncio.timeout(60):
        await stack.runner.talks[0].cancelled.wait()
    for table in ("review", "review_content", "attempt", "provider_call", "chunk_done"):
        assert await stack.table(table) == [], table
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await stack.get(review)
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reviews_are_kept_as_long_as_is_said(stack: Stack) -> None:
    old, new = [await stack.ended(await stack.submit()) for _ in range(2)]
    late = "UPDATE review SET end_time = now() - interval '731 days' WHERE id = %s"
    await stack.sql(late, last_of(old.name))
    await stack.app.sweeper.retention()
    assert await listed(stack) == [new.name]


# --- calls whose answer was lost


async def test_a_lost_answer_is_asked_for_again_where_the_tenant_wants_it(stack: Stack) -> None:
    async def lost(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        raise RunnerGone

    await set_policy(stack, retry_ambiguous=True)
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_AMBIGUOUS, ambiguous_call=True), lost]
    async with stack.hurrying():
        review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts, review.ambiguous_calls) == (COMPLETED, 3, 2)
    assert review.calls_started == 3


# --- how far it is


async def test_a_watcher_reads_how_far_it_is(stack: Stack) -> None:
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        await talk.call("c1")
        await talk.result("c1", finding())
        await talk.call("c2", 2)
        await go.wait()
        await talk.result("c2")
        await talk.end()

    stack.runner.default = slow
    await stack.runner.tell(places=1)
    await stack.until_room(1)
    first = await stack.submit()
    await stack.until("SELECT 1 FROM provider_call WHERE call_number = 2")
    waiting = [await stack.submit() for _ in range(2)]
    calling = (await stack.get(first)).progress
    assert (calling.stage, calling.chunk) == (review_pb2.REVIEW_STAGE_CALLING, 2)
    for place, one in enumerate(waiting, 1):
        found = (await stack.get(one)).progress
        assert (found.stage, found.place) == (review_pb2.REVIEW_STAGE_QUEUED, place)
    go.set()
    for one in (first, *waiting):
        assert not (await stack.ended(one)).HasField("progress")


async def test_the_prompt_of_a_review_is_on_record(stack: Stack) -> None:
    review = await stack.ended(await stack.submit())
    assert review.prompt_version == "9"
    rows = await stack.sql("SELECT prompt_version FROM attempt")
    assert rows == [("9",)]
