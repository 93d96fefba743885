"""One attempt of a review, in the child: its chunks, one call after the other."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import httpx
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.llm_runner import failures, findings
from services.llm_runner.calls import Calls
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.plan import Plan
from services.llm_runner.providers import Adapter, ProviderError


def run(
    channel: ChildEnd,
    calls: Calls,
    plan: Plan,
    done: Collection[str],
    adapter: Adapter,
    client: httpx.Client,
) -> runner_pb2.Outcome:
    """Review every chunk that is not done yet, and send what was found."""
    todo = [chunk for chunk in plan.chunks if chunk.id not in done]
    if len(todo) > calls.left:
        return failures.failed(
            review_pb2.FAILURE_REASON_BAD_REQUEST,
            "The review needs more calls than it may make.",
        )
    for index, chunk in enumerate(todo):
        prompt = plan.prompt(chunk)
        failure = None
        try:
            answer = calls.make(
                chunk.id, len(todo) - index - 1, partial(adapter.review, client, prompt)
            )
        except ProviderError as error:
            failure = error
        if failure is not None:
            return failures.provider_failed(failure)
        accepted = findings.accept(answer.findings, plan.diff, chunk)
        channel.send(
            Kind.CHUNK_RESULT,
            runner_pb2.ChunkResult(
                chunk_id=chunk.id,
                findings=[_message(finding) for finding in accepted.findings],
                dropped=accepted.dropped,
            ),
        )
    return runner_pb2.Outcome()


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
    )
