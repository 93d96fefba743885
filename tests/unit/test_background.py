"""Work beside the calls outlives what fails in it, and none of it dies unseen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from services.common import background
from services.common.background import Background


@pytest.fixture
async def beside() -> AsyncIterator[Background]:
    made = Background()
    yield made
    await made.close()


@pytest.fixture
def said(caplog) -> Callable[[], list[dict]]:
    """What was logged: events with their fields."""
    caplog.set_level(logging.INFO, "services")
    return lambda: [{"event": one.msg, **one.byokeep_fields} for one in caplog.records]


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_one_bad_item_does_not_stop_the_others():
    done = []

    async def act(item: int) -> None:
        if item == 2:
            raise ValueError("bad row")
        done.append(item)

    await background.each("test", [1, 2, 3], act)
    assert done == [1, 3]


async def test_a_step_that_fails_is_run_again_and_the_next_one_too(beside):
    ran = []

    async def bad() -> None:
        ran.append("bad")
        raise RuntimeError

    async def good() -> None:
        ran.append("good")

    beside.every("test", 0.01, bad, good)
    await until(lambda: len(ran) >= 4)
    assert ran[:4] == ["bad", "good", "bad", "good"]
    assert beside.down() == []


async def test_what_keeps_failing_is_told_once_and_once_more_when_it_is_well(beside, said):
    """Shown to fail with logs.failure in place of told.failure: a line for every round."""
    rounds = 0

    async def fails_at_first() -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 20:
            raise RuntimeError("secret")

    beside.every("test", 0.001, fails_at_first)
    await until(lambda: rounds > 20)
    assert [line["event"] for line in said()] == ["test_failed", "test_failed_no_more"]


async def test_what_is_vital_and_fails_is_down_until_it_goes_well(beside):
    """Shown to fail with `vital` left out of _forever."""
    fail = True

    async def step() -> None:
        if fail:
            raise RuntimeError

    beside.every("test", 0.001, step, vital=True)
    await until(lambda: beside.down() == ["test"])
    fail = False
    await until(lambda: beside.down() == [])


@pytest.mark.parametrize("how", ["raises", "returns", "is cancelled", "raises no Exception"])
async def test_what_dies_is_on_record_and_down_and_started_again(beside, said, how, monkeypatch):
    """Shown to fail with `_keep` that runs its work but once."""
    monkeypatch.setattr(background, "PROVEN_SECONDS", 0.05)
    lives = 0

    async def dies_once() -> None:
        nonlocal lives
        lives += 1
        if lives > 1 or how == "is cancelled":
            await for_ever()
        if how == "raises":
            raise RuntimeError("secret")
        if how == "raises no Exception":
            raise asyncio.CancelledError

    beside.run("worker", dies_once)
    await until(lambda: lives == 1)
    if how == "is cancelled":
        beside.tasks["worker"].cancel()
    await until(lambda: beside.down() == ["worker"])
    await until(lambda: lives == 2 and beside.down() == [])
    told = said()
    assert [line["event"] for line in told] == ["background_died", "background_well"]
    assert {line["task"] for line in told} == {"worker"}
    assert "secret" not in json.dumps(told)


async def test_a_keeper_that_is_gone_is_down(beside):
    """Shown to fail with `died` left out of down()."""
    beside.run("worker", for_ever)
    for task in asyncio.all_tasks():
        if task.get_name() == "keep worker":
            task.cancel()
    await until(lambda: beside.down() == ["worker"])


async def test_a_task_with_an_end_that_fails_is_on_record(said):
    """Shown to fail with create_task alone."""

    async def fails() -> None:
        raise RuntimeError("secret")

    await asyncio.wait({background.start("release", fails())})
    assert [line["event"] for line in said()] == ["release_failed"]


async def test_a_cancellation_that_a_step_answers_with_an_error_ends_the_work(beside):
    """As drivers do. Shown to fail: with end_if_cancelled doing nothing, it sleeps on."""
    started = asyncio.Event()

    async def swallows() -> None:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await for_ever()
        raise RuntimeError

    beside.every("test", 60, swallows)
    await started.wait()
    task = beside.tasks["test"]
    async with asyncio.timeout(4):  # less than what is given to what does not end
        await beside.close()
    assert task.cancelled()
