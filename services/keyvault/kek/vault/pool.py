"""Bounded threads with a bulkhead, for calls that block.

At most `threads` calls run and as many times `_WAITING` wait; what comes on top is turned
away at once. A call's time runs from when it came: one that waited too long is never sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from services.keyvault.kek.vault.reply import Reply, WireError, remaining

_WAITING = 4
# A thread notices its deadline by itself; only name resolution can hold it longer.
_GRACE_SECONDS = 0.25


class Pool:
    """Runs blocking calls (see the module)."""

    def __init__(self, name: str, threads: int, seconds: float) -> None:
        """`seconds` is the time that a call has in all."""
        self._executor = ThreadPoolExecutor(threads, f"vault-{name}")
        self._limit = threads * (1 + _WAITING)
        self._held = 0
        self.seconds = seconds

    async def run(self, work: Callable[[float], Reply]) -> Reply:
        """Run `work(deadline)` in a thread. Raises WireError, also with state "busy"."""
        if self._held >= self._limit:
            raise WireError("busy")
        self._held += 1
        deadline = time.monotonic() + self.seconds
        future = asyncio.get_running_loop().run_in_executor(self._executor, _timely, work, deadline)
        future.add_done_callback(self._release)
        try:
            done, _ = await asyncio.wait({future}, timeout=self.seconds + _GRACE_SECONDS)
        except asyncio.CancelledError:
            future.add_done_callback(_discard)
            raise
        if not done:
            future.add_done_callback(_discard)
            raise WireError("slow")
        return future.result()

    def close(self) -> None:
        """Take no more calls; threads end with the call that they are in."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, _: object) -> None:
        self._held -= 1


def _timely(work: Callable[[float], Reply], deadline: float) -> Reply:
    late = False
    try:
        remaining(deadline)
    except TimeoutError:
        late = True
    if late:
        raise WireError("busy")
    return work(deadline)


def _discard(future: asyncio.Future[Reply]) -> None:
    """Wipe an answer that nobody waits for any more."""
    if not future.cancelled() and future.exception() is None:
        future.result().wipe()
