"""One attempt of a review, in the child: its chunks, one call after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from functools import partial
from typing import Final

from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common.chunks import Chunk
from services.llm_runner import failures, findings
from services.llm_runner.calls import Calls
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.plan import Plan
from services.llm_runner.providers import Adapter, Client, FailureKind, ProviderError
from services.llm_runner.split import halve, was_split

_PROGRESS_SECONDS: Final = 1.0
_TOO_MANY_CALLS: Final = failures.failed(
    review_pb2.FAILURE_REASON_BAD_REQUEST, "The review needs more calls than it may make."
)
_TOO_MANY_PARTS: Final = failures.failed(
    review_pb2.FAILURE_REASON_CONTEXT_TOO_LONG,
    "The provider takes less at once than one call holds, and smaller ones are more than the"
    " review may make.",
)


def run(
    channel: ChildEnd,
    calls: Calls,
    plan: Plan,
    done: Collection[str],
    adapter: Adapter,
    client: Client,
) -> runner_pb2.Outcome:
    """Review every chunk that is not done yet, and send what was found.

    What the provider finds too long is split, and so is every later chunk of that length.
    """
    todo = deque(chunk for chunk in plan.chunks if chunk.id not in done)
    known = {chunk.id for chunk in plan.chunks}
    parts = [chunk_id for chunk_id in done if chunk_id not in known]
    too_long: int | None = None
    while todo:
        if len(todo) > calls.left:
            return _TOO_MANY_CALLS if too_long is None else _TOO_MANY_PARTS
        chunk = todo.popleft()
        if not was_split(chunk, parts) and (too_long is None or chunk.estimated_tokens < too_long):
            failure = _review(channel, calls, plan, chunk, adapter, client)
            if failure is None:
                continue
            if failure.kind is not FailureKind.CONTEXT_TOO_LONG:
                return failures.provider_failed(failure)
            too_long = chunk.estimated_tokens
        halves = halve(chunk)
        if not halves:
            return failures.provider_failed(ProviderError(FailureKind.CONTEXT_TOO_LONG))
        channel.send(
            Kind.CHUNK_SPLIT,
            runner_pb2.ChunkSplit(chunk_id=chunk.id, into=[planned(half) for half in halves]),
        )
        todo.extendleft(half for half in reversed(halves) if half.id not in done)
    return runner_pb2.Outcome()


def planned(chunk: Chunk) -> runner_pb2.PlannedChunk:
    """Return what the orchestrator is told of a chunk."""
    return runner_pb2.PlannedChunk(chunk_id=chunk.id, estimated_tokens=chunk.estimated_tokens)


def _review(
    channel: ChildEnd,
    calls: Calls,
    plan: Plan,
    chunk: Chunk,
    adapter: Adapter,
    client: Client,
) -> ProviderError | None:
    """Make the call for a chunk, and send what was found; return why there is nothing."""
    progress = _Progress(channel, chunk.id)
    call = partial(adapter.review, client, plan.prompt(chunk), progress)
    try:
        answer = calls.make(chunk.id, call)
    except ProviderError as error:
        return error
    accepted = findings.accept(answer.findings, plan.diff, chunk)
    channel.send(
        Kind.CHUNK_RESULT,
        runner_pb2.ChunkResult(
            chunk_id=chunk.id,
            findings=[_message(finding) for finding in accepted.findings],
            dropped=accepted.dropped,
        ),
    )
    return None


class _Progress:
    """Tells how far a call is, at most once a second."""

    def __init__(self, channel: ChildEnd, chunk_id: str) -> None:
        self._channel = channel
        self._chunk_id = chunk_id
        self._next = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, answer_bytes: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PROGRESS_SECONDS
        progress = runner_pb2.CallProgress(chunk_id=self._chunk_id, answer_bytes=answer_bytes)
        self._channel.send(Kind.CALL_PROGRESS, progress)


def _message(finding: findings.Finding) -> review_pb2.Finding:
    return review_pb2.Finding(
        path=finding.path,
        start_line=finding.start_line,
        end_line=finding.end_line,
        severity=review_pb2.Severity.Value(f"SEVERITY_{finding.severity.upper()}"),
        category=review_pb2.Category.Value(f"CATEGORY_{finding.category.upper()}"),
        title=finding.title,
        message=finding.message,
        suggestion=finding.suggestion,
        side=review_pb2.DIFF_SIDE_OLD if finding.old_side else review_pb2.DIFF_SIDE_NEW,
    )
