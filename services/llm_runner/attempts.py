"""The attempts of this runner: how many at once, who takes one up again, when one is given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

import grpc
from byokeep import ids
from byokeep.runner.v1 import runner_pb2

from services.common import background
from services.common.errors import ByokeepError
from services.llm_runner import metrics
from services.llm_runner.attempt import Attempt, Means
from services.llm_runner.endings import Ending
from services.llm_runner.spawner import Spawner, SpawnError

RETENTION_SECONDS: Final = 30.0
_RETRY_SECONDS: Final = 1.0
# An orchestrator that hears nothing for three seconds takes this runner for lost.
_TELL_SECONDS: Final = 1.0


class Attempts:
    """Starts attempts, and keeps each until its outcome is stored or nobody came for it."""

    def __init__(self, spawner: Spawner, means: Means, limit: int) -> None:
        """`limit` is the most children at once."""
        self._spawner = spawner
        self._means = means
        self._limit = limit
        self._children = 0
        self._id = ids.new_id("run")
        self._draining = False
        self._watchers: set[asyncio.Event] = set()
        self._known: dict[str, Attempt] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.PLACES.labels("total").set(limit)
        metrics.PLACES.labels("free").set_function(lambda: self._capacity().free)

    async def start(self, assign: runner_pb2.Assign) -> Attempt:
        """Start an attempt in a fresh child. Raises ByokeepError."""
        known = self._known.get(assign.attempt_id)
        if known is not None and known.fence >= assign.fence:
            raise _wrong_state("the attempt is known here; reattach to it", "RUNNING")
        if known is not None:
            self._disarm(known)
            known.stop(Ending.ABANDONED)
        if self._draining or self._children >= self._limit:
            raise self._overloaded()
        self._count(1)
        child = None
        try:
            with contextlib.suppress(SpawnError):
                child = await self._spawner.spawn()
        finally:
            self._count(-(child is None))
        if child is None:
            raise self._overloaded()
        attempt = Attempt(assign, child, self._means)
        self._known[attempt.id] = attempt
        # Serialized here, so that no task keeps the diff longer than it takes to hand it over.
        task = background.start("attempt", attempt.run(assign.SerializeToString()))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, attempt))
        return attempt

    def find(self, attempt_id: str, fence: int) -> Attempt:
        """Return an attempt that is taken up again. Raises ByokeepError."""
        attempt = self._known.get(attempt_id)
        if attempt is None:
            raise ByokeepError(
                grpc.StatusCode.NOT_FOUND,
                "NOT_FOUND",
                "no such attempt runs here",
                resource="attempt",
            )
        if attempt.fence != fence:
            raise _wrong_state("the attempt runs here under another fence", "FENCED")
        return attempt

    def attach(self, attempt: Attempt) -> int:
        """Return the number of a new reader of an attempt's responses."""
        if not attempt.over:
            self._disarm(attempt)
        return attempt.outbox.attach()

    def detach(self, attempt: Attempt, reader: int) -> None:
        """Note that the orchestrator is away: it has RETENTION_SECONDS to come back."""
        if not attempt.outbox.detach(reader) or self._known.get(attempt.id) is not attempt:
            return
        if attempt.over and not attempt.outbox.pending:
            self._disarm(attempt)
            del self._known[attempt.id]
        elif attempt.id not in self._expiries:
            self._arm(attempt)

    def watch_changed(self) -> None:
        """Let calls be made that waited for keyvault, and tell whether there is room."""
        for attempt in self._known.values():
            attempt.resume()
        self._tell()

    def drain(self) -> None:
        """Take nothing more; whoever watches the room is told, and let go."""
        self._draining = True
        self._tell()

    async def watch_capacity(self) -> AsyncIterator[runner_pb2.WatchCapacityResponse]:
        """Give the room that there is: now, at every change, and at least once a second."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield self._capacity()
                if self._draining:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TELL_SECONDS):
                        await changed.wait()
        finally:
            self._watchers.discard(changed)

    def stop(self, ending: Ending) -> None:
        """Kill every child."""
        for attempt in self._known.values():
            attempt.stop(ending)

    async def close(self, seconds: float) -> None:
        """Kill every child, and wait until each attempt has told its outcome."""
        self.stop(Ending.SHUTDOWN)
        for expiry in self._expiries.values():
            expiry.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def _ended(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._count(-1)
        if self._known.get(attempt.id) is attempt:
            self._disarm(attempt)
            self._arm(attempt)

    def _capacity(self) -> runner_pb2.WatchCapacityResponse:
        # Without keyvault's revocations no key is leased, so that a child could only wait.
        draining = self._draining or not self._means.watch.healthy
        free = 0 if draining else max(0, self._limit - self._children)
        return runner_pb2.WatchCapacityResponse(
            runner_id=self._id, places=self._limit, free=free, draining=draining
        )

    def _count(self, children: int) -> None:
        self._children += children
        self._tell()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _arm(self, attempt: Attempt) -> None:
        self._expiries[attempt.id] = asyncio.get_running_loop().call_later(
            RETENTION_SECONDS, self._expire, attempt
        )

    def _disarm(self, attempt: Attempt) -> None:
        expiry = self._expiries.pop(attempt.id, None)
        if expiry is not None:
            expiry.cancel()

    def _expire(self, attempt: Attempt) -> None:
        self._expiries.pop(attempt.id, None)
        if self._known.get(attempt.id) is not attempt:
            return
        if attempt.over:
            del self._known[attempt.id]
            attempt.outbox.drop()
        else:
            attempt.stop(Ending.ABANDONED)  # its outcome is kept as long again

    def _overloaded(self) -> ByokeepError:
        return ByokeepError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
            "this runner has no room for another attempt; try again",
            retry_after_seconds=_RETRY_SECONDS,
            limit=str(self._limit),
        )


def _wrong_state(message: str, state: str) -> ByokeepError:
    return ByokeepError(grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE", message, state=state)
