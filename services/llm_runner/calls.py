"""The provider calls of one attempt: each is announced, stored, and made once.

Who tries again is the orchestrator, with a new attempt: it alone knows how often, and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from byokeep.runner.v1 import runner_pb2

from services.llm_runner.channel import ChildEnd, Kind

T = TypeVar("T")


class Calls:
    """Counts calls; a call's number is stored by the orchestrator before it is made."""

    def __init__(self, channel: ChildEnd, limit: int) -> None:
        """`limit` is the most calls of this attempt."""
        self._channel = channel
        self._number = 0
        self.left = limit
        """Calls that may still be made."""

    def make(self, chunk_id: str, call: Callable[[], T]) -> T:
        """Make a call. Raises what it raises."""
        self._number += 1
        self.left -= 1
        self._channel.send(
            Kind.CALL_STARTED,
            runner_pb2.CallStarted(chunk_id=chunk_id, call_number=self._number),
        )
        self._channel.receive(Kind.ACK)
        return call()
