"""The runners behind one name: found by every address, watched one by one, their room added up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from byokeep.runner.v1 import runner_pb2_grpc

from services.common.background import Background
from services.orchestrator.work.fleet import SILENCE_SECONDS, Fleet, addresses
from tests.harness.orchestrator import FakeRunner


class Town:
    """Some runners, each at an address or more; and who may be found now."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.background = Background()
        self.changes = 0
        self.fleet = Fleet(
            "runners:1",
            grpc.aio.insecure_channel,
            self.background,
            self._changed,
            self._resolve,
        )
        self._servers: dict[str, grpc.aio.Server] = {}

    def _changed(self) -> None:
        self.changes += 1

    async def _resolve(self, target: str) -> list[str]:
        assert target == "runners:1"
        return list(self.found)

    async def add(self, runner: FakeRunner) -> str:
        server = grpc.aio.server()
        runner_pb2_grpc.add_RunnerServiceServicer_to_server(runner, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._servers[address] = server
        self.found.append(address)
        await self.fleet.look()
        return address

    async def end(self, address: str) -> None:
        await self._servers.pop(address).stop(0)

    async def until(self, wanted, seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not wanted():
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self.background.close()
        await self.fleet.close()
        for server in self._servers.values():
            await server.stop(0)


@asynccontextmanager
async def town() -> AsyncIterator[Town]:
    built = Town()
    try:
        yield built
    finally:
        await built.close()


async def test_rooms_add_up_and_the_emptiest_is_taken() -> None:
    async with town() as here:
        small, large = FakeRunner(places=2), FakeRunner(places=5)
        await here.add(small)
        await here.add(large)
        await here.until(lambda: here.fleet.room == 7)
        taken = here.fleet.take(9)
        assert [one.runner.id for one in taken[:3]] == [large.id] * 3
        assert sorted(one.runner.id for one in taken) == sorted([small.id] * 2 + [large.id] * 5)
        assert (here.fleet.room, here.fleet.take(1)) == (0, [])
        for one in taken:
            one.give_back()
        assert here.fleet.room == 7


async def test_a_place_is_counted_by_one_of_us_alone() -> None:
    """Neither twice (the runner's count, and ours), nor by nobody. Shown to fail where `accepted`
    does nothing: the place is missing as long as the attempt runs."""
    async with town() as here:
        runner = FakeRunner(places=3)
        await here.add(runner)
        await here.until(lambda: here.fleet.room == 3)
        (place,) = here.fleet.take(1)
        await runner.tell(busy=1)
        place.accepted()
        await here.until(lambda: here.fleet.room == 2)
        await runner.tell(busy=0)
        await here.until(lambda: here.fleet.room == 3)
        place.give_back()
        assert here.fleet.room == 3


async def test_a_runner_at_two_addresses_is_one() -> None:
    """As `localhost` is, by IPv4 and IPv6."""
    async with town() as here:
        runner = FakeRunner(places=4)
        await here.add(runner)
        await here.add(runner)
        await here.until(
            lambda: len([one for one in here.fleet._runners.values() if one.answers]) == 2
        )
        assert here.fleet.room == 4


async def test_a_silent_runner_is_away_and_is_heard_again() -> None:
    """Its connection stays open: SIGSTOP does that."""
    async with town() as here:
        runner = FakeRunner(places=4)
        await here.add(runner)
        await here.until(lambda: here.fleet.room == 4)
        assert here.fleet.lack(0) in ("", "RUNNERS_FULL")
        await runner.tell(silent=True)
        await here.until(lambda: here.fleet.room == 0, SILENCE_SECONDS + 5)
        assert (here.fleet.lack(0), here.fleet.find(runner.id)) == ("RUNNER_UNAVAILABLE", None)
        await runner.tell(silent=False)
        await here.until(lambda: here.fleet.room == 4)
        assert here.fleet.find(runner.id) is not None


async def test_why_there_is_no_room() -> None:
    async with town() as here:
        assert here.fleet.lack(60) is None  # it has only just begun to look
        first, second = FakeRunner(places=1), FakeRunner(places=1)
        await here.add(first)
        await here.add(second)
        await here.until(lambda: here.fleet.room == 2)
        await first.tell(draining=True)
        await here.until(lambda: here.fleet.room == 1)
        await second.tell(busy=1)
        await here.until(lambda: here.fleet.room == 0)
        assert here.fleet.lack(0) == "RUNNERS_FULL"
        await second.tell(draining=True)
        await here.until(lambda: here.fleet.lack(0) == "KEYVAULT_UNAVAILABLE")


async def test_a_runner_that_left_is_forgotten_once_it_does_nothing_of_ours() -> None:
    async with town() as here:
        runner = FakeRunner(places=4)
        address = await here.add(runner)
        await here.until(lambda: here.fleet.room == 4)
        (place,) = here.fleet.take(1)
        here.found.clear()
        await here.end(address)
        await here.until(lambda: here.fleet.room == 0)
        await here.fleet.look()
        assert list(here.fleet._runners) == [address]
        place.give_back()
        await here.fleet.look()
        assert here.fleet._runners == {}
        assert here.background.tasks.keys() == set() or here.background.down() == []


async def test_a_name_that_does_not_resolve_now_forgets_nobody() -> None:
    async with town() as here:
        await here.add(FakeRunner(places=4))
        await here.until(lambda: here.fleet.room == 4)

        async def gone(target: str) -> list[str]:
            raise OSError("no such name")

        here.fleet._resolve = gone
        with contextlib.suppress(OSError):
            await here.fleet.look()
        assert here.fleet.room == 4


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("127.0.0.1:4000", ["127.0.0.1:4000"]),
        ("dns:///127.0.0.1:4000", ["127.0.0.1:4000"]),
        ("[::1]:4000", ["[::1]:4000"]),
        ("unix:/run/runner.sock", ["unix:/run/runner.sock"]),
        ("xds:///runners", ["xds:///runners"]),
    ],
)
async def test_addresses_of_a_target(target: str, found: list[str]) -> None:
    assert await addresses(target) == found


async def test_a_name_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - of getaddrinfo
        await addresses("no-such-host.invalid:4000")
