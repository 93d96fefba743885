"""57 `half_open`: a peer that neither answers nor closes is noticed, logged and given up in time.

A stopped process (SIGSTOP) is such a peer: its kernel goes on answering TCP's keepalives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import grpc
import psycopg
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.postgres import ROLES, EmbeddedPostgres, new_password
from deploy.local.processes import wait_for
from services.keyvault import migrate as keyvault_migrate
from services.orchestrator.migrate import migrate as orchestrator_migrate
from tests.harness import keyvault as kv
from tests.harness import orchestrator as orch
from tests.harness import scratch
from tests.harness.services import Service, service

# What `postgres.PING_SECONDS` and `postgres.ROUND_TRIP_SECONDS` add up to, and a loaded machine.
NOTICED = 60.0
OF_ORCHESTRATOR = "byokeep-orchestrator%"
OF_KEYVAULT = "byokeep-keyvault%"


class Server:
    """A PostgreSQL of its own, whose processes can be stopped."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.postgres = postgres
        self.urls: dict[str, str] = {}
        self._databases = 0
        self._passwords = {role: new_password() for role in ROLES}
        self._stopped: set[int] = set()

    def database(self, zone: str, migrate: Callable[[str], object]) -> str:
        """The URL of a fresh database of a zone's, migrated."""
        self._databases += 1
        name, role = f"{zone}_{self._databases}", f"byokeep_{zone}"
        self.urls[zone] = self.postgres.create_database(name, role, self._passwords[role])
        migrate(self.urls[zone])
        return self.urls[zone]

    def backends(self, zone: str, application: str, query: str = "%") -> list[int]:
        """Process ids of the backends of an application that are not stopped."""
        with psycopg.connect(self.urls[zone], autocommit=True) as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s AND query LIKE %s",
                (application, query),
            ).fetchall()
        return [pid for (pid,) in rows if pid not in self._stopped]

    def stop(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self._stopped.add(pid)

    def stop_all(self, zone: str, application: str) -> None:
        """The backends, and who would start new ones."""
        pids = self.backends(zone, application)
        self.stop(self.postgres.pid, *pids)

    def go_on(self) -> None:
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """One for this module: a stopped backend may hold what all others wait for."""
    directory = scratch.folder()
    postgres = EmbeddedPostgres(directory)
    try:
        postgres.start()
        yield Server(postgres)
    finally:
        postgres.stop(discard=True)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def server(own_server: Server) -> Iterator[Server]:
    yield own_server
    own_server.go_on()


@pytest.fixture
def url(server: Server) -> Callable[[str], str]:
    migrations = {"keyvault": keyvault_migrate.upgrade, "orchestrator": orchestrator_migrate}
    return lambda zone: server.database(zone, migrations[zone])


def migrated(started: Service) -> None:
    """keyvault's own keys are made by its migration, which prints the public ones."""
    started.start("migrate")
    assert started.ended(60)[0] == 0, started.said()


def serves(started: Service) -> None:
    started.start()
    started.until(started.serving)


@pytest.mark.parametrize(
    ("zone", "application"),
    [
        pytest.param("keyvault", OF_KEYVAULT, marks=pytest.mark.deep),
        ("orchestrator", OF_ORCHESTRATOR),
    ],
)
def test_half_open_database_is_noticed_and_left(zone, application, server, url, tmp_path):
    """All its connections are silent; the server takes new ones. Shown to fail with psycopg's own
    connections in place of `postgres.Connection`: deaf for ever."""
    with service(zone, tmp_path, url(zone)) as started:
        if zone == "keyvault":
            migrated(started)
        serves(started)
        started.until(lambda: server.backends(zone, application))
        server.stop(*server.backends(zone, application))
        started.until(lambda: started.serving() is False, NOTICED)
        started.until(lambda: started.events("database_silent"), NOTICED)
        started.until(started.serving, NOTICED)
        assert started.terminate() == 0


@pytest.mark.deep
@pytest.mark.parametrize(
    ("zone", "application"), [("keyvault", OF_KEYVAULT), ("orchestrator", OF_ORCHESTRATOR)]
)
def test_half_open_server_keeps_no_service_from_its_end(zone, application, server, url, tmp_path):
    """No SIGKILL is needed. Shown to fail with a pool whose `close` has no limit."""
    with service(zone, tmp_path, url(zone)) as started:
        if zone == "keyvault":
            migrated(started)
        serves(started)
        server.stop_all(zone, application)
        started.until(lambda: started.serving() is False, NOTICED)
        began = time.monotonic()
        started.terminate(60)
        assert time.monotonic() - began < 30


async def test_half_open_database_is_told_to_each_caller_in_time(server, url, tmp_path):
    """A typed error at every try, never the caller's own deadline; and all is well afterwards.

    Shown to fail with `deadline.enter` left out of the gate: DEADLINE_EXCEEDED.
    """
    database = await asyncio.to_thread(url, "orchestrator")
    async with orch.running(database, tmp_path) as stack:
        await stack.tenant()
        reviews = stack.client("acme").reviews
        request = review_pb2.ListReviewsRequest(parent="tenants/acme")
        await reviews.ListReviews(request, timeout=20)
        await asyncio.to_thread(server.stop_all, "orchestrator", OF_ORCHESTRATOR)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await reviews.ListReviews(request, timeout=3)
            assert error_info(failed.value).reason == "DEPENDENCY_UNAVAILABLE"
        server.go_on()
        await asyncio.wait_for(until_answered(lambda: reviews.ListReviews(request, timeout=3)), 60)


async def test_half_open_database_is_told_by_keyvault_in_time(server, url, tmp_path):
    deployment = kv.Deployment(tmp_path, await asyncio.to_thread(url, "keyvault"))
    async with kv.running(deployment) as keyvault:
        request = custody_pb2.ListKeysRequest(parent="tenants/acme")
        await keyvault.custody.ListKeys(request, timeout=20)
        await asyncio.to_thread(server.stop_all, "keyvault", OF_KEYVAULT)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await keyvault.custody.ListKeys(request, timeout=3)
            assert error_info(failed.value).reason == "DEPENDENCY_UNAVAILABLE"
        server.go_on()
        again = lambda: keyvault.custody.ListKeys(request, timeout=3)  # noqa: E731
        await asyncio.wait_for(until_answered(again), 60)


async def until_answered(call: Callable[[], object]) -> None:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call()
            return
        await asyncio.sleep(0.1)


async def test_half_open_ear_hears_again(server, url, tmp_path):
    """A connection that listens is silent by nature: it is pinged. Shown to fail with
    `connection.notifies()` in place of `postgres.notices`."""
    database = await asyncio.to_thread(url, "orchestrator")
    async with orch.running(database, tmp_path):

        async def ears(wanted: int) -> list[int]:
            async with asyncio.timeout(NOTICED):
                # What a connection was asked last: to listen, or the ping.
                while len(found := await asyncio.to_thread(ear_pids)) < wanted:
                    await asyncio.sleep(0.1)
            return found

        def ear_pids() -> list[int]:
            return server.backends("orchestrator", OF_ORCHESTRATOR, "LISTEN byokeep%")

        before = await ears(1)
        server.stop(*before)
        assert set(await ears(1)).isdisjoint(before)


def health(stack, name: str) -> bool:
    description = json.loads((stack.root / "stack.json").read_text())
    address = f"127.0.0.1:{description['ports'][f'{name}-health']}"
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=20
        )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def list_keys(connection, timeout: float) -> None:
    connection.keys.ListKeys(key_pb2.ListKeysRequest(parent="tenants/demo"), timeout=timeout)


def test_half_open_keyvault_is_noticed_by_who_depends_on_it(stack):
    """The revocation stream is lost, and the runner says so; who asks for keys is told which
    service does not answer. All is well when it goes on."""
    assert health(stack, "runner")
    pid = stack.process("keyvault").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait_for(lambda: not health(stack, "runner"), NOTICED)
        assert "revocations_lost" in stack.log("runner")
        with stack.connect("key-admin") as connection:
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as failed:
                    list_keys(connection, timeout=3)
                info = error_info(failed.value)
                assert (info.reason, info.metadata["dependency"]) == (
                    "DEPENDENCY_UNAVAILABLE",
                    "keyvault",
                )
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait_for(lambda: health(stack, "runner"), NOTICED), stack.log("runner")[-3000:]
    with stack.connect("key-admin") as connection:
        list_keys(connection, timeout=20)
