"""Content of customers in the orchestrator: sealed at rest, opened with keys that keyvault has."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import content_pb2
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2

from services.orchestrator.custody import content
from tests.harness.orchestrator import Conversation, Stack, finding, request_id, running

COMPLETED = review_pb2.REVIEW_STATE_COMPLETED


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        yield started


def forget_keys(stack: Stack) -> None:
    """As a minute later, or after a restart."""
    stack.app._contents._known.clear()


async def get(stack: Stack, review: review_pb2.Review) -> review_pb2.Review:
    request = review_pb2.GetReviewRequest(name=review.name)
    return (await stack.client("acme").reviews.GetReview(request)).review


async def reason(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return error_info(refused.value).reason


async def refused_once(talk: Conversation) -> None:
    await talk.accept("c1", "c2")
    await talk.call("c1")
    await talk.result("c1", finding())
    await talk.end(review_pb2.FAILURE_REASON_REFUSED)


async def test_one_content_key_serves_many_reviews(stack: Stack) -> None:
    """A review costs no call of its own for its key."""
    reviews = [await stack.submit() for _ in range(5)]
    for review in reviews:
        assert (await stack.ended(review)).finding_count == 1
    assert len(stack.keyvault.asked(content_pb2.GetContentKeyRequest)) == 1


async def test_many_who_wait_ask_once(stack: Stack) -> None:
    forget_keys(stack)
    await asyncio.gather(*(stack.submit() for _ in range(8)))
    assert len(stack.keyvault.asked(content_pb2.GetContentKeyRequest)) == 1


async def test_tenants_have_keys_of_their_own(stack: Stack) -> None:
    await stack.tenant("other")
    stack.keyvault.add("other")
    await stack.submit("acme")
    await stack.submit("other")
    asked = {one.tenant for one in stack.keyvault.asked(content_pb2.GetContentKeyRequest)}
    assert asked == {"tenants/acme", "tenants/other"}


async def test_without_keyvault_nothing_is_stored(stack: Stack) -> None:
    """A submission that can't be sealed is refused, not stored in clear."""
    stack.keyvault.no_content_keys = True
    assert await reason(stack.submit()) == "DEPENDENCY_UNAVAILABLE"
    assert await stack.sql("SELECT * FROM review_content") == []
    assert await stack.sql("SELECT * FROM review") == []


async def test_keyvault_away_when_an_attempt_starts(stack: Stack) -> None:
    """The attempt is tried again later: nothing was sent. Findings survive keyvault's absence."""

    async def away_meanwhile(talk: Conversation) -> None:
        stack.keyvault.no_content_keys = True
        forget_keys(stack)
        await talk.accept("c1")
        await talk.call("c1")
        await talk.result("c1", finding())
        stack.keyvault.no_content_keys = False
        await talk.end()

    stack.runner.scripts = [away_meanwhile]
    await stack.until_room(16)
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    review = await stack.submit()
    stack.keyvault.no_content_keys = True
    forget_keys(stack)
    await stack.runner.tell(draining=False)
    waits = await stack.waiting(review, "KEYVAULT_UNAVAILABLE")
    assert waits.attempts == 1
    stack.keyvault.no_content_keys = False
    review = await stack.ended(review)
    assert (review.state, review.attempts, review.calls_started) == (COMPLETED, 1, 1)
    assert review.findings[0] == finding()


async def test_findings_of_an_ended_epoch(stack: Stack) -> None:
    """Shown to fail with ContentKeys._get never forgetting what it knows."""
    review = await stack.ended(await stack.submit())
    assert (await get(stack, review)).findings[0] == finding()
    stack.keyvault.content_keys.clear()
    forget_keys(stack)
    assert await reason(get(stack, review)) == "CONTENT_EXPIRED"
    listed = await stack.client("acme").reviews.ListReviews(
        review_pb2.ListReviewsRequest(parent="tenants/acme")
    )
    assert [one.name for one in listed.reviews] == [review.name]


async def test_known_keys_are_forgotten(stack: Stack, monkeypatch) -> None:
    """A destroyed key is used for KEY_SECONDS more at most, and so many keys are known at once."""
    now = [1000.0]
    monkeypatch.setattr(content.time, "monotonic", lambda: now[0])
    asked = []

    async def fetch(tenant: str, epoch: str) -> content_pb2.GetContentKeyResponse:
        asked.append(tenant)
        return content_pb2.GetContentKeyResponse(epoch="2026-11-23", key=bytes(32))

    keys = content.ContentKeys(fetch)
    await keys.current("acme")
    now[0] += content.KEY_SECONDS - 1
    await keys.current("acme")
    assert asked == ["acme"]
    now[0] += 2
    await keys.current("acme")
    assert asked == ["acme", "acme"]
    monkeypatch.setattr(content, "_KEYS", 4)
    for number in range(20):
        await keys.current(f"t{number}")
    assert len(keys._known) == 4


async def test_altered_content_is_said(stack: Stack) -> None:
    """Findings of another review, put there by SQL, do not open."""
    one = await stack.ended(await stack.submit())
    two = await stack.ended(await stack.submit())
    await stack.sql(
        "UPDATE chunk_done SET findings = (SELECT findings FROM chunk_done WHERE review_id = %s)",
        last_of(one.name),
    )
    assert (await get(stack, one)).findings[0] == finding()
    assert await reason(get(stack, two)) == "ROW_TAMPERED"


async def test_content_that_does_not_open_fails_its_review(stack: Stack) -> None:
    """A retry whose content key is gone ends at once, and says why."""
    stack.runner.scripts = [refused_once]
    review = await stack.ended(await stack.submit())
    assert review.findings[0] == finding()
    stack.keyvault.content_keys.clear()
    forget_keys(stack)
    again = review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
    await stack.client("acme").reviews.RetryReview(again)
    await stack.until("SELECT 1 FROM review WHERE state = 'FAILED' AND fence = 2")
    (failure,) = await stack.sql("SELECT failure, failure_message FROM review")
    assert failure[0] == "CONTENT_UNREADABLE"
    assert "Submit it again" in failure[1]
    assert len(stack.runner.talks) == 1


async def test_a_retry_goes_on_with_what_is_done(stack: Stack) -> None:
    """A day later it still has one epoch: that of its input."""

    async def rest(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        assert list(talk.proceed.done_chunk_ids) == ["c1"]
        await talk.call("c2")
        await talk.result("c2", finding(3))
        await talk.end()

    stack.runner.scripts = [refused_once, rest]
    review = await stack.ended(await stack.submit())
    stack.keyvault.epoch = "2026-11-24"
    forget_keys(stack)
    again = review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
    answer = await stack.client("acme").reviews.RetryReview(again)
    ended = await stack.ended(answer.review)
    assert ended.state == COMPLETED
    assert [one.start_line for one in ended.findings] == [2, 3]
