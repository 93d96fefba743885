"""One attempt in the parent: a child, its lease, and what the orchestrator is told of both."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from byokeep.keyvault.v1 import lease_pb2
from byokeep.names import provider_id
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common import logs, tracing
from services.llm_runner import endings
from services.llm_runner.channel import ChannelClosedError, Kind
from services.llm_runner.endings import Ending
from services.llm_runner.leases import LeaseRefusedError, Leases
from services.llm_runner.outbox import Outbox
from services.llm_runner.revocation import RevocationWatch
from services.llm_runner.sockets import Dialer
from services.llm_runner.spawner import Child

log = logging.getLogger(__name__)

_LAST_WORD_SECONDS: Final = 2.0
_KILLED_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Means:
    """What all attempts share."""

    dialer: Dialer
    leases: Leases
    watch: RevocationWatch


class _Call(enum.Enum):
    NONE = enum.auto()
    # Announced; made only once the orchestrator has stored that.
    ANNOUNCED = enum.auto()
    OPEN = enum.auto()


class Attempt:
    """Relays between the child and the orchestrator, and outlives neither."""

    def __init__(self, assign: runner_pb2.Assign, child: Child, means: Means) -> None:
        """Take over a fresh child; `run` does the rest."""
        self.id = assign.attempt_id
        self.fence = assign.fence
        self.outbox = Outbox()
        self._provider = assign.provider
        self._seconds = assign.timeout_seconds
        self._child = child
        self._means = means
        self._proceed: asyncio.Future[runner_pb2.Proceed | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._call = _Call.NONE
        self._call_sequence = 0
        self._span: Any = None
        self._report = lease_pb2.PlaintextReport(process_id=child.pid)
        self._lease_id = ""
        self._verdict = key_pb2.VALIDATION_VERDICT_UNSPECIFIED
        self._told: runner_pb2.Outcome | None = None
        self._ending: Ending | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._over = False
        self._answers: dict[Kind, Callable[[bytes], Awaitable[None]]] = {
            Kind.ACCEPTED: self._accepted,
            Kind.OPENED: self._opened,
            Kind.CALL_STARTED: self._call_started,
            Kind.CALL_PROGRESS: self._call_progress,
            Kind.CHUNK_SPLIT: self._chunk_split,
            Kind.DIAL: self._dial,
            Kind.CHUNK_RESULT: self._chunk_result,
            Kind.VALIDATION_RESULT: self._validation_result,
            Kind.END: self._end,
        }

    @property
    def over(self) -> bool:
        """Whether the child is gone and the outcome is told."""
        return self._over

    def proceed(self, message: runner_pb2.Proceed | None) -> None:
        """Take the orchestrator's word to go on, the first one."""
        if not self._proceed.done():
            self._proceed.set_result(message)

    def ack(self, sequence: int) -> None:
        """Take note that a response is stored: a call that waits for it is made."""
        self.outbox.ack(sequence)
        self.resume()

    def resume(self) -> None:
        """Let an announced call be made, if it is stored and a revocation would be heard."""
        if (
            self._call is _Call.ANNOUNCED
            and self.outbox.acked(self._call_sequence)
            and self._means.watch.healthy
            and self._ending is None
        ):
            self._call = _Call.OPEN
            self._span = tracing.begin("provider call", provider=provider_id(self._provider))
            with contextlib.suppress(ChannelClosedError):
                self._child.channel.answer(Kind.ACK)

    def stop(self, ending: Ending) -> None:
        """Kill the child; the first reason counts."""
        if self._ending is None:
            self._ending = ending
        self._child.kill()
        self.proceed(None)

    async def run(self, assign: bytes) -> None:
        """Run the attempt from its serialized assignment to its outcome."""
        self._limit(self._seconds)
        # A child that dies while the orchestrator is awaited must not be awaited with it.
        gone = asyncio.create_task(self._child.gone.wait())
        gone.add_done_callback(lambda _: self.proceed(None))
        try:
            with contextlib.suppress(ChannelClosedError):
                await self._child.channel.send(Kind.ASSIGN, assign)
                del assign
                await self._converse()
        except Exception as error:
            logs.failure(log, "attempt_broke", error, attempt=self.id)
        finally:
            await self._bury(gone)
        await self._finish()

    async def _converse(self) -> None:
        while self._told is None:
            kind, payload = await self._child.channel.receive()
            await self._answers[kind](payload)

    async def _accepted(self, payload: bytes) -> None:
        accepted = runner_pb2.Accepted.FromString(payload)
        accepted.process_id = self._child.pid
        self.outbox.post(accepted=accepted)
        proceed = await self._proceed
        if proceed is None:
            return
        try:
            leased = await self._lease(proceed, accepted)
        except LeaseRefusedError as error:
            self._told = error.outcome
            self._child.kill()
            return
        await self._child.channel.send(Kind.PROCEED, proceed)
        await self._child.channel.send(Kind.LEASE, leased)
        self.outbox.post(leased=runner_pb2.Leased(lease_id=leased.lease_id))

    async def _lease(
        self, proceed: runner_pb2.Proceed, accepted: runner_pb2.Accepted
    ) -> lease_pb2.LeaseKeyResponse:
        asked = time.monotonic()
        try:
            async with self._means.watch.leasing():
                leased = await self._means.leases.lease(proceed.grant, accepted)
                self._lease_id = leased.lease_id
                self._means.watch.track(leased.lease_id, self.stop)
        except TimeoutError:
            leased = None
        if leased is None:
            raise LeaseRefusedError(
                runner_pb2.Outcome(
                    failure=review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE,
                    message="keyvault's revocation stream is lost; no key is leased without it.",
                )
            )
        self._limit(asked + leased.life.ToNanoseconds() / 1e9 - time.monotonic())
        return leased

    async def _opened(self, payload: bytes) -> None:
        self._report.open_time.CopyFrom(lease_pb2.PlaintextReport.FromString(payload).open_time)

    async def _call_started(self, payload: bytes) -> None:
        started = runner_pb2.CallStarted.FromString(payload)
        self._call = _Call.ANNOUNCED
        self._call_sequence = self.outbox.post(call_started=started)

    async def _call_progress(self, payload: bytes) -> None:
        self.outbox.pass_by(call_progress=runner_pb2.CallProgress.FromString(payload))

    def _answered(self) -> None:
        self._call = _Call.NONE
        tracing.end(self._span)

    async def _chunk_split(self, payload: bytes) -> None:
        self._answered()
        self.outbox.post(chunk_split=runner_pb2.ChunkSplit.FromString(payload))

    async def _dial(self, payload: bytes) -> None:
        dialled: socket.socket | key_pb2.UnreachableCause.ValueType
        dialled = key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
        if self._call is _Call.OPEN:
            asked = payload.decode("ascii", "replace")
            dialled = await self._means.dialer.dial(self._provider, asked)
        if isinstance(dialled, int):
            self._child.channel.answer(Kind.DIALLED, bytes([dialled]))
        else:
            with dialled:
                self._child.channel.answer(Kind.DIALLED, sock=dialled)

    async def _chunk_result(self, payload: bytes) -> None:
        self._answered()
        self.outbox.post(chunk_result=runner_pb2.ChunkResult.FromString(payload))

    async def _validation_result(self, payload: bytes) -> None:
        self._answered()
        result = runner_pb2.ValidationResult.FromString(payload)
        self._verdict = result.verdict
        self.outbox.post(validation_result=result)

    async def _end(self, payload: bytes) -> None:
        self._told = runner_pb2.Outcome.FromString(payload)

    def _limit(self, seconds: float) -> None:
        """Kill the child after this time, if that is sooner than what was said before."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self.stop, Ending.TIMEOUT)

    async def _bury(self, gone: asyncio.Task[bool]) -> None:
        """Wait until the child is gone: a child that said its last word ends by itself."""
        if self._told is None:
            self._child.kill()
        await asyncio.wait({gone}, timeout=_LAST_WORD_SECONDS)
        self._child.kill()
        await asyncio.wait({gone}, timeout=_KILLED_SECONDS)
        self._child.channel.close()
        if self._timer is not None:
            self._timer.cancel()
        if not gone.done():
            # Only a process stuck in the kernel outlives SIGKILL.
            logs.event(log, "child_stuck", level=logging.ERROR, pid=self._child.pid)
            gone.cancel()

    async def _finish(self) -> None:
        tracing.end(self._span)
        ending = self._ending or Ending.LOST
        self._report.close_time.FromNanoseconds(self._child.close_time or time.time_ns())
        if self._lease_id:
            self._means.watch.untrack(self._lease_id)
            await self._means.leases.release(
                self._lease_id,
                endings.lease_outcome(self._told, ending, self._verdict),
                self._report,
            )
        outcome = self._told or endings.outcome(ending, call_in_flight=self._call is _Call.OPEN)
        outcome.report.CopyFrom(self._report)
        logs.event(
            log,
            "attempt_ended",
            attempt=self.id,
            pid=self._child.pid,
            failure=review_pb2.FailureReason.Name(outcome.failure),
            lease=self._lease_id,
        )
        self.outbox.post(outcome=outcome)
        self.outbox.close()
        self._over = True
