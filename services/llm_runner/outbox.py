"""What an attempt has told the orchestrator, kept until it says that it is stored."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from byokeep.runner.v1 import runner_pb2


class Outbox:
    """Numbers responses, repeats the unacknowledged ones to whoever takes up the stream."""

    def __init__(self) -> None:
        """Start empty, with number 1."""
        self._unacked: deque[runner_pb2.ExecuteResponse] = deque()
        self._sequence = 0
        self._acked = 0
        self._passing: runner_pb2.ExecuteResponse | None = None
        self._closed = False
        self._reader = 0
        self._changed = asyncio.Event()

    def post(self, **message: Any) -> int:
        """Add a response, and return its number."""
        self._sequence += 1
        self._unacked.append(runner_pb2.ExecuteResponse(sequence=self._sequence, **message))
        self._changed.set()
        return self._sequence

    def pass_by(self, **message: Any) -> None:
        """Give a response to whoever reads now: it has no number, and a newer one replaces it."""
        self._passing = runner_pb2.ExecuteResponse(**message)
        self._changed.set()

    def ack(self, sequence: int) -> None:
        """Forget everything up to this number. A number that was never sent changes nothing."""
        if sequence > self._sequence:
            return
        while self._unacked and self._unacked[0].sequence <= sequence:
            self._unacked.popleft()
        self._acked = max(self._acked, sequence)
        self._changed.set()

    def acked(self, sequence: int) -> bool:
        """Whether this response is stored."""
        return self._acked >= sequence

    def close(self) -> None:
        """End the stream once everything is acknowledged."""
        self._closed = True
        self._changed.set()

    def drop(self) -> None:
        """Forget everything and end the stream."""
        self._unacked.clear()
        self.close()

    @property
    def pending(self) -> bool:
        """Whether something is not stored yet."""
        return bool(self._unacked)

    def attach(self) -> int:
        """Return the number of a new reader; an older one's stream ends."""
        self._reader += 1
        self._changed.set()
        return self._reader

    def detach(self, reader: int) -> bool:
        """End a reader's stream; False if it already ended, or another has taken its place."""
        if reader != self._reader:
            return False
        self._reader += 1
        self._changed.set()
        return True

    async def read(self, reader: int) -> AsyncIterator[runner_pb2.ExecuteResponse]:
        """Give out every unacknowledged response, then each new one, until the end."""
        sent = 0
        while reader == self._reader:
            for response in [one for one in self._unacked if one.sequence > sent]:
                sent = response.sequence
                yield response
            passing, self._passing = self._passing, None
            if passing is not None:
                yield passing
                continue
            if self._closed and not self._unacked:
                return
            self._changed.clear()
            if reader == self._reader and not (self._unacked and self._unacked[-1].sequence > sent):
                await self._changed.wait()
