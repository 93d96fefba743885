"""Work that goes on beside the calls: watched, so that none of it dies unseen.

Every task that lives as long as its service is started here, and by nothing else. One that ends
though nobody asked it to is on record, keeps health from SERVING, and is started again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, TypeAlias, TypeVar

from services.common import logs, metrics
from services.common.errors import ByokeepError

log = logging.getLogger(__name__)
T = TypeVar("T")
Work: TypeAlias = Callable[[], Coroutine[Any, Any, object]]

#: Work that died is well again once it has lived for so long.
PROVEN_SECONDS: Final = 1.0
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 15.0
_CANCELLED_SECONDS: Final = 5.0


class Background:
    """The work that a service does beside its calls."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._down: set[str] = set()
        self._failing: set[str] = set()
        self._told: defaultdict[tuple[str, int], logs.Repeated] = defaultdict(
            lambda: logs.Repeated(log)
        )
        #: What runs now, by name.
        self.tasks: dict[str, asyncio.Task[object]] = {}

    def run(self, name: str, work: Work) -> None:
        """Run `work`, which has no end of its own, until `close`."""
        self._keepers[name] = asyncio.create_task(self._keep(name, work), name=f"keep {name}")

    def every(self, name: str, seconds: float, *steps: Work, vital: bool = False) -> None:
        """Run steps one after the other, and again `seconds` after the last one's end, until
        `close`. A step that fails is logged, and run again with the others; where the service
        can't work without it (`vital`), it counts as down until a round goes well."""
        self.run(name, functools.partial(self._forever, name, seconds, steps, vital))

    def down(self) -> list[str]:
        """Return the names of what has died, or is vital and fails, and is not well again."""
        died = {name for name, keeper in self._keepers.items() if keeper.done()}
        return sorted(self._down | self._failing | died)

    async def end(self, name: str) -> None:
        """End one that runs."""
        keeper = self._keepers.pop(name)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        self._down.discard(name)
        self._failing.discard(name)

    async def close(self) -> None:
        """End everything that runs."""
        keepers = list(self._keepers.values())
        self._keepers.clear()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, name: str, work: Work) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            task = self.tasks[name] = asyncio.create_task(work(), name=name)
            try:
                await asyncio.wait({task}, timeout=PROVEN_SECONDS)
                if not task.done():
                    pause = _FIRST_PAUSE_SECONDS
                    if name in self._down:
                        self._down.discard(name)
                        logs.event(log, "background_well", task=name)
                await asyncio.wait({task})
            finally:
                await _end(name, task)
            self._down.add(name)
            _tell_death(name, task)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _forever(
        self, name: str, seconds: float, steps: tuple[Work, ...], vital: bool
    ) -> None:
        while True:
            well = True
            for number, step in enumerate(steps):
                failed: Exception | None = None
                try:
                    await step()
                except Exception as error:
                    failed = error
                end_if_cancelled()
                told = self._told[name, number]
                if failed is None:
                    told.well(f"{name}_failed")
                else:
                    well = False
                    told.failure(f"{name}_failed", failed, **_reason(failed))
            (self._failing.discard if well or not vital else self._failing.add)(name)
            await asyncio.sleep(seconds)


def start(name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task that has an end; should it fail, that is on record, whoever awaits it or not."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(functools.partial(_tell_failure, name))
    return task


async def each(name: str, items: Iterable[T], act: Callable[[T], Coroutine[Any, Any, Any]]) -> None:
    """Act on every item; one that fails is logged and does not stop the others."""
    for item in items:
        failed: Exception | None = None
        try:
            await act(item)
        except Exception as error:
            failed = error
        if failed is not None:
            logs.failure(log, f"{name}_failed", failed, **_reason(failed))


def end_if_cancelled() -> None:
    """Raise CancelledError where this task is to end: a driver may answer a cancellation with an
    error of its own, or with a result, and a loop that caught that would go on."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _end(name: str, task: asyncio.Task[object]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCELLED_SECONDS)
        if not task.done():
            logs.event(log, "background_stuck", level=logging.ERROR, task=name)


def _tell_death(name: str, task: asyncio.Task[object]) -> None:
    metrics.BACKGROUND_DEATHS.labels(name).inc()
    error = None if task.cancelled() else task.exception()
    how = {"how": "cancelled" if task.cancelled() else "returned"}
    logs.event(
        log,
        "background_died",
        level=logging.ERROR,
        task=name,
        **(how if error is None else logs.describe(error)),
    )


def _tell_failure(name: str, task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logs.failure(log, f"{name}_failed", error)


def _reason(error: Exception) -> dict[str, object]:
    return {"reason": error.reason} if isinstance(error, ByokeepError) else {}
