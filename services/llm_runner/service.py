"""RunnerService: one stream, one attempt; and a stream of the room that there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from byokeep.runner.v1 import runner_pb2
from byokeep.runner.v1.runner_pb2_grpc import RunnerServiceServicer

from services.common.errors import ByokeepError
from services.llm_runner.attempt import Attempt
from services.llm_runner.attempts import Attempts
from services.llm_runner.endings import Ending


class RunnerService(RunnerServiceServicer):
    """Reads the orchestrator's words into an attempt, and gives out the attempt's; tells the room
    that there is."""

    def __init__(self, attempts: Attempts) -> None:
        """Serve these attempts."""
        self._attempts = attempts

    async def Execute(
        self, requests: AsyncIterator[runner_pb2.ExecuteRequest], context: Any
    ) -> AsyncIterator[runner_pb2.ExecuteResponse]:
        """See the proto."""
        attempt = await self._open(requests)
        reader = self._attempts.attach(attempt)
        feeder = asyncio.create_task(self._feed(attempt, requests))
        # The stream ends with its requests: nobody would acknowledge what is still to come.
        feeder.add_done_callback(lambda _: self._attempts.detach(attempt, reader))
        try:
            async for response in attempt.outbox.read(reader):
                yield response
        finally:
            feeder.cancel()
            self._attempts.detach(attempt, reader)
        if feeder.done() and not feeder.cancelled():
            feeder.result()

    async def WatchCapacity(
        self, request: runner_pb2.WatchCapacityRequest, context: Any
    ) -> AsyncIterator[runner_pb2.WatchCapacityResponse]:
        """See the proto."""
        async for capacity in self._attempts.watch_capacity():
            yield capacity

    async def _open(self, requests: AsyncIterator[runner_pb2.ExecuteRequest]) -> Attempt:
        async for first in requests:
            kind = first.WhichOneof("message")
            if kind == "assign":
                return await self._attempts.start(first.assign)
            if kind == "reattach":
                attempt = self._attempts.find(first.reattach.attempt_id, first.reattach.fence)
                attempt.ack(first.reattach.acked_sequence)
                return attempt
            break
        raise _out_of_order("a stream begins with assign or reattach")

    async def _feed(
        self, attempt: Attempt, requests: AsyncIterator[runner_pb2.ExecuteRequest]
    ) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "ack":
                    attempt.ack(request.ack.sequence)
                case "proceed":
                    attempt.proceed(request.proceed)
                case "cancel":
                    revoked = request.cancel.key_revoked
                    attempt.stop(Ending.KEY_REVOKED if revoked else Ending.CANCELLED)
                case _:
                    raise _out_of_order("assign and reattach come first, and once")


def _out_of_order(message: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, field="message", rule="order"
    )
