"""Work that goes on beside the calls: it must not die of one bad row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from services.common import logs

log = logging.getLogger(__name__)
T = TypeVar("T")


async def forever(name: str, seconds: float, *steps: Callable[[], Awaitable[None]]) -> None:
    """Run steps again and again, until cancelled; a step that fails is logged and run again."""
    while True:
        for step in steps:
            failed: Exception | None = None
            try:
                await step()
            except Exception as error:
                failed = error
            _end_if_cancelled()
            if failed is not None:
                logs.failure(log, f"{name}_failed", failed)
        await asyncio.sleep(seconds)


def _end_if_cancelled() -> None:
    # A driver may answer a cancellation with an error of its own, or with a result.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def each(name: str, items: Iterable[T], act: Callable[[T], Awaitable[object]]) -> None:
    """Act on every item; one that fails is logged and does not stop the others."""
    for item in items:
        failed: Exception | None = None
        try:
            await act(item)
        except Exception as error:
            failed = error
        if failed is not None:
            logs.failure(log, f"{name}_failed", failed)
