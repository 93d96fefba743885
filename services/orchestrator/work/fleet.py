"""The runners: which there are, how much room each has, and the channel to each.

One name may stand for several runners. It is resolved to all its addresses, again and again, and
each address gets a channel of its own, so that an attempt goes to a runner that has room, and is
taken up again where it runs. What a runner must prove stays its name, whatever address is dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
from byokeep.runner.v1 import runner_pb2
from byokeep.runner.v1.runner_pb2_grpc import RunnerServiceStub

from services.common import logs, observe
from services.common.background import Background
from services.orchestrator.policy.states import Reason

if TYPE_CHECKING:  # only in its stubs
    from byokeep.runner.v1.runner_pb2_grpc import RunnerServiceAsyncStub

log = logging.getLogger(__name__)
Stream: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"
Resolve: TypeAlias = Callable[[str], Awaitable[list[str]]]

#: A runner that says nothing for so long is away: it speaks once a second.
SILENCE_SECONDS: Final = 3.0
_RESOLVE_SECONDS: Final = 5.0
_RECONNECT_SECONDS: Final = 0.25


class Runner:
    """One runner, at one address."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        """Use a channel to it."""
        self.address = address
        self.id = ""
        self._channel = channel
        self._stub: RunnerServiceAsyncStub = RunnerServiceStub(channel)
        self._told: runner_pb2.WatchCapacityResponse | None = None
        # Given to it and not counted in what it told; of those, who has a child there by now.
        self._assigned: set[Place] = set()
        self._accepted: set[Place] = set()
        #: Attempts of ours that run there, or are about to.
        self.busy = 0

    @property
    def answers(self) -> bool:
        """Whether it is heard."""
        return self._told is not None

    @property
    def draining(self) -> bool:
        """Whether it takes nothing more, though it is heard."""
        return self._told is not None and self._told.draining

    @property
    def room(self) -> int:
        """Attempts that it would take now."""
        return 0 if self._told is None else max(0, self._told.free - len(self._assigned))

    def take(self) -> Place:
        """Take a place, so that nobody else of us counts on it."""
        place = Place(self)
        self._assigned.add(place)
        self.busy += 1
        return place

    def accepted(self, place: Place) -> None:
        """See Place."""
        self._accepted.add(place)

    def give_back(self, place: Place) -> None:
        """See Place."""
        self._assigned.discard(place)
        self._accepted.discard(place)
        self.busy -= 1

    def execute(self, timeout: float) -> Stream:
        """Open a stream for an attempt."""
        return self._stub.Execute(timeout=timeout, metadata=observe.outgoing())

    async def watch(self, changed: Callable[[], None]) -> None:
        """Listen to what it says of its room, for ever."""
        while True:
            code = "ENDED"
            try:
                await self._listen(changed)
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            except TimeoutError:
                code = "SILENCE"
            if self._told is not None:
                self._told = None
                logs.event(
                    log, "runner_away", level=logging.WARNING, address=self.address, code=code
                )
                changed()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self, changed: Callable[[], None]) -> None:
        call = self._stub.WatchCapacity(runner_pb2.WatchCapacityRequest())
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    told = await call.read()
                if not isinstance(told, runner_pb2.WatchCapacityResponse):
                    return
                if self._told is None:
                    logs.event(
                        log,
                        "runner_heard",
                        address=self.address,
                        runner=told.runner_id,
                        places=told.places,
                    )
                self.id, self._told = told.runner_id, told
                self._assigned -= self._accepted
                self._accepted.clear()
                changed()
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Place:
    """A place on a runner, for one attempt."""

    def __init__(self, runner: Runner) -> None:
        """Taken; see Runner.take."""
        self.runner = runner

    def accepted(self) -> None:
        """Note that the runner has its child: what it tells from now on counts it."""
        self.runner.accepted(self)

    def give_back(self) -> None:
        """Give it back."""
        self.runner.give_back(self)


class Fleet:
    """Every runner behind one name."""

    def __init__(
        self,
        target: str,
        open_channel: Callable[[str], grpc.aio.Channel],
        background: Background,
        changed: Callable[[], None],
        resolve: Resolve | None = None,
    ) -> None:
        """`target` is `host:port`, or any other gRPC target, which is one runner; `open_channel`
        opens a channel to an address; `changed` is called where there is room, or none any more."""
        self._target = target
        self._open_channel = open_channel
        self._background = background
        self._changed = changed
        self._resolve = resolve or addresses
        self._runners: dict[str, Runner] = {}
        self._had_room = time.monotonic()

    def start(self) -> None:
        """Look for runners from now on."""
        self._background.every("runners", _RESOLVE_SECONDS, self.look)

    async def close(self) -> None:
        """Close every channel."""
        for runner in self._runners.values():
            await runner.close()

    async def look(self) -> None:
        """Resolve the name again: watch who is new, forget who is gone and runs nothing of ours."""
        try:
            found = await self._resolve(self._target)
        except OSError:
            return  # who is known stays known; who is away is seen by its silence
        for address in found:
            if address not in self._runners:
                runner = self._runners[address] = Runner(address, self._open_channel(address))
                self._background.run(_name(address), partial(runner.watch, self._told))
        for address, runner in list(self._runners.items()):
            if address not in found and not runner.answers and not runner.busy:
                del self._runners[address]
                await self._background.end(_name(address))
                await runner.close()

    @property
    def room(self) -> int:
        """Attempts that the runners would take now, of all together."""
        return sum(runner.room for runner in self._heard())

    def lack(self, seconds: float) -> Reason | None:
        """Why none has had room for so long; None where one had."""
        heard = self._heard()
        if time.monotonic() < self._had_room + seconds:
            return None
        if not heard:
            return Reason.RUNNER_UNAVAILABLE
        # A runner that lost keyvault says so; one that is about to stop goes away by itself.
        draining = all(one.draining for one in heard)
        return Reason.KEYVAULT_UNAVAILABLE if draining else Reason.RUNNERS_FULL

    def take(self, most: int) -> list[Place]:
        """Take places, each where there is most room then; as many as there are, `most` at most."""
        places: list[Place] = []
        while len(places) < most:
            best = max(self._heard(), key=lambda runner: runner.room, default=None)
            if best is None or not best.room:
                break
            places.append(best.take())
        return places

    def _told(self) -> None:
        if self.room:
            self._had_room = time.monotonic()
        self._changed()

    def find(self, runner_id: str) -> Runner | None:
        """Return the runner that has an attempt; None while it is not heard."""
        return next((one for one in self._heard() if one.id == runner_id), None)

    async def cancel(self, runner_id: str, attempt_id: str, fence: int) -> None:
        """Have a child killed that nobody of us talks to; nothing where its runner is away."""
        runner = self.find(runner_id)
        if runner is None:
            return
        reattach = runner_pb2.Reattach(attempt_id=attempt_id, fence=fence)
        stream = runner.execute(SILENCE_SECONDS)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(SILENCE_SECONDS):
                await stream.write(runner_pb2.ExecuteRequest(reattach=reattach))
                await stream.write(runner_pb2.ExecuteRequest(cancel=runner_pb2.Cancel()))
                async for response in stream:
                    if response.WhichOneof("message") == "outcome":
                        break
        stream.cancel()

    def _heard(self) -> list[Runner]:
        # One that two addresses lead to is one runner.
        return list({one.id: one for one in self._runners.values() if one.answers}.values())


def _name(address: str) -> str:
    return f"runner {address}"


async def addresses(target: str) -> list[str]:
    """Return every address that `host:port` stands for; another target stands for itself.

    Raises OSError: the name does not resolve now.
    """
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    if not host or not port.isdecimal() or (":" in host.strip("[]") and not host.startswith("[")):
        return [target]
    found = await asyncio.get_running_loop().getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM
    )
    return list(
        dict.fromkeys(
            f"[{where[0]}]:{port}" if family == socket.AF_INET6 else f"{where[0]}:{port}"
            for family, _, _, _, where in found
        )
    )
