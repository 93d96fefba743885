"""Floods: before a caller is authorised, and of one tenant after; each with a victim beside it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import audit_pb2, custody_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2
from byokeep.runner.v1 import runner_pb2, runner_pb2_grpc
from byokeep.transport import TlsFiles, aio_channel, channel_credentials, channel_options
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import interceptor, load, server, wire
from services.common.background import Background
from services.orchestrator.store.reviews import ReviewRow, ReviewStore, SealedFindings
from tests.harness import keyvault as kv
from tests.harness import orchestrator as harness
from tests.harness.parts import Replica, Shared
from tests.harness.replica import replicas

_SUBMIT = "/byokeep.orchestrator.v1.ReviewService/SubmitReview"
_DRY_RUN = "/byokeep.orchestrator.v1.ReviewService/DryRunReview"
_CONNECTIONS = 20
_MEBIBYTE = 1024 * 1024


@pytest.fixture
async def stack(orchestrator_database_url: str, tmp_path: Path) -> AsyncIterator[harness.Stack]:
    async with harness.running(orchestrator_database_url, tmp_path) as running:
        for tenant in ("acme", "flood"):
            await running.tenant(tenant)
            running.keyvault.add(tenant)
        yield running


async def victim(stack: harness.Stack) -> None:
    """An ordinary call of another tenant and caller."""
    await stack.client("acme").settings.GetSettings(
        settings_pb2.GetSettingsRequest(name="tenants/acme/settings"), timeout=20
    )


@contextlib.asynccontextmanager
async def channel(
    stack: harness.Stack, spiffe_id: str, address: str = ""
) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of an identity, by itself."""
    name = spiffe_id.replace("/", "-")
    files = stack.authority.issue(stack.folder / name, spiffe_id=spiffe_id)
    tls = TlsFiles(files.certificate, files.key, stack.folder / "ca.pem")
    async with aio_channel(address or stack.address, "orchestrator.test", tls) as opened:
        yield opened


def half(opened: grpc.aio.Channel, method: str = _SUBMIT) -> Any:
    """A call whose caller sends nothing of its request."""
    return opened.stream_unary(method)()


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async with asyncio.timeout(60):
            await call
    return raised.value


@pytest.mark.parametrize("identity", ["nobody", "orchestrator"])
async def test_large_messages_take_no_memory_of_keyvault(
    keyvault_database_url: str, tmp_path: Path, identity: str
) -> None:
    """Also from an identity without any role. Was shown to fail with gRPC's limit at 16 MiB."""
    deployment = kv.Deployment(tmp_path, keyvault_database_url)
    deployment.ca.issue(tmp_path / "nobody", spiffe_id="nobody")
    async with replicas(deployment, 1) as (keyvault,):
        await keyvault.create_tenant()
        process = psutil.Process(keyvault.process.pid)
        before = process.memory_info().rss
        method = "/byokeep.keyvault.v1.CustodyService/GetKey"
        channels = [
            aio_channel(keyvault.target(), kv.NAME, deployment.files(identity))
            for _ in range(_CONNECTIONS)
        ]
        flood = [
            asyncio.ensure_future(opened.unary_unary(method)(bytes(15 * _MEBIBYTE)))
            for opened in channels
        ]
        most = 0
        while not all(call.done() for call in flood):
            await asyncio.wait(flood, timeout=0.02)
            most = max(most, process.memory_info().rss - before)
        answer = await keyvault.custody.ListKeys(custody_pb2.ListKeysRequest(parent="tenants/acme"))
        assert not answer.keys
        for opened in channels:
            await opened.close()
        await asyncio.gather(*flood, return_exceptions=True)
    assert most < 60 * _MEBIBYTE


async def test_who_may_not_call_is_told_before_it_sends(stack: harness.Stack) -> None:
    """Was shown to fail with unary handlers: gRPC waits for the whole request first."""
    async with channel(stack, "nobody") as nobody:
        error = await refused(half(nobody))
    assert error_info(error).reason == "CALLER_NOT_ALLOWED"
    await victim(stack)


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is made after this has room for 20 calls of a caller."""
    monkeypatch.setattr(load, "PER_CALLER", 20)


async def test_calls_of_one_method_hold_up_no_other_method_of_their_identity(
    stack: harness.Stack,
) -> None:
    """One service speaks for many tenants: a thousand watches for one of them kept the settings of
    another waiting for eight seconds. Was shown to fail with one line for each identity: the call
    waited until its deadline."""
    async with channel(stack, "client/acme") as shared:
        watch = "/byokeep.orchestrator.v1.ReviewService/WatchReview"
        calls = [shared.stream_stream(watch)() for _ in range(30)]
        reads = [asyncio.ensure_future(call.read()) for call in calls]
        settings = "/byokeep.orchestrator.v1.SettingsService/GetSettings"
        wanted = settings_pb2.GetSettingsRequest(name="tenants/acme/settings")
        for _ in range(3):
            await shared.unary_unary(settings)(wanted.SerializeToString(), timeout=20)
        for call in calls:
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def test_calls_that_send_nothing_hold_up_their_own_identity_alone(
    few_calls: None, stack: harness.Stack
) -> None:
    """Was shown to fail without the limit of calls of one caller: all of them waited."""
    async with channel(stack, "client/flood-2") as flood:
        calls = [asyncio.ensure_future(half(flood)) for _ in range(30)]
        done, waiting = await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 10:
            more, waiting = await asyncio.wait(
                waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED
            )
            assert more
            done |= more
        await victim(stack)
        assert len(waiting) == 20
        for call in done:
            error = call.exception()
            assert error_info(error).reason == "OVERLOADED"
            assert error_info(error).retry_after_seconds
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_request_that_does_not_come_is_not_waited_for(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was shown to fail without a limit on reading: the call hung."""
    monkeypatch.setattr(interceptor, "READ_SECONDS", 0.05)
    async with channel(stack, "client/flood") as flood:
        error = await refused(half(flood))
    assert error_info(error).reason == "INVALID_FIELD"


class Runner:
    """A service of one RunnerService, for a server of its own."""

    def __init__(self) -> None:
        self.background = Background()

    def register(self, grpc_server: Any) -> None:
        runner_pb2_grpc.add_RunnerServiceServicer_to_server(harness.FakeRunner(), grpc_server)


@contextlib.asynccontextmanager
async def runner(stack: harness.Stack) -> AsyncIterator[str]:
    """Serve what an orchestrator talks to; give its address."""
    callers = f"orchestrator=spiffe://{harness.DOMAIN}/orchestrator/*"
    settings = dataclasses.replace(stack.settings, callers=callers)
    grpc_server, port = await server.build(settings, Runner())
    await grpc_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await grpc_server.stop(None)


@pytest.mark.parametrize("method", ["Execute", "WatchCapacity"])
async def test_an_identity_has_so_many_streams_at_once(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Over all of its connections, and also where a stream says nothing. Was shown to fail without
    `Load.present`: none was refused."""
    path = f"/byokeep.runner.v1.RunnerService/{method}"
    declared = load.declared(path)
    assert 0 < declared.per_caller < 4096
    few = dataclasses.replace(declared, per_caller=6)
    monkeypatch.setattr(load, "declared", lambda _: few)
    async with runner(stack) as address, contextlib.AsyncExitStack() as opened:
        calls = []
        for _ in range(3):
            flood = await opened.enter_async_context(channel(stack, "orchestrator/a", address))
            calls += [flood.stream_stream(path)() for _ in range(4)]
        if method == "WatchCapacity":
            await asyncio.gather(*(call.write(b"") for call in calls))
        errors = [call.code() for call in calls]
        over, under_way = await asyncio.wait(
            [asyncio.ensure_future(one) for one in errors], timeout=5
        )
        assert (len(over), len(under_way)) == (6, 6)
        assert {one.result() for one in over} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        other = await opened.enter_async_context(channel(stack, "orchestrator/b", address))
        victims = runner_pb2_grpc.RunnerServiceStub(other).WatchCapacity(
            runner_pb2.WatchCapacityRequest()
        )
        assert (await victims.read()).places
        # What has ended counts no more.
        for call in calls:
            call.cancel()
        again = runner_pb2_grpc.RunnerServiceStub(flood).WatchCapacity(
            runner_pb2.WatchCapacityRequest()
        )
        assert (await again.read()).places


async def test_a_stream_that_says_nothing_is_not_waited_for(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was shown to fail with the first message read like those after it: the stream stood."""
    monkeypatch.setattr(interceptor, "READ_SECONDS", 0.05)
    async with runner(stack) as address, channel(stack, "orchestrator/a", address) as flood:
        silent = flood.stream_stream("/byokeep.runner.v1.RunnerService/Execute")()
        async with asyncio.timeout(60):
            assert await silent.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_tenant_has_so_many_dry_runs_at_once(stack: harness.Stack) -> None:
    """Was shown to fail without `Load.enter`: none was refused."""
    request = review_pb2.DryRunReviewRequest(
        parent="tenants/flood",
        input=review_pb2.ReviewInput(
            repository="a/b", diff=b"--- a/x\n+++ b/x\n@@ -0,0 +1,9000 @@\n" + b"+\n" * 9_000
        ),
    )
    calls = [stack.client("flood").reviews.DryRunReview(request) for _ in range(40)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    errors = [error for error in answers if isinstance(error, grpc.aio.AioRpcError)]
    limit = load.declared(_DRY_RUN).per_tenant
    assert limit <= len(answers) - len(errors) < 40
    assert {error_info(error).reason for error in errors} == {"OVERLOADED"}
    assert {error_info(error).metadata["limit"] for error in errors} == {str(limit)}
    assert all(error_info(error).retry_after_seconds for error in errors)
    # What has ended counts no more.
    await stack.client("flood").reviews.DryRunReview(request)


async def test_a_tenant_has_so_many_bytes_at_once(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was shown to fail without the bytes counted: none was refused."""
    monkeypatch.setattr(load, "TENANT_BYTES", 30_000)
    request = review_pb2.DryRunReviewRequest(
        parent="tenants/flood",
        input=review_pb2.ReviewInput(
            repository="a/b", diff=b"--- a/x\n+++ b/x\n@@ -0,0 +1,9000 @@\n" + b"+\n" * 9_000
        ),
    )
    calls = [stack.client("flood").reviews.DryRunReview(request) for _ in range(4)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    errors = [error for error in answers if isinstance(error, grpc.aio.AioRpcError)]
    assert errors
    assert {error_info(error).metadata["limit"] for error in errors} == {"30000"}


async def test_a_tenant_has_so_many_looks_of_its_watches_at_once(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand watches of one review held up every other tenant for seven seconds. Was shown to
    fail without `load.turn` in WatchReview: sixty."""
    go = asyncio.Event()

    async def script(talk: harness.Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await go.wait()
        await talk.result("c1", harness.finding())
        await talk.end()

    stack.runner.default = script
    review = await stack.submit("flood")
    looking: list[int] = []
    get, now = ReviewStore.get, 0

    async def counted(self: ReviewStore, tenant: str, review_id: str) -> ReviewRow:
        nonlocal now
        now += 1
        looking.append(now)
        try:
            return await get(self, tenant, review_id)
        finally:
            now -= 1

    request = review_pb2.WatchReviewRequest(name=review.name)
    watches = [stack.client("flood").reviews.WatchReview(request, timeout=60) for _ in range(60)]
    await asyncio.gather(*(watch.read() for watch in watches))
    monkeypatch.setattr(ReviewStore, "get", counted)
    go.set()  # all of them are told of the change at once

    async def last(watch: Any) -> Any:
        found = review
        while found.state != review_pb2.REVIEW_STATE_COMPLETED:
            found = (await watch.read()).review
        return found

    ended = await asyncio.gather(*(last(watch) for watch in watches))
    assert {len(one.findings) for one in ended} == {1}
    assert max(looking) <= load.RUN_AT_ONCE


def many(go: asyncio.Event) -> harness.Script:
    """A review with 400 kB of findings."""

    async def script(talk: harness.Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await go.wait()
        long = harness.finding()
        long.message = "m" * 4_000
        await talk.result("c1", *[long] * 100)
        await talk.end()

    return script


@contextlib.asynccontextmanager
async def taking_nothing(stack: harness.Stack) -> AsyncIterator[grpc.aio.Channel]:
    """A connection whose calls get no more of an answer than is read: of a stream, and where gRPC
    does not look how fast the line is."""
    files = stack.authority.issue(stack.folder / "stalls", spiffe_id="client/flood")
    pem = TlsFiles(files.certificate, files.key, stack.folder / "ca.pem").load()
    options = [*channel_options("orchestrator.test"), ("grpc.http2.bdp_probe", 0)]
    credentials = channel_credentials(pem.certificate, pem.key, pem.ca)
    async with grpc.aio.secure_channel(stack.address, credentials, options=options) as opened:
        yield opened


async def test_answers_that_nobody_takes_are_bounded(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand answers of 200 kB that their caller did not read took 1.3 GB, and there was no
    bound: a call counted until its answer was made. Was shown to fail without `hold` in
    `_Call.one`, and with `_when_over` acting at once: nobody was refused."""
    monkeypatch.setattr(load, "TENANT_BYTES", 2 * _MEBIBYTE)
    go = asyncio.Event()
    go.set()
    stack.runner.default = many(go)
    review = await stack.ended(await stack.submit("flood"))
    request = review_pb2.GetReviewRequest(name=review.name)
    get = stack.client("flood").reviews.GetReview
    method = "/byokeep.orchestrator.v1.ReviewService/GetReview"
    async with taking_nothing(stack) as flood:
        unread = [flood.unary_stream(method)(request.SerializeToString()) for _ in range(10)]
        await until(lambda: is_refused(get(request)))
        await victim(stack)
        for call in unread:
            call.cancel()
        await until(lambda: is_answered(get(request)))


async def test_watches_that_nobody_reads_are_bounded(
    stack: harness.Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait, and go on once there is room. Was shown to fail with `Load.run` in place of
    `run_with_room`: all thirty had looked."""
    monkeypatch.setattr(load, "TENANT_BYTES", 2 * _MEBIBYTE)
    go = asyncio.Event()
    stack.runner.default = many(go)
    review = await stack.submit("flood")
    request = review_pb2.WatchReviewRequest(name=review.name).SerializeToString()
    looks: list[str] = []
    findings = ReviewStore.findings

    async def counted(
        self: ReviewStore, review_id: str, after: int, most_bytes: int
    ) -> SealedFindings:
        looks.append(review_id)
        return await findings(self, review_id, after, most_bytes)

    monkeypatch.setattr(ReviewStore, "findings", counted)
    method = "/byokeep.orchestrator.v1.ReviewService/WatchReview"
    async with taking_nothing(stack) as flood:
        watches = [flood.unary_stream(method)(request) for _ in range(30)]
        await asyncio.gather(*(watch.read() for watch in watches))
        go.set()
        listing = review_pb2.ListReviewsRequest(parent="tenants/flood")
        await until(lambda: is_refused(stack.client("flood").reviews.ListReviews(listing)))
        for _ in range(50):
            await victim(stack)
        looked = len(looks)
        for watch in watches[1:]:
            watch.cancel()
        found = review
        while found.state != review_pb2.REVIEW_STATE_COMPLETED:
            found = review_pb2.WatchReviewResponse.FromString(await watches[0].read()).review
    # Some were at it when the room was used up.
    assert looked <= load.TENANT_BYTES // found.ByteSize() + 1 + load.RUN_AT_ONCE < len(watches)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


async def is_refused(call: Awaitable[Any]) -> bool:
    """Whether a call is refused for its tenant's load."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_info(error).metadata["limit"] == str(load.TENANT_BYTES)
    return False


async def is_answered(call: Awaitable[Any]) -> bool:
    return not await is_refused(call)


async def test_a_million_elements_are_not_looked_at(stack: harness.Stack) -> None:
    """2 MB of empty context files, validated one by one. Was shown to fail without
    `wire.require_few`: the loop stood still for ten seconds and more."""
    field = review_pb2.ReviewInput.DESCRIPTOR.fields_by_name["context_files"].number
    wanted = review_pb2.ReviewInput(repository="a/b").SerializeToString()
    wanted += bytes((field << 3 | 2, 0)) * 1_000_000
    size = len(wanted)
    length = bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21))
    request = review_pb2.DryRunReviewRequest(parent="tenants/flood").SerializeToString()
    request += b"\x12" + length + wanted
    async with channel(stack, "client/flood") as flood:
        error = await refused(flood.unary_unary(_DRY_RUN)(request, timeout=5))
    assert error_info(error).reason == "INVALID_FIELD"
    await victim(stack)


async def test_small_requests_are_small(stack: harness.Stack) -> None:
    """Was shown to fail without `Load.request_bytes`: the call was answered."""
    name = "tenants/flood/settings"
    request = settings_pb2.GetSettingsRequest(name=name).SerializeToString()
    request += b"\x7a" + b"\x80\x80\x08" + bytes(128 * 1024)  # an unknown field of 128 KiB
    method = "/byokeep.orchestrator.v1.SettingsService/GetSettings"
    async with channel(stack, "client/flood") as flood:
        error = await refused(flood.unary_unary(method)(request, timeout=20))
    assert error_info(error).reason == "INVALID_FIELD"


@pytest.mark.parametrize(
    ("raw", "few"),
    [
        (b"", True),
        (review_pb2.ReviewInput(diff=b"\x3a\x00" * 9000).SerializeToString(), True),
        (b"\x3a\x00" * wire.MOST, True),
        (b"\x3a\x00" * (wire.MOST + 1), False),
        (b"\x3a", False),
        (b"\x3a\x05abc", False),
        (b"\xff" * 12, False),
        (b"\x0b", False),
    ],
)
def test_elements_are_counted_as_they_are_sent(raw: bytes, few: bool) -> None:
    with contextlib.nullcontext() if few else pytest.raises(wire.WireError):
        wire.require_few(review_pb2.ReviewInput.DESCRIPTOR, raw)


def test_packed_elements_are_counted() -> None:
    raw = key_pb2.RollBackKeyResponse(destroyed_versions=[1] * (wire.MOST + 1)).SerializeToString()
    with pytest.raises(wire.WireError):
        wire.require_few(key_pb2.RollBackKeyResponse.DESCRIPTOR, raw)


async def test_a_probe_is_answered_in_a_flood(tmp_path: Path) -> None:
    """10 × 8 calls that have no end on the port that takes anybody's. Was shown to fail with
    gRPC's own `HealthServicer` and a limit on calls: the probe was refused."""
    address = f"unix:{tmp_path}/health"
    _, health = await server._health(address)
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(10)
    ]
    try:
        request = health_pb2.HealthCheckRequest()
        watches = [
            health_pb2_grpc.HealthStub(opened).Watch(request, timeout=20).read()
            for opened in channels
            for _ in range(8)
        ]
        for error in await asyncio.gather(*watches, return_exceptions=True):
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        silent = [
            asyncio.ensure_future(half(opened, "/grpc.health.v1.Health/Check"))
            for opened in channels
            for _ in range(8)
        ]
        await asyncio.wait(silent, timeout=0.2)
        async with grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as probe:
            live = health_pb2.HealthCheckRequest(service=server.LIVE)
            answer = await health_pb2_grpc.HealthStub(probe).Check(live, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for call in silent:
            call.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
    finally:
        for opened in channels:
            await opened.close()
        await health.stop(None)


async def test_an_anchor_that_is_away_is_not_hammered(tmp_path, keyvault_database_url):
    """Whoever waits for an answer has a tick come at once, and then each at its time.

    Shown to fail: with `_wake` set again after each tick in Log.anchored.
    """
    shared = Shared(keyvault_database_url, tmp_path)
    await Replica(shared).create_system()
    replica, tries = Replica(shared), []
    await replica.start()
    await replica.create_tenant("acme")

    async def away(*_) -> bool:
        tries.append(1)
        raise OSError

    shared.anchor.write = away
    running = asyncio.create_task(replica.log.run())
    event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_STATE_RESEALED)
    _, head = await replica.ledger.change("acme", lambda found: found.events.append(event))
    waiting = [replica.log.anchored("acme", head) for _ in range(50)]
    refused = await asyncio.gather(*waiting, return_exceptions=True)
    assert {one.reason for one in refused} == {"AUDIT_UNAVAILABLE"}
    assert 2 <= len(tries) <= 20
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await replica.close()
