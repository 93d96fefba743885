"""37. fence: attempt A is paused past its lease, B runs, A resumes → A's writes change nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.orchestrator.store import attempts, endings
from services.orchestrator.work.dispatcher import ORPHANED_SECONDS
from services.orchestrator.work.execution import Execution
from tests.harness.orchestrator import (
    Conversation,
    Stack,
    finding,
    one_chunk,
    replica,
    request_id,
    running,
)

TABLES = ("review", "attempt", "provider_call", "chunk_done", "review_content")
SAYS = {
    "a call is about to be made": {
        "call_started": runner_pb2.CallStarted(chunk_id="c9", call_number=9)
    },
    "a chunk is done": {
        "chunk_result": runner_pb2.ChunkResult(chunk_id="c9", findings=[finding(3)], dropped=4)
    },
    "the attempt did its work": {"outcome": runner_pb2.Outcome()},
    "the attempt failed": {
        "outcome": runner_pb2.Outcome(
            failure=review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE,
            report={"process_id": 666, "open_time": {"seconds": 1}, "close_time": {"seconds": 2}},
        )
    },
}


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        yield started


async def everything(stack: Stack) -> dict[str, Any]:
    return {table: await stack.table(table) for table in TABLES}


class Pausable:
    """Attempt A: accepts, sleeps, and then says one thing more."""

    def __init__(self, *, calls: bool = False, **says: Any) -> None:
        self.accepted, self.resume, self.over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.acked = False
        self._calls = calls
        self._says = says

    async def __call__(self, talk: Conversation) -> None:
        await talk.accept("c9")
        if self._calls:
            await talk.call("c9")
        self.accepted.set()
        await self.resume.wait()
        sequence = await talk.say(**self._says)
        waits = [
            asyncio.create_task(talk.acked(sequence)),
            asyncio.create_task(talk.cancelled.wait()),
        ]
        try:
            done, _ = await asyncio.wait(waits, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            self.acked = waits[0] in done
            if "outcome" not in self._says:
                await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST)
        finally:
            for wait in waits:
                wait.cancel()
            self.over.set()


async def fenced_off(stack: Stack, paused: Pausable) -> None:
    """A sleeps so long that its attempt is given to another worker."""
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    (attempt,) = await stack.sql("SELECT id FROM attempt WHERE state = 'RUNNING'")
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '1 minute'")
    await stack.app.sweeper.fence_off(attempt[0])


@pytest.mark.parametrize("says", SAYS.values(), ids=SAYS.keys())
async def test_paused_attempt_changes_nothing_after_its_turn(stack: Stack, says) -> None:
    """Each case fails where its statement in services/orchestrator/store loses its guard.

    Shown by replacing "AND fence = :fence AND state = 'RUNNING'" with nothing, in turn in
    CALL_STARTED (first case fails), CHUNK_DONE (second), and END_REVIEW's update of the attempt
    (third and fourth).
    """
    paused = Pausable(**says)
    stack.runner.scripts = [paused, one_chunk]
    review = await stack.submit()
    await fenced_off(stack, paused)
    ended = await stack.ended(review)  # B
    assert (ended.state, ended.attempts) == (review_pb2.REVIEW_STATE_COMPLETED, 2)
    before = await everything(stack)
    paused.resume.set()
    async with asyncio.timeout(60):
        await paused.over.wait()
    await asyncio.sleep(0.2)
    assert await everything(stack) == before
    # The child may not make a call that nobody knows of.
    assert "outcome" in says or not paused.acked


async def test_call_under_way_is_not_repeated_when_its_worker_falls_silent(stack: Stack) -> None:
    """Shown by `unfinished_call` replaced with False in services/orchestrator/work/outcomes.py: the
    review is then RUNNING again, and its call is paid twice."""
    in_call = asyncio.Event()

    async def silent(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        in_call.set()
        await talk.cancelled.wait()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST)

    stack.runner.scripts = [silent]
    review = await stack.submit()
    async with asyncio.timeout(60):
        await in_call.wait()
    (attempt,) = await stack.sql("SELECT id FROM attempt")
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '1 minute'")
    await stack.app.sweeper.fence_off(attempt[0])
    ended = await stack.ended(review)
    assert ended.failure == review_pb2.FAILURE_REASON_AMBIGUOUS
    assert (ended.ambiguous_calls, ended.calls_started, ended.attempts) == (1, 1, 1)
    await stack.app.dispatcher.beat()  # tells the silent worker
    assert len(stack.runner.talks) == 1
    again = await stack.client("acme").reviews.RetryReview(
        review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
    )
    assert (await stack.ended(again.review)).calls_started == 2


async def test_call_that_begins_as_its_silent_worker_is_fenced_off_is_not_repeated(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stores a call after the sweeper has looked, and before it holds the attempt. Shown
    by a look for an open call in `_STALE` itself: the review is QUEUED, its call made again."""
    leased, go, in_call = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def silent(talk: Conversation) -> None:
        await talk.accept("c1")
        leased.set()
        await go.wait()
        await talk.call("c1")
        in_call.set()
        await talk.cancelled.wait()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST, ambiguous_call=True)

    # One pause, between the statement's snapshot and its lock.
    slow = endings._STALE.replace("FOR UPDATE", "AND (SELECT pg_sleep(1)) IS NOT NULL FOR UPDATE")
    monkeypatch.setattr(endings, "_STALE", slow)
    stack.runner.scripts = [silent]
    review = await stack.submit()
    async with asyncio.timeout(60):
        await leased.wait()
    await stack.app.background.end("heartbeat")
    ((attempt,),) = await stack.sql("SELECT id FROM attempt")
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '1 minute'")
    fencing = asyncio.create_task(stack.app.sweeper.fence_off(attempt))
    await stack.until("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    go.set()
    async with asyncio.timeout(60):
        await in_call.wait()
        assert not fencing.done()
        await fencing
    ended = await stack.ended(review)
    assert ended.failure == review_pb2.FAILURE_REASON_AMBIGUOUS
    assert (ended.ambiguous_calls, ended.calls_started, ended.attempts) == (1, 1, 1)


async def test_worker_that_lives_keeps_its_attempt(stack: Stack) -> None:
    """Shown by `heartbeat_time < ...` replaced with `true` in STALE: the attempt is fenced off;
    and in `_ORPHANED`: it is taken over."""
    paused = Pausable(calls=True, **SAYS["the attempt did its work"])
    stack.runner.scripts = [paused]
    await stack.submit()
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '1 minute'")
    await stack.app.dispatcher.beat()
    (attempt,) = await stack.sql("SELECT id FROM attempt")
    await stack.app.sweeper.fence_off(attempt[0])
    assert await stack.app.picks.take_over(ORPHANED_SECONDS, 1) == []
    assert await stack.sql("SELECT state, fence, turn FROM attempt") == [("RUNNING", 1, 0)]


async def taken_over(stack: Stack, paused: Pausable) -> None:
    """A sleeps in a call so long that another replica goes on with its attempt, to its end."""
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    async with replica(stack) as other, asyncio.timeout(60):
        while not await stack.sql("SELECT 1 FROM attempt WHERE turn > 0"):
            # Again where A's beat came in between.
            await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '13 seconds'")
            await other.dispatcher.take_over()
        await stack.until("SELECT 1 FROM review WHERE end_time IS NOT NULL")


@pytest.mark.parametrize("says", SAYS.values(), ids=SAYS.keys())
async def test_open_call_is_taken_over_and_its_first_worker_fenced(stack: Stack, says) -> None:
    """Shown to fail with `AND turn = ...` removed, in turn in CALL_STARTED (first case), CHUNK_DONE
    (second) and the end of an attempt (third and fourth); and, all, where `handle` takes nothing
    over: the review is never ended."""
    paused = Pausable(calls=True, **says)
    goes_on = asyncio.Event()

    async def second(talk: Conversation) -> None:
        goes_on.set()
        paused.resume.set()
        await talk.result("c9", finding(2))
        async with asyncio.timeout(60):
            await paused.over.wait()  # while the attempt still runs
        await talk.call("c10", 2)
        await talk.result("c10")
        await talk.end()

    stack.runner.scripts, stack.runner.resumed = [paused], [second]
    review = await stack.submit()
    await taken_over(stack, paused)
    ended = await stack.ended(review)
    assert goes_on.is_set()
    assert (ended.state, ended.attempts) == (review_pb2.REVIEW_STATE_COMPLETED, 1)
    assert (ended.calls_started, ended.ambiguous_calls, ended.dropped_findings) == (2, 0, 0)
    assert [one.start_line for one in ended.findings] == [2]
    assert "outcome" in says or not paused.acked
    ((lease, process),) = await stack.sql("SELECT lease_id, process_id FROM attempt")
    assert (lease.startswith("lea_"), process) == (True, 4711)


async def test_repeated_word_of_a_call_is_not_another_call(stack: Stack) -> None:
    """The first worker stored the call, and died before it said so. Shown to fail (calls_started
    2) with `calls_made` ignored."""
    paused = Pausable(calls=True, **SAYS["the attempt did its work"])

    async def says_it_again(talk: Conversation) -> None:
        await talk.say(accepted=runner_pb2.Accepted(process_id=4711))
        await talk.call("c1")
        await talk.result("c1", finding())
        await talk.end()

    stack.runner.scripts, stack.runner.resumed = [paused], [says_it_again]
    review = await stack.submit()
    await taken_over(stack, paused)
    ended = await stack.ended(review)
    assert (ended.state, ended.calls_started) == (review_pb2.REVIEW_STATE_COMPLETED, 1)


async def test_open_call_is_not_repeated_where_keyvault_is_away_too(stack: Stack) -> None:
    """What was paid for can't be stored. Shown to fail (a second call, none of them ambiguous)
    where `_opened` does not look at the turn."""
    paused = Pausable(calls=True, **SAYS["the attempt did its work"])
    stack.runner.scripts = [paused]
    review = await stack.submit()
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    stack.keyvault.no_content_keys = True
    await taken_over(stack, paused)
    ended = await stack.ended(review)
    assert ended.failure == review_pb2.FAILURE_REASON_AMBIGUOUS
    assert (ended.ambiguous_calls, ended.calls_started, ended.attempts) == (1, 1, 1)


async def test_chunk_that_is_being_stored_is_no_open_call(stack: Stack) -> None:
    """A take-over that waits for that row looks again. Shown to fail where CHUNK_DONE only locks
    the attempt: the review fails, since its chunk seems to be missing."""
    paused = Pausable(calls=True, **SAYS["the attempt did its work"])
    stack.runner.scripts = [paused]
    await stack.submit()
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    ((attempt,),) = await stack.sql("SELECT id FROM attempt")
    held = {"id": attempt, "fence": 1, "turn": 0}
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '13 seconds'")
    async with await psycopg.AsyncConnection.connect(stack.database_url) as connection:
        stored = {**held, "chunk_id": "c9", "dropped": 0, "finding_count": 0, "findings": None}
        await connection.execute(attempts.CHUNK_DONE, stored)
        # It does not wait for that row, and takes it for open no more once it is stored.
        assert await stack.app.picks.take_over(ORPHANED_SECONDS, 1) == []
    assert await stack.app.picks.take_over(ORPHANED_SECONDS, 1) == []


async def test_worker_that_wakes_leaves_its_successors_child_alone(stack: Stack) -> None:
    """It wakes before the successor has found the runner: it neither cancels nor acknowledges.
    Shown to fail where `taken_over` says False."""
    paused = Pausable(calls=True, **SAYS["a chunk is done"])
    cancelled = asyncio.Event()

    async def watched(talk: Conversation) -> None:
        await paused(talk)
        if talk.cancelled.is_set():
            cancelled.set()

    stack.runner.scripts = [watched]
    await stack.submit()
    async with asyncio.timeout(60):
        await paused.accepted.wait()
    await stack.sql("UPDATE attempt SET turn = 1")
    paused.resume.set()
    async with asyncio.timeout(60):
        while stack.app.dispatcher._running:
            await asyncio.sleep(0.02)
    assert not cancelled.is_set()
    assert not paused.acked
    assert await stack.sql("SELECT state, turn FROM attempt") == [("RUNNING", 1)]


async def test_orphan_whose_runner_is_gone_too_is_ambiguous(stack: Stack) -> None:
    """Nobody knows the answer: the call is not repeated."""
    paused = Pausable(calls=True, **SAYS["the attempt did its work"])
    stack.runner.scripts = [paused]
    review = await stack.submit()
    await taken_over(stack, paused)
    ended = await stack.ended(review)
    assert ended.failure == review_pb2.FAILURE_REASON_AMBIGUOUS
    assert (ended.ambiguous_calls, ended.calls_started, ended.attempts) == (1, 1, 1)


async def test_an_attempt_that_has_ended_can_be_told_to_stop(stack: Stack) -> None:
    """The heartbeat tells it where its end was stored between a beat's question and its answer; it
    must not die of that, or every review over 32 s is fenced off. Shown by `_deadline` left as it
    is at the end of `_limited`: RuntimeError."""
    ended: list[Execution] = []
    until_outcome = Execution._until_outcome

    async def kept(self: Execution) -> int | None:
        sequence = await until_outcome(self)
        ended.append(self)
        return sequence

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "_until_outcome", kept)
        await stack.ended(await stack.submit())
    await ended[0].stop()
    assert stack.app.background.down() == []
