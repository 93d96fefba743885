"""One attempt over RunnerService.Execute: what is said, what is stored before it is acknowledged.

Assign → Accepted → Proceed → (CallStarted → Ack → ChunkResult → Ack)* → Outcome → Ack.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeAlias

import grpc
from byokeep import names
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.keyvault.v1 import grant_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2, runner_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import from_rpc
from services.orchestrator.domain import Failure, failure_name
from services.orchestrator.grants import Subject
from services.orchestrator.store_attempts import Fenced, Trail, Work

Stream: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"
_GRACE_SECONDS: Final = 30.0
_GOODBYE_SECONDS: Final = 5.0
# The answer is lost with the child, whatever the runner thinks of the call.
_LOSES_ANSWER: Final = frozenset({"CHILD_LOST", "TIMEOUT"})


class Journal(Protocol):
    """Where an attempt's calls and results are stored; each raises Fenced."""

    async def call_started(
        self, work: Work, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made."""

    async def chunk_done(
        self, work: Work, chunk_id: str, findings: Any, dropped: int
    ) -> None:
        """Store a chunk's findings."""


@dataclass(frozen=True, slots=True)
class Result:
    """How an attempt ended; `failure` None: it did its work."""

    failure: Failure | None
    trail: Trail
    verdict: str = "UNSPECIFIED"
    models: tuple[str, ...] = ()


class Execution:
    """Runs one claimed attempt on a runner."""

    def __init__(
        self,
        work: Work,
        journal: Journal,
        runner: runner_pb2_grpc.RunnerServiceStub,
        sign: Callable[[Subject, bytes], SignedEnvelope],
        seconds: int,
    ) -> None:
        """`seconds` is the most that the attempt may take."""
        self._work = work
        self._journal = journal
        self._runner = runner
        self._sign = sign
        self._seconds = seconds
        self._stream: Stream | None = None
        self._writing = asyncio.Lock()
        self._cancelled = False
        self._call_open = False
        self._planned: list[str] = []
        self._done: set[str] = set(work.done_chunks)
        self._result = Result(None, Trail())
        self._answers: Mapping[str, Callable[[Any], Awaitable[bool]]] = {
            "accepted": self._accepted,
            "leased": self._leased,
            "call_started": self._call_started,
            "chunk_result": self._chunk_result,
            "validation_result": self._validation_result,
        }

    @property
    def trail(self) -> Trail:
        """What the runner reported of the child so far."""
        return self._result.trail

    async def run(self) -> Result:
        """Run the attempt to its end. Raises Fenced where it is not ours any more."""
        stream = self._runner.Execute(timeout=self._seconds + _GRACE_SECONDS)
        self._stream = stream
        try:
            await self._say(assign=self._assignment())
            return await self._converse(stream)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            return replace(self._result, failure=self._broken(stream, error))
        finally:
            stream.cancel()

    async def acknowledge(self, sequence: int) -> None:
        """Say that the outcome is stored, and let the runner forget the attempt."""

    async def cancel(self, *, key_revoked: bool = False) -> None:
        """Have the child killed; the outcome follows."""
        self._cancelled = True
        if self._stream is not None:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await self._say(cancel=runner_pb2.Cancel(key_revoked=key_revoked))

    async def _converse(self, stream: Stream) -> Result:
        raise NotImplementedError
