"""The provider calls of one attempt: announced, counted, tried again where that is right."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from byokeep.runner.v1 import runner_pb2

from services.llm_runner import failures
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.providers import ProviderError

T = TypeVar("T")

MAX_RETRY_AFTER_SECONDS: Final = 20.0
_FIRST_BACKOFF_SECONDS: Final = 0.5
# With less time than this left, a call would be killed on its way, and its answer lost.
_SHORTEST_CALL_SECONDS: Final = 5.0


class Calls:
    """Each try is a call of its own: its number is stored by the orchestrator before it is made."""

    def __init__(self, channel: ChildEnd, limit: int, deadline: float) -> None:
        """`limit` is the most calls of this attempt, `deadline` its end by the monotonic clock."""
        self._channel = channel
        self._left = limit
        self._number = 0
        self._deadline = deadline

    @property
    def left(self) -> int:
        """Calls that may still be made."""
        return self._left

    def make(self, chunk_id: str, reserved: int, call: Callable[[], T]) -> T:
        """Make a call, again where that is right, leaving `reserved` calls for others.

        Raises ProviderError, the last one.
        """
        tried = 0
        while True:
            self._announce(chunk_id)
            failure = None
            try:
                return call()
            except ProviderError as error:
                failure = error
            tried += 1
            wait = self._wait(failure, tried) if self._left > reserved else None
            if wait is None:
                raise failure
            self._channel.send(Kind.CALL_ENDED)
            self._channel.wait(None, 0, wait)

    def _announce(self, chunk_id: str) -> None:
        self._number += 1
        self._left -= 1
        self._channel.send(
            Kind.CALL_STARTED,
            runner_pb2.CallStarted(chunk_id=chunk_id, call_number=self._number),
        )
        self._channel.receive(Kind.ACK)

    def _wait(self, error: ProviderError, tried: int) -> float | None:
        """Seconds until the next try; None if there is none in this attempt."""
        if tried >= failures.tries(error):
            return None
        wait = error.retry_after_seconds
        if wait is None:
            # Jitter only: no secret hangs on it.
            wait = _FIRST_BACKOFF_SECONDS * 2 ** (tried - 1) * random.uniform(0.5, 1.5)  # noqa: S311
        elif wait > MAX_RETRY_AFTER_SECONDS:
            return None
        return wait if time.monotonic() + wait + _SHORTEST_CALL_SECONDS < self._deadline else None
