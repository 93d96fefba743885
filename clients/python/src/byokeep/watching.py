"""Following a server's stream to its end, past lost connections.

Both WatchReview and WatchKey begin with the present state, so that nothing is missed by opening
the stream again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

import grpc

from byokeep.calls import overload_pause
from byokeep.errors import OVERLOADED, UNANSWERED, CallError, WatchTimeoutError

FAILURES_IN_A_ROW: Final = 8
"""Streams that may be lost before one gives a message; then the last one's error is raised.
With the channel's own repetitions this outlasts a service's restart."""
_LONGEST_PAUSE_SECONDS: Final = 2.0
_LAST_WORDS_SECONDS: Final = 1.0
# A connection that broke off, said in the ways in which proxies and gRPC say it.
_BROKEN_OFF = "UNEXPLAINED"


def watch(
    open_stream: Callable[[float], Any],
    ended: Callable[[Any], bool],
    seconds: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Any]:
    """Yield a stream's messages up to the one that `ended` says is the last.

    `open_stream` gets the seconds that are left as its deadline.

    Raises:
        WatchTimeoutError: so many seconds were over before.
        CallError: the service stays away, or refuses.
    """
    course = _Course(seconds)
    while True:
        stream = open_stream(course.left())
        try:
            for message in stream:
                course.seen(message)
                yield message
                if ended(message):
                    return
            failed = None
        except CallError as error:
            failed = error
        finally:
            stream.cancel()
        sleep(course.pause(failed))


async def watch_aio(
    open_stream: Callable[[float], Any],
    ended: Callable[[Any], bool],
    seconds: float,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Any]:
    """The same for asyncio: see `watch`."""
    course = _Course(seconds)
    while True:
        stream = open_stream(course.left())
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                course.seen(message)
                yield message
                if ended(message):
                    await _end(stream)
                    return
            failed = None
        except CallError as error:
            failed = error
        finally:
            stream.cancel()
        await sleep(course.pause(failed))


async def _end(stream: Any) -> None:
    # The service ends the stream after its last message. A call that is cancelled instead may
    # outlive its event loop, and gRPC then loses events of the next one.
    with contextlib.suppress(CallError, TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            while await stream.read() is not grpc.aio.EOF:
                pass


class _Course:
    """How long to go on, and how long to pause after a stream that was lost."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._latest: Any = None
        self._failures = 0
        self._refusals = 0

    def left(self) -> float:
        """Return the seconds that are left. Raises WatchTimeoutError where none is."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise WatchTimeoutError(self._seconds, self._latest)
        return left

    def seen(self, message: Any) -> None:
        """Keep a message: the service is there."""
        self._latest = message
        self._failures = self._refusals = 0

    def pause(self, failed: CallError | None) -> float:
        """Return the seconds to the next try, of a stream that failed, or just stopped (None).

        Raises:
            WatchTimeoutError: the stream ended because the time is over.
            CallError: a refusal, or one failure too many.
        """
        if failed is not None and failed.reason == OVERLOADED:
            # The service is there, and has one stream too many for now.
            pause = overload_pause(failed.retry_after_seconds or 1.0, self._refusals)
            self._refusals += 1
            return self._at_most(pause)
        self._failures += 1
        if failed is not None:
            if failed.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                self.left()
            elif failed.code() not in UNANSWERED and failed.reason != _BROKEN_OFF:
                raise failed
            if self._failures >= FAILURES_IN_A_ROW:
                raise failed
        pause = min(0.1 * 2 ** min(self._failures, 10), _LONGEST_PAUSE_SECONDS)
        if failed is not None and failed.retry_after_seconds is not None:
            pause = max(pause, failed.retry_after_seconds)
        return self._at_most(pause)

    def _at_most(self, pause: float) -> float:
        return min(pause, max(self._end - time.monotonic(), 0.0))
