"""What an attempt of a review says and stores, and what a look at a key does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from byokeep.orchestrator.v1 import key_pb2
from byokeep.runner.v1 import runner_pb2

from services.common.models import listed
from services.orchestrator.custody.grants import Subject
from services.orchestrator.policy import bounds, failures
from services.orchestrator.policy.failures import Failure
from services.orchestrator.policy.states import Reason, Verdict
from services.orchestrator.store.attempts import KeyAttempt, ReviewAttempt, Trail
from services.orchestrator.work import conversation
from services.orchestrator.work.conversation import Frame
from services.orchestrator.work.execution import Execution, Means
from services.orchestrator.work.fleet import Place

_KEY_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class ReviewResult:
    """How an attempt of a review ended; `failure` None: it did its work.

    `spare_calls`: calls that are left beyond those that the chunks which are left need; below 0:
    too few. `refused_call`: the provider answered the last call, and with the failure.
    """

    failure: Failure | None = None
    trail: Trail = Trail()
    spare_calls: int = 0
    refused_call: bool = False


@dataclass(frozen=True, slots=True)
class KeyResult:
    """How a look at a key ended; `failure` None: the runner did its work."""

    failure: Failure | None = None
    trail: Trail = Trail()
    verdict: Verdict = Verdict.UNSPECIFIED
    cause: str = ""
    models: Sequence[str] = ()


class ReviewExecution(Execution[ReviewResult]):
    """Runs an attempt of a review."""

    _transitions = conversation.REVIEW

    def __init__(
        self, attempt: ReviewAttempt, means: Means, place: Place | None, seconds: int
    ) -> None:
        """See Execution."""
        super().__init__(attempt, means, place, seconds)
        self._work = attempt
        self._calls = 0
        self._planned: list[str] = []
        self._done = set(attempt.done_chunks)
        # The worker that took an attempt over knows how many there are, and not which.
        self._chunks_total = attempt.chunks_total
        self._refused_call = False

    async def _act(self, frame: Frame, response: runner_pb2.ExecuteResponse) -> None:
        match frame:
            case Frame.CALL_STARTED:
                await self._call_started(response.call_started)
            case Frame.CALL_PROGRESS:
                self.answer_bytes = response.call_progress.answer_bytes
            case Frame.CHUNK_RESULT:
                await self._chunk_result(response.chunk_result)
            case Frame.CHUNK_SPLIT:
                await self._chunk_split(response.chunk_split)

    async def _accepted(self, accepted: runner_pb2.Accepted) -> None:
        self._planned = [chunk.chunk_id for chunk in accepted.chunks]
        self._chunks_total = len(self._planned) or self._chunks_total
        await super()._accepted(accepted)

    def _done_chunks(self) -> Sequence[str]:
        # Also what the plan does not name: parts of a chunk that an earlier attempt had to split.
        return sorted(self._done)

    async def _call_started(self, started: runner_pb2.CallStarted) -> None:
        if started.call_number <= self._work.calls_made:
            return  # stored by the worker before this one, whose acknowledgement was lost
        # Process and lease are stored with the first call: before it, nothing was at stake.
        await self._journal.call_started(
            self._work,
            self._trail,
            number=started.call_number,
            chunk_id=started.chunk_id,
            chunks_total=self._chunks_total,
        )
        self._calls += 1

    async def _chunk_split(self, split: runner_pb2.ChunkSplit) -> None:
        into = [chunk.chunk_id for chunk in split.into]
        total = self._chunks_total + len(into) - 1
        await self._journal.chunk_split(self._work, total)
        self._call_open = False
        if split.chunk_id in self._planned:
            place = self._planned.index(split.chunk_id)
            self._planned[place : place + 1] = into
        self._chunks_total = total

    async def _chunk_result(self, result: runner_pb2.ChunkResult) -> None:
        kept = bounds.worst(result.findings, self._chunks_total)
        dropped = result.dropped + len(result.findings) - len(kept)
        await self._journal.chunk_done(self._work, result.chunk_id, kept, dropped)
        self._call_open = False
        self.answer_bytes = 0
        self._done.add(result.chunk_id)

    def _concluded(self) -> ReviewResult:
        left = len(set(self._planned) - self._done)
        if self._work.turn and not self._planned:  # told to the worker before this one
            left = max(0, self._chunks_total - len(self._done))
        failure = self._refused or self._failure
        if failure is None and left:
            if not self._talk.stopped:  # else it was told to stop, and nothing more was taken
                # A runner that says "done" and is not has a defect.
                self._tell("chunks_missing", level=logging.ERROR)
            failure = Failure(Reason.INTERNAL)
        return ReviewResult(
            failure,
            self._trail,
            spare_calls=self._work.calls_left - self._calls - max(left, 1),
            refused_call=self._refused_call,
        )

    def _outcome(self, outcome: runner_pb2.Outcome) -> None:
        super()._outcome(outcome)
        self._refused_call = (
            self._failure is not None and self._call_open and not self._failure.ambiguous
        )

    def broken(self) -> ReviewResult:
        """Return the end of an attempt that our own defect ended."""
        return ReviewResult(Failure(Reason.INTERNAL, ambiguous=self._call_open), self._trail)

    def _assignment(self) -> runner_pb2.Assign:
        work = self._work
        assign = self._assigned(
            model=work.model, plan_model=work.plan_model, max_calls=work.calls_left
        )
        assign.input.MergeFromString(work.input)
        return assign

    def _subject(self) -> Subject:
        return self._granted(self._work.review_id)


class KeyExecution(Execution[KeyResult]):
    """Has a provider asked about a version of a key: one call."""

    _transitions = conversation.KEY

    def __init__(
        self, attempt: KeyAttempt, means: Means, place: Place | None, seconds: int
    ) -> None:
        """See Execution."""
        super().__init__(attempt, means, place, min(seconds, _KEY_SECONDS))
        self._result = KeyResult()

    async def _act(self, frame: Frame, response: runner_pb2.ExecuteResponse) -> None:
        match frame:
            case Frame.CALL_STARTED:
                await self._journal.call_started(
                    self._attempt,
                    self._trail,
                    number=response.call_started.call_number,
                    chunk_id="",
                    chunks_total=0,
                )
            case Frame.VALIDATION_RESULT:
                self._validation(response.validation_result)

    def _validation(self, result: runner_pb2.ValidationResult) -> None:
        verdict = key_pb2.ValidationVerdict.Name(result.verdict)
        self._result = KeyResult(
            verdict=Verdict(verdict.removeprefix("VALIDATION_VERDICT_")),
            models=listed(result.models),
            cause=failures.cause_of(result.unreachable_cause),
        )

    def _concluded(self) -> KeyResult:
        return replace(self._result, failure=self._refused or self._failure, trail=self._trail)

    def broken(self) -> KeyResult:
        """Return the end of an attempt that our own defect ended."""
        failure = Failure(Reason.INTERNAL, ambiguous=self._call_open)
        return KeyResult(failure, self._trail)

    def _assignment(self) -> runner_pb2.Assign:
        return self._assigned(max_calls=1)

    def _subject(self) -> Subject:
        return self._granted()
