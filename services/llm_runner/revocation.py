"""One stream from keyvault that says whose children have to die.

With the stream, the children of a revoked lease die at once. Without it nobody could tell us, so
no new call starts, and after KILL_SECONDS every child that holds a key is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Final

import grpc
from byokeep.keyvault.v1 import lease_pb2
from byokeep.keyvault.v1.lease_pb2_grpc import LeaseServiceStub

from services.common import logs
from services.llm_runner.endings import Ending

if TYPE_CHECKING:  # only in its stubs
    from byokeep.keyvault.v1.lease_pb2_grpc import LeaseServiceAsyncStub

log = logging.getLogger(__name__)

KILL_SECONDS: Final = 5.0
# Four heartbeats: then no new call starts.
_SILENCE_SECONDS: Final = 1.0
# Then the stream is opened anew. Whoever asks a busy keyvault again before it could answer never
# hears anything: each try in vain waits twice as long as the one before.
_PATIENCE_SECONDS: Final = 2.0
_MOST_PATIENCE_SECONDS: Final = 16.0
_RECONNECT_SECONDS: Final = 0.2
_REMEMBERED: Final = 4096

Stop = Callable[[Ending], None]


class RevocationWatch:
    """Knows which leases are held here, and ends their holders."""

    def __init__(self, channel: grpc.aio.Channel, changed: Callable[[], None]) -> None:
        """`changed` is called when calls may start again after a loss, and at a loss."""
        self._stub: LeaseServiceAsyncStub = LeaseServiceStub(channel)
        self._changed = changed
        self._healthy = asyncio.Event()
        self._since = 0
        self._holders: dict[str, Stop] = {}
        # A revocation may come before the answer that names its lease.
        self._revoked: deque[str] = deque(maxlen=_REMEMBERED)
        self._leasing = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._patience = _PATIENCE_SECONDS
        self._quiet: asyncio.TimerHandle | None = None
        self._silent: asyncio.TimerHandle | None = None

    @property
    def healthy(self) -> bool:
        """Whether a revocation would be heard: new calls may start."""
        return self._healthy.is_set()

    def close(self) -> None:
        """Kill nobody any more."""
        for timer in (self._quiet, self._silent):
            if timer is not None:
                timer.cancel()

    @contextlib.asynccontextmanager
    async def leasing(self) -> AsyncIterator[None]:
        """Hold while a lease is asked for and until it is tracked.

        Raises TimeoutError where no revocation would be heard. The stream waits to be opened
        anew meanwhile: what it tells of live leases could miss this one, whose child then dies.
        """
        async with asyncio.timeout(KILL_SECONDS):
            await self._healthy.wait()
        self._leasing += 1
        self._settled.clear()
        try:
            yield
        finally:
            self._leasing -= 1
            if self._leasing == 0:
                self._settled.set()

    def track(self, lease_id: str, stop: Stop) -> None:
        """Call `stop` when the lease is revoked: at once, if it already is."""
        self._holders[lease_id] = stop
        if lease_id in self._revoked:
            stop(Ending.KEY_REVOKED)

    def untrack(self, lease_id: str) -> None:
        """Forget a lease whose child is gone."""
        self._holders.pop(lease_id, None)

    async def watch(self) -> None:
        """Watch for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE_SECONDS):
                    await self._settled.wait()
            code = ""
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                self._patience = _PATIENCE_SECONDS
            except TimeoutError:
                code = "SILENCE"
            except Exception:
                self._lost("DEFECT")
                raise
            self._lost(code)
            await asyncio.sleep(_RECONNECT_SECONDS)

    def _lost(self, code: str) -> None:
        if self.healthy:
            logs.event(log, "revocations_lost", level=logging.WARNING, code=code)
            self._healthy.clear()
            self._changed()

    async def _follow(self) -> None:
        call = self._stub.WatchRevocations(
            lease_pb2.WatchRevocationsRequest(since=self._since), wait_for_ready=True
        )
        patience, self._patience = self._patience, min(2 * self._patience, _MOST_PATIENCE_SECONDS)
        try:
            while True:
                async with asyncio.timeout(patience):
                    message = await call.read()
                if not isinstance(message, lease_pb2.WatchRevocationsResponse):
                    return
                self._heard(message)
                patience = self._patience = _PATIENCE_SECONDS
        finally:
            call.cancel()

    def _heard(self, message: lease_pb2.WatchRevocationsResponse) -> None:
        event = message.WhichOneof("event")
        if event == "resync":
            live = set(message.resync.live_lease_ids)
            self._end([lease for lease in self._holders if lease not in live])
        elif event == "revocation":
            self._revoked.extend(message.revocation.lease_ids)
            self._end(message.revocation.lease_ids)
        self._since = max(self._since, message.sequence)
        self.close()
        loop = asyncio.get_running_loop()
        self._quiet = loop.call_later(_SILENCE_SECONDS, self._lost, "SILENCE")
        self._silent = loop.call_later(KILL_SECONDS, self._all_lost)
        if not self.healthy:
            self._healthy.set()
            logs.event(log, "revocations_heard", sequence=self._since)
            self._changed()

    def _end(self, lease_ids: Iterable[str]) -> None:
        for lease_id in lease_ids:
            stop = self._holders.get(lease_id)
            if stop is not None:
                logs.event(log, "lease_revoked", lease=lease_id)
                stop(Ending.KEY_REVOKED)

    def _all_lost(self) -> None:
        logs.event(log, "revocations_silent", level=logging.ERROR, children=len(self._holders))
        for stop in list(self._holders.values()):
            stop(Ending.KEYVAULT_LOST)
