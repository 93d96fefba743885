"""Planning: beside the event loop, fair among tenants, refused with figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from byokeep.orchestrator.v1.review_pb2 import DryRunReviewResponse, ReviewInput

from services.common import diff, models
from services.common.errors import ByokeepError
from services.orchestrator.api.planning import Planner
from services.orchestrator.compute.child import BUDGET
from services.orchestrator.compute.pool import Compute, Job

MODEL = models.ModelRef("openai", "gpt-6.1-terra")


def lines(count: int) -> bytes:
    """A diff of short lines: the smallest that takes so long to read."""
    return b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -0,0 +1,%d @@\n" % count + b"+\n" * count


@pytest.fixture
async def compute() -> AsyncIterator[Compute]:
    made = Compute()
    yield made
    await made.close()


async def test_too_many_lines_are_refused_with_figures(compute: Compute) -> None:
    large = ReviewInput(diff=lines(diff.MAX_LINES))
    with pytest.raises(ByokeepError) as refused:
        await Planner(models.load(None), compute).plan("acme", large, MODEL)
    assert refused.value.reason == "DIFF_TOO_LARGE"
    assert refused.value.metadata == {
        "field": "input.diff",
        "lines": str(diff.MAX_LINES + 4),
        "max_lines": str(diff.MAX_LINES),
    }


async def test_the_loop_turns_while_a_diff_is_planned(compute: Compute) -> None:
    """Was shown to fail with `outline` called at once, whatever the size: no turn at all."""
    planner, turns = Planner(models.load(None), compute), 0
    plan = asyncio.create_task(planner.plan("acme", ReviewInput(diff=lines(31_500)), MODEL))
    while not plan.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 100
    assert (await plan).calls == 2


async def test_one_tenants_plans_hold_up_no_other(compute: Compute) -> None:
    """Was shown to fail with 100 turns at once."""
    job = BUDGET.pack(64_000) + lines(60_000)
    flood = [asyncio.create_task(compute.run("flood", Job.OUTLINE, job)) for _ in range(10)]
    await flood[0]
    await compute.run("acme", Job.OUTLINE, job)
    assert sum(not one.done() for one in flood) >= 6
    await asyncio.gather(*flood)


async def test_callers_that_leave_make_no_room_for_more(compute: Compute) -> None:
    """Whoever leaves does not end its job. Was shown to fail with a turn that ends with its
    caller: all six were begun."""
    job = BUDGET.pack(64_000) + lines(60_000)
    begun: list[object] = []
    inner = compute._do
    compute._do = lambda *args: (begun.append(1), inner(*args))[1]  # type: ignore[method-assign]
    for _ in range(6):
        call = asyncio.create_task(compute.run("flood", Job.OUTLINE, job))
        for _ in range(10):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await asyncio.to_thread(compute._threads.shutdown)
    assert len(begun) == 1


async def test_a_process_that_dies_fails_its_job_alone(compute: Compute) -> None:
    """Was shown to fail where a process that broke was kept: the second job failed too."""
    job = BUDGET.pack(64_000) + lines(10)
    await compute.run("acme", Job.OUTLINE, job)
    compute._idle[0]._process.kill()
    with pytest.raises(ByokeepError, match="internal error"):
        await compute.run("acme", Job.OUTLINE, job)
    answer = DryRunReviewResponse.FromString(await compute.run("acme", Job.OUTLINE, job))
    assert [list(chunk.files) for chunk in answer.chunks] == [["x"]]


async def test_a_process_ends_with_its_pipe(compute: Compute) -> None:
    """As when the orchestrator is killed."""
    await compute.run("acme", Job.OUTLINE, BUDGET.pack(64_000) + lines(10))
    process = compute._idle[0]
    process._in.close()
    assert await asyncio.to_thread(process._process.wait, 10) == 0
