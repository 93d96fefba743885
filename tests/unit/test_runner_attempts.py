"""What the runner keeps for an orchestrator that is away, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from types import SimpleNamespace

import pytest
from byokeep.keyvault.v1 import lease_pb2
from byokeep.runner.v1 import runner_pb2

from services.common.errors import ByokeepError
from services.llm_runner import attempts as attempts_module
from services.llm_runner.attempt import Attempt, Means
from services.llm_runner.attempts import Attempts
from services.llm_runner.channel import ParentEnd
from services.llm_runner.outbox import Outbox


async def collect(outbox, reader):
    return [response.sequence async for response in outbox.read(reader)]


async def test_an_outbox_repeats_what_is_not_stored():
    outbox = Outbox()
    for _ in range(3):
        outbox.post(call_started=runner_pb2.CallStarted())
    outbox.ack(1)
    first = asyncio.create_task(collect(outbox, outbox.attach()))
    await asyncio.sleep(0)
    outbox.ack(99)
    second = asyncio.create_task(collect(outbox, outbox.attach()))
    await asyncio.sleep(0)
    outbox.post(outcome=runner_pb2.Outcome())
    outbox.close()
    await asyncio.sleep(0)
    outbox.ack(4)

    assert await asyncio.wait_for(first, 60) == [2, 3]
    assert await asyncio.wait_for(second, 60) == [2, 3, 4]
    assert not outbox.pending


async def test_an_older_reader_does_not_end_a_newer_ones_stream():
    outbox = Outbox()
    old = outbox.attach()
    new = outbox.attach()

    assert not outbox.detach(old)
    assert outbox.detach(new)


class FakeChild:
    """A child that says nothing and dies when it is told to."""

    def __init__(self):
        ours, self.theirs = socket.socketpair()
        self.pid = 1
        self.channel = ParentEnd(ours)
        self.gone = asyncio.Event()
        self.close_time = 1

    def kill(self):
        self.theirs.close()
        self.gone.set()


class FakeSpawner:
    def __init__(self):
        self.children = []

    async def spawn(self):
        self.children.append(FakeChild())
        return self.children[-1]


async def test_an_attempt_that_nobody_takes_up_is_given_up(monkeypatch):
    monkeypatch.setattr(attempts_module, "RETENTION_SECONDS", 0.2)
    spawner = FakeSpawner()
    attempts = Attempts(spawner, means=None, limit=1)
    message = runner_pb2.Assign(attempt_id="att_1", fence=7, timeout_seconds=60)
    attempt = await attempts.start(message)
    attempts.detach(attempt, attempts.attach(attempt))
    (child,) = spawner.children
    await asyncio.sleep(0.1)
    assert not child.gone.is_set()
    reader = attempts.attach(attempts.find("att_1", 7))
    await asyncio.sleep(0.3)
    assert not child.gone.is_set()

    attempts.detach(attempt, reader)
    await asyncio.wait_for(child.gone.wait(), 2)
    responses = [one async for one in attempt.outbox.read(attempts.attach(attempt))]

    assert responses[-1].outcome.message == "The orchestrator did not come back for the attempt."
    with pytest.raises(ByokeepError, match="no such attempt"):
        attempts.find("att_1", 7)


async def test_a_higher_fence_takes_an_attempt_over():
    spawner = FakeSpawner()
    attempts = Attempts(spawner, means=None, limit=2)
    message = runner_pb2.Assign(attempt_id="att_1", fence=1, timeout_seconds=60)
    await attempts.start(message)
    message.fence = 2
    second = await attempts.start(message)

    assert [child.gone.is_set() for child in spawner.children] == [True, False]
    assert attempts.find("att_1", 2) is second
    await attempts.close(2)
    assert all(child.gone.is_set() for child in spawner.children)


async def test_a_lease_lasts_as_long_by_a_clock_that_is_off(monkeypatch):
    """An hour ahead, every child was killed when it had its key (TIMEOUT); an hour behind, one
    outlived its lease. Shown to fail where the end of the lease is a time of day."""

    @contextlib.asynccontextmanager
    async def leasing():
        yield

    async def lease(grant, accepted):
        return lease_pb2.LeaseKeyResponse(lease_id="lea_1", life={"seconds": 900})

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    watch = SimpleNamespace(leasing=leasing, track=lambda lease_id, stop: None, healthy=True)
    means = Means(dialer=None, leases=SimpleNamespace(lease=lease), watch=watch)
    assign = runner_pb2.Assign(attempt_id="att_1", fence=1, timeout_seconds=7200)
    child = FakeChild()
    attempt = Attempt(assign, child, means)
    await attempt._lease(runner_pb2.Proceed(), runner_pb2.Accepted())
    assert 890 < attempt._timer.when() - asyncio.get_running_loop().time() <= 900
    attempt._timer.cancel()
    child.kill()
    child.channel.close()
