"""One attempt over RunnerService.Execute: what is stored before it is acknowledged, and its end.

`conversation` has the order. A stream that breaks while a provider call is open is taken up again,
by this worker or, where it died, by another: the runner keeps what was not acknowledged, and an
answer that somebody paid for is not given up for a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import grpc
from byokeep import names
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.errors import error_info
from byokeep.orchestrator.v1.review_pb2 import Finding
from byokeep.runner.v1 import runner_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.common import logs
from services.orchestrator.custody.grants import PURPOSES, Subject
from services.orchestrator.policy import failures
from services.orchestrator.policy.failures import Failure
from services.orchestrator.policy.states import Reason
from services.orchestrator.store.attempts import (
    AnyAttempt,
    Attempt,
    DailyLimit,
    Fenced,
    ReviewAttempt,
    Trail,
)
from services.orchestrator.work.conversation import (
    Conversation,
    Frame,
    OutOfTurn,
    State,
    Transitions,
)
from services.orchestrator.work.fleet import Fleet, Place, Runner, Stream

log = logging.getLogger(__name__)
_GRACE_SECONDS: Final = 30.0
_LAST_WORD_SECONDS: Final = 10.0
# Well below the 30 s for which a runner keeps what nobody took.
_REATTACH_SECONDS: Final = 10.0
_REATTACH_PAUSE_SECONDS: Final = 0.25
# A broken connection, or a runner that went away.
_LOST: Final = grpc.StatusCode.UNAVAILABLE


class Journal(Protocol):
    """Where an attempt's calls and results are stored; each method raises Fenced."""

    async def call_started(
        self, attempt: Attempt, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made. Raises DailyLimit where it may not be."""

    async def taken_over(self, attempt: Attempt) -> bool:
        """Say whether the attempt runs on under another worker."""

    async def chunk_split(self, attempt: ReviewAttempt, chunks_total: int) -> None:
        """Store that a chunk became several, and that its call is answered."""

    async def chunk_done(
        self, attempt: ReviewAttempt, chunk_id: str, findings: Sequence[Finding], dropped: int
    ) -> None:
        """Store a chunk's findings."""


@dataclass(frozen=True, slots=True)
class Means:
    """What each attempt is run with: `sign` signs a grant for a public key."""

    journal: Journal
    fleet: Fleet
    sign: Callable[[Subject, bytes], SignedEnvelope]


R = TypeVar("R")


class Execution(ABC, Generic[R]):
    """Runs one claimed attempt on a runner; `R` is what it comes to."""

    _transitions: ClassVar[Transitions]

    def __init__(
        self,
        attempt: AnyAttempt,
        means: Means,
        place: Place | None,
        seconds: int,
    ) -> None:
        """`place` is where it runs, None where it runs already, or nowhere; `seconds` is the most
        that it may take."""
        self._attempt = attempt
        self._journal = means.journal
        self._fleet = means.fleet
        self._sign = means.sign
        self._seconds = seconds
        #: Bytes so far of the answer to the open call.
        self.answer_bytes = 0
        self._place = place
        self._talk = Conversation(self._transitions, resumed=attempt.turn > 0)
        self._stream: Stream | None = None
        self._deadline: asyncio.Timeout | None = None
        self._writing = asyncio.Lock()
        # Whether a call may have been made whose answer is not stored.
        self._call_open = attempt.turn > 0
        self._acked = 0
        self._trail = Trail()
        self._failure: Failure | None = None
        self._refused: Failure | None = None

    @abstractmethod
    def _assignment(self) -> runner_pb2.Assign:
        """Return what the runner is told to do."""

    @abstractmethod
    def _subject(self) -> Subject:
        """Return what the grant is for."""

    @abstractmethod
    async def _act(self, frame: Frame, response: runner_pb2.ExecuteResponse) -> None:
        """Act on what is said of an attempt of this kind alone. Raises Fenced, DailyLimit."""

    @abstractmethod
    def _concluded(self) -> R:
        """Return what it came to."""

    @abstractmethod
    def broken(self) -> R:
        """Return the end of an attempt that our own defect ended."""

    async def run(self, finish: Callable[[R], Awaitable[None]]) -> None:
        """Run the attempt; `finish` stores its end before the runner may forget it.

        Raises Fenced where another worker has it now: the runner keeps what that one asks for.
        """
        try:
            outcome = await self._until_outcome()
            await finish(self._concluded())
            if outcome is not None:
                await self._goodbye(outcome)
        finally:
            self._hang_up()

    async def stop(self) -> None:
        """Have the child killed: the attempt is not ours any more."""
        self._talk.stop()
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + _LAST_WORD_SECONDS)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._say(cancel=runner_pb2.Cancel())

    async def _until_outcome(self) -> int | None:
        """Converse; return the outcome's sequence number, or None where none came."""
        try:
            async with self._limited():
                sequence, code = None, _LOST
                if self._attempt.turn == 0:
                    sequence, code = await self._begin()
                if sequence is None and self._call_open and code is _LOST:
                    sequence, code = await self._take_up()
                if sequence is not None:
                    return sequence
            self._failure = self._cut(code)
        except TimeoutError:
            self._failure = self._cut(_LOST)
        except OutOfTurn as error:
            self._failure = Failure(Reason.INTERNAL, ambiguous=self._call_open)
            self._tell("out_of_turn", level=logging.ERROR, said=str(error))
            await self.stop()
        return None

    async def _begin(self) -> tuple[int | None, grpc.StatusCode]:
        if self._place is None:
            return None, grpc.StatusCode.RESOURCE_EXHAUSTED
        runner = self._place.runner
        self._trail = replace(self._trail, runner_id=runner.id)
        return await self._converse(runner, assign=self._assignment())

    async def _converse(self, runner: Runner, **first: Any) -> tuple[int | None, grpc.StatusCode]:
        """Open a stream and listen to its end; return the outcome's number, or why none came."""
        self._hang_up()
        stream = self._stream = runner.execute(self._seconds + _GRACE_SECONDS)
        try:
            await self._say(**first)
            async for response in stream:
                await self._hear(response)
                if self._talk.state is State.ENDED:
                    return int(response.sequence), grpc.StatusCode.OK
        except grpc.RpcError as error:
            info = error_info(error)
            late = info.code is grpc.StatusCode.DEADLINE_EXCEEDED
            return None, _LOST if info.unanswered and not late else info.code
        except asyncio.InvalidStateError:
            return None, _LOST
        return None, grpc.StatusCode.OK

    async def _take_up(self) -> tuple[int | None, grpc.StatusCode]:
        """Reattach where the attempt runs, until that runner is heard again, or for too long."""
        attempt = self._attempt
        runner_id = self._trail.runner_id or attempt.runner_id
        self._tell("stream_lost", level=logging.WARNING, turn=attempt.turn)
        end = asyncio.get_running_loop().time() + _REATTACH_SECONDS
        code = _LOST
        while code is _LOST and not self._talk.stopped and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_REATTACH_PAUSE_SECONDS)
            runner = self._fleet.find(runner_id)
            if runner is None:
                continue
            reattach = runner_pb2.Reattach(
                attempt_id=attempt.attempt_id, fence=attempt.fence, acked_sequence=self._acked
            )
            sequence, code = await self._converse(runner, reattach=reattach)
            if sequence is not None:
                return sequence, code
        return None, code

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    @asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None) as self._deadline:
                yield
        finally:
            self._deadline = None  # over: nothing is left to be hurried

    async def _hear(self, response: runner_pb2.ExecuteResponse) -> None:
        """Act on what the runner says. Raises OutOfTurn, Fenced."""
        match self._talk.hear(response.WhichOneof("message") or ""):
            case Frame.OUTCOME:
                self._outcome(response.outcome)
            case Frame.LEASED:
                self._trail = replace(self._trail, lease_id=response.leased.lease_id)
            case Frame.CALL_PROGRESS | Frame.VALIDATION_RESULT as frame:
                await self._act(frame, response)
            case _ if self._talk.stopped:
                pass
            case Frame.ACCEPTED:
                await self._accepted(response.accepted)
            case frame:
                await self._store(frame, response)

    async def _store(self, frame: Frame, response: runner_pb2.ExecuteResponse) -> None:
        try:
            if frame is Frame.CALL_STARTED:
                self._call_open = True
            await self._act(frame, response)
            self._acked = response.sequence
            await self._say(ack=runner_pb2.Ack(sequence=response.sequence))
        except Fenced:
            if await self._journal.taken_over(self._attempt):
                raise  # the child is another worker's now: not ours to kill
            await self.stop()
        except DailyLimit:
            self._refused = Failure(Reason.DAILY_LIMIT)
            await self.stop()

    async def _accepted(self, accepted: runner_pb2.Accepted) -> None:
        if self._place is not None:
            self._place.accepted()
        self._trail = replace(
            self._trail,
            process_id=accepted.process_id,
            prompt_version=accepted.prompt_version,
        )
        if self._talk.state is State.RESUMED:
            return  # there is a call, so the worker before this one has said "proceed"
        grant = self._sign(self._subject(), accepted.public_key)
        await self._say(proceed=runner_pb2.Proceed(grant=grant, done_chunk_ids=self._done_chunks()))

    def _done_chunks(self) -> Sequence[str]:
        return ()

    def _outcome(self, outcome: runner_pb2.Outcome) -> None:
        report = outcome.report
        self._trail = replace(
            self._trail,
            process_id=report.process_id or self._trail.process_id,
            open_time=_datetime(report.open_time),
            close_time=_datetime(report.close_time),
        )
        reason = failures.reason_of(outcome.failure)
        if reason is not None:
            self._failure = Failure(
                reason,
                retry_after_seconds=outcome.retry_after_ms / 1000,
                ambiguous=outcome.ambiguous_call,
                cause=failures.cause_of(outcome.unreachable_cause),
            )

    def _cut(self, code: grpc.StatusCode) -> Failure:
        """What a stream that ended without an outcome means."""
        self._tell("stream_cut", code=code.name, call=self._call_open)
        return failures.of_stream(code, call_open=self._call_open)

    async def _goodbye(self, sequence: int) -> None:
        # The end is stored; should this get lost, the runner forgets by itself later.
        stream = self._stream
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._say(ack=runner_pb2.Ack(sequence=sequence))
                if stream is not None:
                    await stream.done_writing()
                    await stream.code()

    async def _say(self, **message: Any) -> None:
        # gRPC takes one write at a time, and a cancellation may come in between.
        async with self._writing:
            if self._stream is not None:
                await self._stream.write(runner_pb2.ExecuteRequest(**message))

    def _tell(self, event: str, **values: Any) -> None:
        logs.event(log, event, attempt=self._attempt.attempt_id, **values)

    def _assigned(self, **values: Any) -> runner_pb2.Assign:
        attempt = self._attempt
        return runner_pb2.Assign(
            attempt_id=attempt.attempt_id,
            fence=attempt.fence,
            purpose=PURPOSES[attempt.kind],
            provider=names.provider_value(attempt.provider),
            timeout_seconds=self._seconds,
            **values,
        )

    def _granted(self, review_id: str = "") -> Subject:
        attempt = self._attempt
        return Subject(
            tenant=attempt.tenant,
            owner=attempt.owner,
            actor=attempt.actor,
            provider=names.provider_value(attempt.provider),
            key_id=attempt.key_id,
            key_version=attempt.key_version,
            review_id=review_id,
            attempt_id=attempt.attempt_id,
            fence=attempt.fence,
            purpose=PURPOSES[attempt.kind],
        )


def _datetime(stamp: Timestamp) -> datetime | None:
    return stamp.ToDatetime(UTC) if stamp.seconds else None
