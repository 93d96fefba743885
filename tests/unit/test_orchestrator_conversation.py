"""Every frame that a runner may say, in every state of the conversation about an attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.orchestrator.v1 import key_pb2
from byokeep.runner.v1 import runner_pb2

from services.orchestrator.policy.states import AttemptKind, Reason
from services.orchestrator.store.attempts import AnyAttempt, KeyAttempt, ReviewAttempt
from services.orchestrator.work.conversation import Frame, OutOfTurn, State
from services.orchestrator.work.execution import Execution, Means
from services.orchestrator.work.executions import KeyExecution, ReviewExecution

_ANY = {
    "attempt_id": "att_" + "0" * 26,
    "tenant": "acme",
    "key_id": "key_1",
    "key_version": 1,
    "fence": 1,
    "tries": 1,
    "runner_id": "run_1",
    "provider": "openai",
    "owner": "",
    "actor": "spiffe://x/ci",
}
REVIEW, KEY = "review", "key"

SAID: dict[Frame, runner_pb2.ExecuteResponse] = {
    frame: runner_pb2.ExecuteResponse(sequence=number, **{frame: message})
    for number, (frame, message) in enumerate(
        {
            Frame.ACCEPTED: runner_pb2.Accepted(chunks=[{"chunk_id": "c1"}, {"chunk_id": "c2"}]),
            Frame.LEASED: runner_pb2.Leased(lease_id="lea_1"),
            Frame.CALL_STARTED: runner_pb2.CallStarted(chunk_id="c1", call_number=9),
            Frame.CALL_PROGRESS: runner_pb2.CallProgress(chunk_id="c1", answer_bytes=5),
            Frame.CHUNK_RESULT: runner_pb2.ChunkResult(chunk_id="c1"),
            Frame.CHUNK_SPLIT: runner_pb2.ChunkSplit(chunk_id="c1", into=[{"chunk_id": "c3"}]),
            Frame.VALIDATION_RESULT: runner_pb2.ValidationResult(
                verdict=key_pb2.VALIDATION_VERDICT_VALID
            ),
            Frame.OUTCOME: runner_pb2.Outcome(),
        }.items(),
        start=1,
    )
}
# What leads to each state, and what may be said there: the whole agreement, once more.
PATHS: dict[tuple[str, State], list[Frame]] = {
    (REVIEW, State.ASSIGNED): [],
    (REVIEW, State.GRANTED): [Frame.ACCEPTED],
    (REVIEW, State.LEASED): [Frame.ACCEPTED, Frame.LEASED],
    (REVIEW, State.CALLING): [Frame.ACCEPTED, Frame.LEASED, Frame.CALL_STARTED],
    (REVIEW, State.RESUMED): [],
    (KEY, State.ASSIGNED): [],
    (KEY, State.GRANTED): [Frame.ACCEPTED],
    (KEY, State.LEASED): [Frame.ACCEPTED, Frame.LEASED],
    (KEY, State.CALLING): [Frame.ACCEPTED, Frame.LEASED, Frame.CALL_STARTED],
    (KEY, State.JUDGED): [
        Frame.ACCEPTED,
        Frame.LEASED,
        Frame.CALL_STARTED,
        Frame.VALIDATION_RESULT,
    ],
}
MAY: dict[tuple[str, State], str] = {
    (REVIEW, State.ASSIGNED): "accepted",
    (REVIEW, State.GRANTED): "leased",
    (REVIEW, State.LEASED): "call_started chunk_split call_progress",
    (REVIEW, State.CALLING): "call_progress chunk_result chunk_split",
    (REVIEW, State.RESUMED): "accepted leased call_started call_progress chunk_result chunk_split",
    (KEY, State.ASSIGNED): "accepted",
    (KEY, State.GRANTED): "leased",
    (KEY, State.LEASED): "call_started",
    (KEY, State.CALLING): "validation_result",
    (KEY, State.JUDGED): "validation_result",
}


class Journal:
    """Notes what is stored."""

    def __init__(self) -> None:
        self.stored: list[str] = []

    async def taken_over(self, attempt: Any) -> bool:
        return False

    async def call_started(self, attempt: Any, trail: Any, **values: Any) -> None:
        self.stored.append("call_started")

    async def chunk_done(self, *values: Any) -> None:
        self.stored.append("chunk_result")

    async def chunk_split(self, *values: Any) -> None:
        self.stored.append("chunk_split")


class Runner:
    """Says some frames on its one stream, then waits until it is hung up."""

    id = "run_1"

    def __init__(self, frames: list[Frame]) -> None:
        self.heard: list[str] = []
        self._frames = frames
        self._over = asyncio.Event()
        self.silent = asyncio.Event()

    def execute(self, timeout: float) -> Runner:
        return self

    async def write(self, request: runner_pb2.ExecuteRequest) -> None:
        self.heard.append(request.WhichOneof("message") or "")

    async def done_writing(self) -> None:
        pass

    async def code(self) -> None:
        pass

    def cancel(self) -> None:
        self._over.set()

    async def __aiter__(self) -> AsyncIterator[runner_pb2.ExecuteResponse]:
        for frame in self._frames:
            yield SAID[frame]
        self.silent.set()
        await self._over.wait()

    # As the place on it, and the fleet.

    @property
    def runner(self) -> Runner:
        return self

    def accepted(self) -> None:
        pass

    def find(self, runner_id: str) -> Runner:
        return self


def attempt_of(kind: str, state: State) -> AnyAttempt:
    if kind == KEY:
        return KeyAttempt(
            **_ANY,
            turn=0,
            kind=AttemptKind.VALIDATION,
            validations=0,
            validation_hours=0.0,
            destroy_previous=False,
            reviews_wait=False,
        )
    return ReviewAttempt(
        **_ANY,
        turn=int(state is State.RESUMED),
        review_id="rev_1",
        wait_reason="",
        waited_seconds=0.0,
        calls_made=1,
        chunks_total=2,
        model="m",
        plan_model="",
        fallback_models=[],
        input=b"",
        done_chunks=[],
        calls_left=5,
        trace_parent="",
        retry_ambiguous=False,
    )


def made(kind: str, state: State, frames: list[Frame]) -> tuple[Execution[Any], Runner, Journal]:
    runner, journal = Runner(frames), Journal()
    means = Means(journal, runner, lambda subject, key: SignedEnvelope(payload=b"g"))  # type: ignore[arg-type]
    attempt = attempt_of(kind, state)
    execution = ReviewExecution if kind == REVIEW else KeyExecution
    return execution(attempt, means, runner, 60), runner, journal  # type: ignore[arg-type]


def test_each_state_and_frame_has_its_say() -> None:
    for kind, transitions in ((REVIEW, ReviewExecution), (KEY, KeyExecution)):
        states = {state for of, state in PATHS if of == kind} | {State.STOPPING}
        assert set(transitions._transitions) == states
    assert set(Frame) == {
        field.name for field in runner_pb2.ExecuteResponse.DESCRIPTOR.oneofs[0].fields
    }


@pytest.mark.parametrize("frame", Frame)
@pytest.mark.parametrize(("kind", "state"), PATHS)
async def test_a_frame_is_taken_in_its_turn_or_ends_the_attempt(
    kind: str, state: State, frame: Frame
) -> None:
    """Out of turn: the child is killed, nothing of it is stored, and an open call is named as one
    whose answer may have been paid for. Shown to fail where any transition is added."""
    said = [*PATHS[kind, state], frame]
    execution, runner, journal = made(kind, state, said)
    results: list[Any] = []

    async def finish(result: Any) -> None:
        results.append(result)

    task = asyncio.create_task(execution.run(finish))
    silent = asyncio.create_task(runner.silent.wait())
    async with asyncio.timeout(60):
        await asyncio.wait({task, silent}, return_when=asyncio.FIRST_COMPLETED)
        silent.cancel()
        if frame is Frame.OUTCOME:
            await task
            assert (execution._talk.state, len(results)) == (State.ENDED, 1)
            return
        if frame in MAY[kind, state].split():
            assert not results, "it goes on"
            told = {Frame.CALL_STARTED, Frame.CHUNK_RESULT, Frame.CHUNK_SPLIT} & set(said)
            assert runner.heard.count("ack") == len(told)
            task.cancel()
            await asyncio.wait({task})
            return
        await task
    (result,) = results
    assert result.failure is not None
    assert result.failure.reason is Reason.INTERNAL
    assert result.failure.ambiguous is (state in (State.CALLING, State.JUDGED, State.RESUMED))
    assert runner.heard[-1] == "cancel"
    assert frame not in journal.stored[len(PATHS[kind, state]) :]


@pytest.mark.parametrize("frame", Frame)
@pytest.mark.parametrize("kind", [REVIEW, KEY])
async def test_what_comes_after_cancel_is_not_stored(kind: str, frame: Frame) -> None:
    execution, runner, journal = made(kind, State.ASSIGNED, [frame])
    await execution.stop()
    results: list[Any] = []

    async def finish(result: Any) -> None:
        results.append(result)

    task = asyncio.create_task(execution.run(finish))
    async with asyncio.timeout(60):
        if frame is Frame.OUTCOME:
            await task
        else:
            await runner.silent.wait()
    assert journal.stored == []
    assert bool(results) is (frame is Frame.OUTCOME)
    assert "proceed" not in runner.heard
    task.cancel()
    await asyncio.wait({task})


async def test_nothing_is_heard_of_what_has_ended() -> None:
    for kind in (REVIEW, KEY):
        execution, _, _ = made(kind, State.ASSIGNED, [])
        execution._talk.hear("outcome")
        for name in (*Frame, "", "news_of_a_later_release"):
            with pytest.raises(OutOfTurn):
                execution._talk.hear(name)
