"""One attempt over RunnerService.Execute: what is said, what is stored before it is acknowledged.

Assign → Accepted → Proceed → (CallStarted → Ack → ChunkResult → Ack)* → Outcome → Ack.

A stream that breaks while a provider call is open is taken up again, by this worker or, where it
died, by another: the runner keeps what was not acknowledged, and an answer that somebody paid for
is not given up for a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import grpc
from byokeep import names
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.errors import error_info
from byokeep.keyvault.v1 import grant_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.common import logs
from services.common.models import listed
from services.orchestrator.custody.grants import Subject
from services.orchestrator.policy import bounds, failures
from services.orchestrator.policy.failures import Failure
from services.orchestrator.store.attempts import DailyLimit, Fenced, Trail, Work
from services.orchestrator.work.fleet import Fleet, Place, Runner, Stream

log = logging.getLogger(__name__)
_GRACE_SECONDS: Final = 30.0
_LAST_WORD_SECONDS: Final = 10.0
_VALIDATION_CALLS: Final = 1
# Well below the 30 s for which a runner keeps what nobody took.
_REATTACH_SECONDS: Final = 10.0
_REATTACH_PAUSE_SECONDS: Final = 0.25
# A broken connection, or a runner that went away.
_LOST: Final = grpc.StatusCode.UNAVAILABLE


#: What a lease is for, by the kind of an attempt.
PURPOSES: Final = {
    "REVIEW": grant_pb2.LEASE_PURPOSE_REVIEW,
    "VALIDATION": grant_pb2.LEASE_PURPOSE_VALIDATION,
    # Whether an ACTIVE version is still taken.
    "CHECK": grant_pb2.LEASE_PURPOSE_VALIDATION,
}


class Journal(Protocol):
    """Where an attempt's calls and results are stored; each method raises Fenced."""

    async def call_started(
        self, work: Work, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made. Raises DailyLimit where it may not be."""

    async def taken_over(self, work: Work) -> bool:
        """Say whether the attempt runs on under another worker."""

    async def chunk_split(self, work: Work, chunks_total: int) -> None:
        """Store that a chunk became several, and that its call is answered."""

    async def chunk_done(
        self, work: Work, chunk_id: str, findings: Sequence[review_pb2.Finding], dropped: int
    ) -> None:
        """Store a chunk's findings."""


@dataclass(frozen=True, slots=True)
class Result:
    """How an attempt ended; `failure` None: it did its work.

    `spare_calls`: calls that are left beyond those that the chunks which are left need; below 0:
    too few. `refused_call`: the provider answered the last call, and with the failure.
    """

    failure: Failure | None = None
    trail: Trail = Trail()
    verdict: str = "UNSPECIFIED"
    cause: str = ""
    models: Sequence[str] = ()
    spare_calls: int = 0
    refused_call: bool = False


class Execution:
    """Runs one claimed attempt on a runner."""

    def __init__(
        self,
        work: Work,
        journal: Journal,
        fleet: Fleet,
        place: Place | None,
        sign: Callable[[Subject, bytes], SignedEnvelope],
        seconds: int,
    ) -> None:
        """`place` is where it runs, None where it runs already, or nowhere; `seconds` is the most
        that it may take."""
        self._work = work
        self._journal = journal
        self._fleet = fleet
        self._sign = sign
        self._seconds = seconds
        #: Bytes so far of the answer to the open call.
        self.answer_bytes = 0
        self._place = place
        self._stream: Stream | None = None
        self._deadline: asyncio.Timeout | None = None
        self._writing = asyncio.Lock()
        self._lost = False
        self._refused: Failure | None = None
        self._call_open = work.turn > 0
        self._acked = 0
        self._calls = 0
        self._planned: list[str] = []
        self._done = set(work.done_chunks)
        self._result = Result()

    async def run(self, finish: Callable[[Result], Awaitable[None]]) -> None:
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

    def broken(self) -> Result:
        """Return the end of an attempt that our own defect ended."""
        failure = Failure("INTERNAL", ambiguous=self._call_open)
        return replace(self._result, failure=failure)

    async def stop(self, *, key_revoked: bool = False) -> None:
        """Have the child killed: the attempt is not ours any more."""
        self._lost = True
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + _LAST_WORD_SECONDS)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._say(cancel=runner_pb2.Cancel(key_revoked=key_revoked))

    async def _until_outcome(self) -> int | None:
        """Converse; return the outcome's sequence number, or None where none came."""
        try:
            async with self._limited():
                sequence, code = None, _LOST
                if self._work.turn == 0:
                    sequence, code = await self._begin()
                if sequence is None and self._call_open and code is _LOST and not self._lost:
                    sequence, code = await self._take_up()
                if sequence is not None:
                    return sequence
            failure = self._cut(code)
        except TimeoutError:
            failure = self._cut(_LOST)
        self._result = replace(self._result, failure=failure)
        return None

    async def _begin(self) -> tuple[int | None, grpc.StatusCode]:
        if self._place is None:
            return None, grpc.StatusCode.RESOURCE_EXHAUSTED
        runner = self._place.runner
        self._trail(runner_id=runner.id)
        return await self._converse(runner, assign=self._assignment())

    async def _converse(self, runner: Runner, **first: Any) -> tuple[int | None, grpc.StatusCode]:
        """Open a stream and listen to its end; return the outcome's number, or why none came."""
        self._hang_up()
        stream = self._stream = runner.execute(self._seconds + _GRACE_SECONDS)
        try:
            await self._say(**first)
            async for response in stream:
                if await self._hear(response):
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
        work = self._work
        runner_id = self._result.trail.runner_id or work.runner_id
        logs.event(
            log, "stream_lost", level=logging.WARNING, attempt=work.attempt_id, turn=work.turn
        )
        end = asyncio.get_running_loop().time() + _REATTACH_SECONDS
        code = _LOST
        while code is _LOST and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_REATTACH_PAUSE_SECONDS)
            runner = self._fleet.find(runner_id)
            if runner is None:
                continue
            reattach = runner_pb2.Reattach(
                attempt_id=work.attempt_id, fence=work.fence, acked_sequence=self._acked
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

    async def _hear(self, response: runner_pb2.ExecuteResponse) -> bool:
        """Act on a response; True for the outcome."""
        match response.WhichOneof("message"):
            case "outcome":
                self._outcome(response.outcome)
                return True
            case "accepted" if not self._lost:
                await self._accepted(response.accepted)
            case "leased":
                self._trail(lease_id=response.leased.lease_id)
            case "validation_result":
                self._validation(response.validation_result)
            case "call_progress":
                self.answer_bytes = response.call_progress.answer_bytes
            case "call_started" | "chunk_result" | "chunk_split" if not self._lost:
                try:
                    await self._store(response)
                    self._acked = response.sequence
                    await self._say(ack=runner_pb2.Ack(sequence=response.sequence))
                except Fenced:
                    if await self._journal.taken_over(self._work):
                        raise  # the child is another worker's now: not ours to kill
                    await self.stop()
                except DailyLimit:
                    self._refused = Failure("DAILY_LIMIT")
                    await self.stop()
        return False

    async def _store(self, response: runner_pb2.ExecuteResponse) -> None:
        match response.WhichOneof("message"):
            case "call_started":
                await self._call_started(response.call_started)
            case "chunk_split":
                await self._chunk_split(response.chunk_split)
            case _:
                await self._chunk_result(response.chunk_result)

    async def _accepted(self, accepted: runner_pb2.Accepted) -> None:
        if self._place is not None:
            self._place.accepted()
        self._trail(process_id=accepted.process_id, prompt_version=accepted.prompt_version)
        self._planned = [chunk.chunk_id for chunk in accepted.chunks]
        if self._work.turn:
            return  # there is a call, so the worker before this one has said "proceed"
        grant = self._sign(self._subject(), accepted.public_key)
        # Also what the plan does not name: parts of a chunk that an earlier attempt had to split.
        done = sorted(self._done)
        await self._say(proceed=runner_pb2.Proceed(grant=grant, done_chunk_ids=done))

    async def _call_started(self, started: runner_pb2.CallStarted) -> None:
        self._call_open = True
        if started.call_number <= self._work.calls_made:
            return  # stored by the worker before this one, whose acknowledgement was lost
        # Process and lease are stored with the first call: before it, nothing was at stake.
        await self._journal.call_started(
            self._work,
            self._result.trail,
            number=started.call_number,
            chunk_id=started.chunk_id,
            chunks_total=len(self._planned) or self._work.chunks_total,
        )
        self._calls += 1

    async def _chunk_split(self, split: runner_pb2.ChunkSplit) -> None:
        into = [chunk.chunk_id for chunk in split.into]
        # The worker that took an attempt over knows how many there are, and not which.
        total = (len(self._planned) or self._work.chunks_total) + len(into) - 1
        await self._journal.chunk_split(self._work, total)
        self._call_open = False
        if split.chunk_id in self._planned:
            place = self._planned.index(split.chunk_id)
            self._planned[place : place + 1] = into
        self._work = replace(self._work, chunks_total=total)

    async def _chunk_result(self, result: runner_pb2.ChunkResult) -> None:
        kept = bounds.worst(result.findings, len(self._planned) or self._work.chunks_total)
        dropped = result.dropped + len(result.findings) - len(kept)
        await self._journal.chunk_done(self._work, result.chunk_id, kept, dropped)
        self._call_open = False
        self.answer_bytes = 0
        self._done.add(result.chunk_id)

    def _validation(self, result: runner_pb2.ValidationResult) -> None:
        verdict = key_pb2.ValidationVerdict.Name(result.verdict)
        self._result = replace(
            self._result,
            verdict=verdict.removeprefix("VALIDATION_VERDICT_"),
            models=listed(result.models),
            cause=failures.cause_of(result.unreachable_cause),
        )

    def _outcome(self, outcome: runner_pb2.Outcome) -> None:
        report = outcome.report
        self._trail(
            process_id=report.process_id or self._result.trail.process_id,
            open_time=_datetime(report.open_time),
            close_time=_datetime(report.close_time),
        )
        reason = failures.name_of(outcome.failure)
        if reason:
            failure = Failure(
                reason,
                retry_after_seconds=outcome.retry_after_ms / 1000,
                ambiguous=outcome.ambiguous_call,
                cause=failures.cause_of(outcome.unreachable_cause),
            )
            refused = self._call_open and not failure.ambiguous
            self._result = replace(self._result, failure=failure, refused_call=refused)

    def _concluded(self) -> Result:
        left = len(set(self._planned) - self._done)
        if self._work.turn and not self._planned:  # told to the worker before this one
            left = max(0, self._work.chunks_total - len(self._done))
        spare = self._work.calls_left - self._calls - max(left, 1)
        result = replace(self._result, spare_calls=spare)
        if self._refused is not None:
            return replace(result, failure=self._refused)
        if result.failure is None and left:
            if not self._lost:  # else it was told to stop, and nothing more was taken
                # A runner that says "done" and is not has a defect.
                attempt = self._work.attempt_id
                logs.event(log, "chunks_missing", level=logging.ERROR, attempt=attempt)
            return replace(result, failure=Failure("INTERNAL"))
        return result

    def _cut(self, code: grpc.StatusCode) -> Failure:
        """What a stream that ended without an outcome means."""
        logs.event(
            log, "stream_cut", attempt=self._work.attempt_id, code=code.name, call=self._call_open
        )
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

    def _trail(self, **values: Any) -> None:
        self._result = replace(self._result, trail=replace(self._result.trail, **values))

    def _assignment(self) -> runner_pb2.Assign:
        work = self._work
        assign = runner_pb2.Assign(
            attempt_id=work.attempt_id,
            fence=work.fence,
            purpose=PURPOSES[work.kind],
            provider=names.provider_value(work.provider),
            model=work.model,
            plan_model=work.plan_model,
            max_calls=work.calls_left if work.review_id else _VALIDATION_CALLS,
            timeout_seconds=self._seconds,
        )
        if work.review_id:
            assign.input.MergeFromString(work.input)
        return assign

    def _subject(self) -> Subject:
        work = self._work
        return Subject(
            tenant=work.tenant,
            owner=work.owner,
            actor=work.actor,
            provider=names.provider_value(work.provider),
            key_id=work.key_id,
            key_version=work.key_version,
            review_id=work.review_id,
            attempt_id=work.attempt_id,
            fence=work.fence,
            purpose=PURPOSES[work.kind],
        )


def _datetime(stamp: Timestamp) -> datetime | None:
    return stamp.ToDatetime(UTC) if stamp.seconds else None
