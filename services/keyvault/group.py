"""Group commit: work that arrives while a transaction runs is done together in the next one.

A commit costs the same for one lease as for fifty. Items that lock the same tenant are never in
two transactions of this process at once: the second could only wait.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

import grpc

from services.common import background, deadline
from services.common.errors import ByokeepError
from services.keyvault.database import is_lost

T = TypeVar("T")
R = TypeVar("R")
#: What each item of a group came to; a refusal of one is no failure of the others.
Run = Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]]

LARGEST = 64
_WAITING = 4096
_LANES = 2


class GroupCommit(Generic[T, R]):
    """Runs items in groups, each group as one transaction."""

    def __init__(self, run: Run[T, R], lock_of: Callable[[T], Hashable]) -> None:
        """`run` does a group and returns an outcome each, in order, once that is durable; where
        it raises, nothing of the group is done. `lock_of` names what an item will lock."""
        self._run = run
        self._lock_of = lock_of
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._locked: set[Hashable] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._starting = False

    async def do(self, item: T) -> R:
        """Do one item with whatever else waits.

        Raises:
            ByokeepError: OVERLOADED, or what `run` says of it, or why its group failed.
        """
        if len(self._waiting) >= _WAITING:
            raise _overloaded()
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        self._start_soon()
        return await done

    def _start_soon(self) -> None:
        # Not now: whatever else came in with this turn of the loop goes into the same group.
        if not self._starting:
            self._starting = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._starting = False
        while len(self._running) < _LANES:
            group: list[tuple[T, asyncio.Future[R]]] = []
            left: list[tuple[T, asyncio.Future[R]]] = []
            locks: set[Hashable] = set()
            for waiting in self._waiting:
                lock = self._lock_of(waiting[0])
                if waiting[1].done():
                    continue  # its caller has gone
                if lock in self._locked or len(group) == LARGEST:
                    left.append(waiting)
                else:
                    group.append(waiting)
                    locks.add(lock)
            self._waiting = left
            if not group:
                return
            self._locked |= locks
            with deadline.lifted():
                task = background.start("group", self._do(group))
            self._running.add(task)
            task.add_done_callback(functools.partial(self._ended, locks))

    def _ended(self, locks: set[Hashable], task: asyncio.Task[None]) -> None:
        self._locked -= locks
        self._running.discard(task)
        self._start_soon()

    async def _do(self, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            outcomes = await self._run([item for item, _ in group])
        except Exception as error:
            failure = error
        else:
            for (_, done), outcome in zip(group, outcomes, strict=True):
                _settle(done, outcome)
            return
        if len(group) == 1 or is_lost(failure):
            for _, done in group:
                _settle(done, failure)
            return
        # One of them made all fail: each is done alone, so that only that one does.
        for one in group:
            await self._do([one])


def _settle(done: asyncio.Future[R], outcome: R | Exception) -> None:
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def _overloaded() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OVERLOADED",
        "keyvault has more to write than its database takes; try again",
        retry_after_seconds=1.0,
        limit=str(_WAITING),
    )
