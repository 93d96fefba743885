"""Work beside the calls outlives what fails in it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.keyvault import background


async def test_one_bad_item_does_not_stop_the_others():
    done = []

    async def act(item: int) -> None:
        if item == 2:
            raise ValueError("bad row")
        done.append(item)

    await background.each("test", [1, 2, 3], act)
    assert done == [1, 3]


async def test_a_step_that_fails_is_run_again_and_the_next_one_too():
    ran = []

    async def bad() -> None:
        ran.append("bad")
        raise RuntimeError

    async def good() -> None:
        ran.append("good")

    task = asyncio.create_task(background.forever("test", 0.01, bad, good))
    await asyncio.sleep(0.1)
    assert not task.done()
    assert ran[:4] == ["bad", "good", "bad", "good"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_a_step_answers_with_an_error_ends_the_work():
    """As drivers do. Shown to fail: with _end_if_cancelled doing nothing, it sleeps on."""
    started = asyncio.Event()

    async def swallows() -> None:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        raise RuntimeError

    task = asyncio.create_task(background.forever("test", 60, swallows))
    await started.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
