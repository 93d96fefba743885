"""Planning large diffs: few at once, and refused with figures."""

from __future__ import annotations

import asyncio
import threading

import pytest
from byokeep.orchestrator.v1.review_pb2 import ReviewInput

from services.common import diff, models
from services.common.errors import ByokeepError
from services.orchestrator import planning

MODEL = models.ModelRef("openai", "gpt-6.1-terra")
LARGE = b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -0,0 +1,%d @@\n" % diff.MAX_LINES


async def test_too_many_lines_are_refused_with_figures() -> None:
    large = ReviewInput(diff=LARGE + b"\n" * diff.MAX_LINES)
    with pytest.raises(ByokeepError) as refused:
        await planning.Planner(models.load(None)).plan(large, MODEL)
    assert refused.value.reason == "DIFF_TOO_LARGE"
    assert refused.value.metadata == {
        "field": "input.diff",
        "lines": str(diff.MAX_LINES + 4),
        "max_lines": str(diff.MAX_LINES),
    }


async def test_callers_that_leave_make_no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves would give a semaphore back. Was shown to fail with 32 threads."""
    begun: list[int] = []
    go = threading.Event()

    def slow(*_: object) -> None:
        begun.append(1)
        go.wait(10)

    monkeypatch.setattr(planning, "_plan", slow)
    planner = planning.Planner(models.load(None))
    large = ReviewInput(diff=b"x" * 100_000)
    try:
        for _ in range(3):
            calls = [asyncio.create_task(planner.plan(large, MODEL)) for _ in range(2)]
            await asyncio.sleep(0.1)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert len(begun) == 2
    finally:
        go.set()
