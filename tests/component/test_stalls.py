"""One tenant that stalls all: each attack with a victim beside it, whose call must be answered
before the attack got much done. No clock is asked: what is counted is how much that was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.orchestrator.v1 import review_pb2, settings_pb2

from tests.harness import orchestrator as harness

#: 63 kB, which take 80 ms to plan.
SHORT_LINES = b"--- a/x\n+++ b/x\n@@ -0,0 +1,31500 @@\n" + b"+\n" * 31_500
ATTACKS = 12
AT_MOST = 3


@pytest.fixture
async def stack(orchestrator_database_url: str, tmp_path: Path) -> AsyncIterator[harness.Stack]:
    async with harness.running(orchestrator_database_url, tmp_path) as running:
        for tenant in ("acme", "flood"):
            await running.tenant(tenant)
            running.keyvault.add(tenant)
        yield running


async def done_meanwhile(stack: harness.Stack, attack: Callable[[], Awaitable[Any]]) -> int:
    """Keep calls of one tenant in flight; return the most that were answered during one call of
    another tenant. What is refused is sent again at once."""
    done, over = 0, False

    async def attacker() -> None:
        nonlocal done
        while not over:
            try:
                await attack()
                done += 1
            except grpc.aio.AioRpcError as error:
                if error_info(error).reason != "OVERLOADED":
                    raise

    tasks = [asyncio.create_task(attacker()) for _ in range(ATTACKS)]
    most = 0
    for _ in range(3):
        before = done
        while done == before:
            await asyncio.sleep(0.01)
        before = done
        await stack.client("acme").settings.GetSettings(
            settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
        )
        most = max(most, done - before)
    over = True
    await asyncio.gather(*tasks)
    return most


def dry_run(stack: harness.Stack) -> Awaitable[Any]:
    return stack.client("flood").reviews.DryRunReview(
        review_pb2.DryRunReviewRequest(
            parent="tenants/flood",
            input=review_pb2.ReviewInput(repository="a/b", diff=SHORT_LINES),
        )
    )


async def test_dry_runs_of_short_lines(stack: harness.Stack) -> None:
    """Was shown to fail with the diff planned on the event loop: eight."""
    assert await done_meanwhile(stack, lambda: dry_run(stack)) <= AT_MOST


async def test_exports_full_of_marks(stack: harness.Stack) -> None:
    """Was shown to fail with `exports.github` called on the event loop: four."""
    words = "`*" * 2_000
    hostile = review_pb2.Finding(
        path="app.py",
        start_line=2,
        end_line=2,
        severity=review_pb2.SEVERITY_LOW,
        category=review_pb2.CATEGORY_STYLE,
        title=words[:200],
        message=words,
        suggestion=words,
    )

    async def script(talk: harness.Conversation) -> None:
        chunks = ["c1", "c2", "c3", "c4"]
        await talk.accept(*chunks)
        for number, chunk in enumerate(chunks, 1):
            await talk.call(chunk, number)
            await talk.result(chunk, *[hostile] * 25)
        await talk.end()

    stack.runner.default = script
    review = await stack.ended(await stack.submit("flood"))
    assert review.finding_count == 100
    request = review_pb2.ExportReviewRequest(
        name=review.name, format=review_pb2.EXPORT_FORMAT_GITHUB
    )

    def export() -> Awaitable[Any]:
        return stack.client("flood").reviews.ExportReview(request)

    assert await done_meanwhile(stack, export) <= AT_MOST
