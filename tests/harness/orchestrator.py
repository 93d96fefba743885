"""A real orchestrator on a real database, between a fake keyvault and a fake runner, over mTLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psycopg
import psycopg.sql
from byokeep import ids, names
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import content_pb2, content_pb2_grpc, custody_pb2, custody_pb2_grpc
from byokeep.orchestrator.v1 import (
    key_pb2,
    key_pb2_grpc,
    review_pb2,
    review_pb2_grpc,
    settings_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)
from byokeep.runner.v1 import runner_pb2, runner_pb2_grpc
from byokeep.transport import TlsFiles, aio_channel
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.pki import CertificateAuthority
from services.common import server
from services.common.errors import ByokeepError
from services.orchestrator.config import Settings
from services.orchestrator.server import App

DOMAIN = "byokeep.test"
PENDING = custody_pb2.KEY_VERSION_STATE_PENDING
ACTIVE = custody_pb2.KEY_VERSION_STATE_ACTIVE
DIFF = b"""\
diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 import os
+os.system(input())
 print("hello")
"""


def spiffe(name: str) -> str:
    return f"spiffe://{DOMAIN}/client/{name}"


class FakeKeyvault(
    custody_pb2_grpc.CustodyServiceServicer, content_pb2_grpc.ContentKeyServiceServicer
):
    """Keeps keys in a dict, and what it was asked."""

    def __init__(self) -> None:
        self.keys: dict[str, custody_pb2.ProviderKey] = {}
        self.epoch = "2026-11-23"
        self.content_keys: dict[tuple[str, str], bytes] = {}
        self.calls: list[Any] = []
        self.done: list[Any] = []
        self.away = False
        self.no_content_keys = False

    def add(
        self,
        tenant: str,
        provider: options_pb2.Provider.ValueType = options_pb2.PROVIDER_OPENAI,
        *,
        owner: str = "",
        state: custody_pb2.KeyVersionState.ValueType = ACTIVE,
        display_name: str = "main",
    ) -> str:
        key_id = ids.new_id("key")
        key = custody_pb2.ProviderKey(
            name=names.key_name(tenant, key_id),
            provider=provider,
            owner=owner,
            display_name=display_name,
            etag="1",
        )
        self.keys[key.name] = key
        self._version(key, state)
        return key_id

    def _version(
        self, key: custody_pb2.ProviderKey, state: custody_pb2.KeyVersionState.ValueType
    ) -> int:
        number = len(key.versions) + 1
        version = key.versions.add(version=number, state=state, hint="sk-...AbCd")
        version.create_time.GetCurrentTime()
        self._settle(key)
        return version.version

    def _settle(self, key: custody_pb2.ProviderKey) -> None:
        active = [one.version for one in key.versions if one.state == ACTIVE]
        key.active_version = active[-1] if active else 0
        key.state = ACTIVE if active else key.versions[-1].state
        key.etag = str(int(key.etag) + 1)

    def set_state(
        self, tenant: str, key_id: str, state: custody_pb2.KeyVersionState.ValueType
    ) -> None:
        key = self.keys[names.key_name(tenant, key_id)]
        key.versions[-1].state = state
        self._settle(key)

    def add_version(self, tenant: str, key_id: str) -> int:
        key = self.keys[names.key_name(tenant, key_id)]
        for version in key.versions:
            version.state = custody_pb2.KEY_VERSION_STATE_SUPERSEDED
        return self._version(key, ACTIVE)

    async def _heard(self, request: Any, context: Any) -> None:
        self.calls.append(request)
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")

    async def _unchanged(self, request: Any, context: Any) -> custody_pb2.ProviderKey:
        key = await self._find(request.name, context)
        if request not in self.done and request.etag not in ("", key.etag):
            error = ByokeepError(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "read it again")
            await context.abort(error.code, error.message, error.trailing_metadata())
        self.done.append(request)
        return key

    async def _find(self, name: str, context: Any) -> custody_pb2.ProviderKey:
        if name not in self.keys:
            error = ByokeepError(
                grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such key", resource="providerKey"
            )
            await context.abort(error.code, error.message, error.trailing_metadata())
        return self.keys[name]

    async def GetIntakeKey(self, request, context):
        await self._heard(request, context)
        return custody_pb2.GetIntakeKeyResponse(
            statement=options_pb2.SignedEnvelope(payload=b"statement")
        )

    async def StageKey(self, request, context):
        await self._heard(request, context)
        key = self.keys.get(request.name)
        if request in self.done and key is not None:
            return custody_pb2.StageKeyResponse(key=key, version=len(key.versions))
        if request.operation == custody_pb2.INTAKE_OPERATION_ADD:
            taken = [one for one in self.keys.values() if one.display_name == request.display_name]
            if taken:
                error = ByokeepError(
                    grpc.StatusCode.ALREADY_EXISTS,
                    "KEY_EXISTS",
                    "it exists; rotate it",
                    key=names.last_of(taken[0].name),
                )
                await context.abort(error.code, error.message, error.trailing_metadata())
            key = custody_pb2.ProviderKey(
                name=request.name,
                provider=request.provider,
                owner=request.owner,
                display_name=request.display_name,
                etag="1",
            )
            self.keys[request.name] = key
        key = await self._unchanged(request, context)
        return custody_pb2.StageKeyResponse(key=key, version=self._version(key, PENDING))

    async def PromoteKeyVersion(self, request, context):
        await self._heard(request, context)
        key = await self._find(request.name, context)
        for version in key.versions:
            if version.version == request.version:
                version.state = ACTIVE
            elif version.state == ACTIVE:
                version.state = custody_pb2.KEY_VERSION_STATE_SUPERSEDED
        self._settle(key)
        return custody_pb2.PromoteKeyVersionResponse(key=key)

    async def DestroyKeyVersion(self, request, context):
        await self._heard(request, context)
        key = await self._find(request.name, context)
        key.versions[request.version - 1].state = custody_pb2.KEY_VERSION_STATE_DESTROYED
        self._settle(key)
        return custody_pb2.DestroyKeyVersionResponse(key=key)

    async def RollBackKey(self, request, context):
        await self._heard(request, context)
        key = await self._unchanged(request, context)
        previous = [
            one for one in key.versions if one.state == custody_pb2.KEY_VERSION_STATE_SUPERSEDED
        ]
        for version in key.versions if previous else ():
            if version.state == custody_pb2.KEY_VERSION_STATE_ACTIVE:
                version.state = custody_pb2.KEY_VERSION_STATE_DESTROYED
        for version in previous[-1:]:
            version.state = custody_pb2.KEY_VERSION_STATE_ACTIVE
        self._settle(key)
        return custody_pb2.RollBackKeyResponse(key=key)

    async def RevokeKey(self, request, context):
        await self._heard(request, context)
        key = await self._unchanged(request, context)
        for version in key.versions:
            version.state = custody_pb2.KEY_VERSION_STATE_REVOKED
        self._settle(key)
        return custody_pb2.RevokeKeyResponse(key=key)

    async def DestroyKey(self, request, context):
        await self._heard(request, context)
        key = await self._unchanged(request, context)
        for version in key.versions:
            version.state = custody_pb2.KEY_VERSION_STATE_DESTROYED
        self._settle(key)
        return custody_pb2.DestroyKeyResponse(key=key)

    async def GetKey(self, request, context):
        await self._heard(request, context)
        return custody_pb2.GetKeyResponse(key=await self._find(request.name, context))

    async def ListKeys(self, request, context):
        await self._heard(request, context)
        gone = custody_pb2.KEY_VERSION_STATE_DESTROYED
        after = f"{request.parent}/providerKeys/{request.page_token}"
        found = [
            key
            for name, key in sorted(self.keys.items())
            if name.startswith(f"{request.parent}/")
            and name > after
            and (request.show_destroyed or key.state != gone)
        ]
        size = request.page_size or 50
        token = names.last_of(found[size - 1].name) if len(found) > size else ""
        return custody_pb2.ListKeysResponse(keys=found[:size], next_page_token=token)

    async def GetContentKey(self, request, context):
        await self._heard(request, context)
        if self.no_content_keys:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        epoch = request.epoch or self.epoch
        if not request.epoch:
            self.content_keys.setdefault((request.tenant, epoch), os.urandom(32))
        key = self.content_keys.get((request.tenant, epoch))
        if key is None:
            error = ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION, "CONTENT_EXPIRED", "gone", epoch=epoch
            )
            await context.abort(error.code, error.message, error.trailing_metadata())
        return content_pb2.GetContentKeyResponse(epoch=epoch, key=key)

    def asked(self, kind: type) -> list[Any]:
        return [one for one in self.calls if isinstance(one, kind)]


class Conversation:
    """The runner's side of one attempt."""

    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._sequence = 0
        self.assign = runner_pb2.Assign()
        self.reattach = runner_pb2.Reattach()
        self.proceed = runner_pb2.Proceed()
        self.out: asyncio.Queue[runner_pb2.ExecuteResponse | None] = asyncio.Queue()
        self.cancelled = asyncio.Event()
        self._acked = 0
        self._news = asyncio.Condition()

    async def open(self) -> None:
        first = await anext(self._requests)
        self.assign, self.reattach = first.assign, first.reattach
        self._sequence = self._acked = self.reattach.acked_sequence
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for request in self._requests:
            kind = request.WhichOneof("message")
            async with self._news:
                if kind == "proceed":
                    self.proceed = request.proceed
                elif kind == "ack":
                    self._acked = request.ack.sequence
                elif kind == "cancel":
                    self.cancelled.set()
                self._news.notify_all()

    async def say(self, **message: Any) -> int:
        self._sequence += 1
        await self.out.put(runner_pb2.ExecuteResponse(sequence=self._sequence, **message))
        return self._sequence

    async def acked(self, sequence: int) -> None:
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: self._acked >= sequence)

    async def accept(self, *chunks: str) -> None:
        await self.say(
            accepted=runner_pb2.Accepted(
                public_key=b"p" * 32,
                suite=options_pb2.HPKE_SUITE_X25519_V1,
                chunks=[runner_pb2.PlannedChunk(chunk_id=chunk) for chunk in chunks],
                process_id=4711,
                prompt_version="9",
            )
        )
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: self.proceed.HasField("grant"))
        await self.say(leased=runner_pb2.Leased(lease_id=ids.new_id("lea")))

    async def call(self, chunk: str, number: int = 1) -> None:
        await self.acked(
            await self.say(call_started=runner_pb2.CallStarted(chunk_id=chunk, call_number=number))
        )

    async def result(self, chunk: str, *findings: review_pb2.Finding) -> None:
        await self.acked(
            await self.say(chunk_result=runner_pb2.ChunkResult(chunk_id=chunk, findings=findings))
        )

    async def end(self, failure: int = 0, **outcome: Any) -> None:
        message = runner_pb2.Outcome(failure=failure, **outcome)
        message.report.process_id = 4711
        message.report.open_time.GetCurrentTime()
        message.report.close_time.GetCurrentTime()
        sequence = await self.say(outcome=message)
        with contextlib.suppress(TimeoutError):
            await self.acked(sequence)

    def close(self) -> None:
        self._reader.cancel()


Script = Callable[[Conversation], Awaitable[None]]


def finding(line: int = 2) -> review_pb2.Finding:
    return review_pb2.Finding(
        path="app.py",
        start_line=line,
        end_line=line,
        severity=review_pb2.SEVERITY_HIGH,
        category=review_pb2.CATEGORY_SECURITY,
        title="shell from input",
        message="input() reaches a shell",
        suggestion="use subprocess",
    )


async def one_chunk(talk: Conversation) -> None:
    """Do a review of one chunk with one finding, or find a key valid."""
    if not talk.assign.HasField("input"):
        await valid(talk)
        return
    await talk.accept("c1")
    if "c1" not in talk.proceed.done_chunk_ids:
        await talk.call("c1")
        await talk.result("c1", finding())
    await talk.end()


def verdict(value: key_pb2.ValidationVerdict.ValueType, *models: str) -> Script:
    async def script(talk: Conversation) -> None:
        await talk.accept()
        await talk.call("")
        await talk.say(validation_result=runner_pb2.ValidationResult(verdict=value, models=models))
        await talk.end()

    return script


valid = verdict(key_pb2.VALIDATION_VERDICT_VALID, "gpt-6.1-terra", "gpt-6-luna")


def fails(failure: int, *, call: bool = True, **outcome: Any) -> Script:
    async def script(talk: Conversation) -> None:
        await talk.accept("c1")
        if call:
            await talk.call("c1")
        await talk.end(failure, **outcome)

    return script


class FakeRunner(runner_pb2_grpc.RunnerServiceServicer):
    """Plays scripts, one an attempt; `default` once they are used up. An attempt that is taken
    up again is not known, unless a script of `resumed` says how it goes on. It runs `places`
    attempts at once, tells how much room is left, and refuses the rest."""

    def __init__(self, places: int = 16) -> None:
        self.id = ids.new_id("run")
        self.places = places
        self.busy = 0
        self.most = 0
        self.refused = 0
        self.draining = False
        self.silent = False
        self.reattached: list[str] = []
        self._news = asyncio.Condition()
        self.scripts: list[Script] = []
        self.resumed: list[Script] = []
        self.default: Script = one_chunk
        self.talks: list[Conversation] = []

    async def tell(self, **values: Any) -> None:
        """Change something, and tell whoever watches."""
        for name, value in values.items():
            setattr(self, name, value)
        async with self._news:
            self._news.notify_all()

    async def WatchCapacity(
        self, request: Any, context: Any
    ) -> AsyncIterator[runner_pb2.WatchCapacityResponse]:
        while True:
            if not self.silent:
                free = 0 if self.draining else max(0, self.places - self.busy)
                yield runner_pb2.WatchCapacityResponse(
                    runner_id=self.id, places=self.places, free=free, draining=self.draining
                )
            async with self._news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await self._news.wait()

    async def Execute(
        self, requests: Any, context: Any
    ) -> AsyncIterator[runner_pb2.ExecuteResponse]:
        talk = Conversation(requests)
        await talk.open()
        if not talk.reattach.attempt_id and self.busy >= self.places:
            self.refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        await self.tell(busy=self.busy + 1)
        self.most = max(self.most, self.busy)
        try:
            async for response in self._serve(talk, context):
                yield response
        finally:
            await self.tell(busy=self.busy - 1)

    async def _serve(
        self, talk: Conversation, context: Any
    ) -> AsyncIterator[runner_pb2.ExecuteResponse]:
        if talk.reattach.attempt_id:
            self.reattached.append(talk.reattach.attempt_id)
            if not self.resumed:
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such attempt runs here")
            script = self.resumed.pop(0)
        else:
            self.talks.append(talk)
            script = self.scripts.pop(0) if self.scripts else self.default
        player = asyncio.create_task(self._play(script, talk))
        try:
            while (response := await talk.out.get()) is not None:
                yield response
            if player.done() and (error := player.exception()):
                code = getattr(error, "code", grpc.StatusCode.UNAVAILABLE)
                await context.abort(code, "the runner is gone")
        finally:
            player.cancel()
            talk.close()

    async def _play(self, script: Script, talk: Conversation) -> None:
        try:
            await script(talk)
        finally:
            await talk.out.put(None)


class RunnerGone(Exception):
    """Raised by a script: the stream breaks."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        super().__init__()
        self.code = code


@dataclass
class Client:
    """Stubs of one identity."""

    tenants: Any
    callers: Any
    keys: Any
    settings: Any
    reviews: Any


@dataclass
class Stack:
    """Everything that a test may want to touch."""

    app: App
    settings: Settings
    keyvault: FakeKeyvault
    runner: FakeRunner
    others: list[FakeRunner]
    database_url: str
    address: str
    authority: CertificateAuthority
    folder: Path
    grant_public_key: Any
    _channels: list[grpc.aio.Channel] = field(default_factory=list)
    _clients: dict[str, Client] = field(default_factory=dict)

    def client(self, name: str) -> Client:
        if name not in self._clients:
            files = self.authority.issue(self.folder / name, spiffe_id=f"client/{name}")
            tls = TlsFiles(files.certificate, files.key, self.folder / "ca.pem")
            channel = aio_channel(self.address, "orchestrator.test", tls)
            self._channels.append(channel)
            self._clients[name] = Client(
                tenant_pb2_grpc.TenantServiceStub(channel),
                tenant_pb2_grpc.CallerServiceStub(channel),
                key_pb2_grpc.KeyServiceStub(channel),
                settings_pb2_grpc.SettingsServiceStub(channel),
                review_pb2_grpc.ReviewServiceStub(channel),
            )
        return self._clients[name]

    async def tenant(
        self,
        name: str = "acme",
        *,
        plan: str = "",
        rights: Mapping[str, tuple[list[int], bool]] | None = None,
    ) -> str:
        """Create a tenant; the client `name` may do all for it, and speak for users."""
        operator = self.client("operator")
        await operator.tenants.CreateTenant(
            tenant_pb2.CreateTenantRequest(
                name=f"tenants/{name}", plan=plan, request_id=request_id()
            )
        )
        given = rights or {name: ([1, 2, 3], True)}
        for client, (roles, may_assert) in given.items():
            await operator.callers.AllowCaller(
                tenant_pb2.AllowCallerRequest(
                    parent=f"tenants/{name}",
                    caller=tenant_pb2.Caller(
                        spiffe_id=spiffe(client), roles=roles, may_assert_users=may_assert
                    ),
                    request_id=request_id(),
                )
            )
        return name

    async def submit(self, tenant: str = "acme", **values: Any) -> review_pb2.Review:
        """Submit a review as the tenant's client."""
        chosen = {"repository": "acme/shop", "diff": DIFF} | values
        given_id = chosen.pop("request_id", None) or request_id()
        priority = chosen.pop("priority", review_pb2.PRIORITY_UNSPECIFIED)
        response = await self.client(tenant).reviews.SubmitReview(
            review_pb2.SubmitReviewRequest(
                parent=f"tenants/{tenant}",
                input=review_pb2.ReviewInput(**chosen),
                request_id=given_id,
                priority=priority,
            )
        )
        return response.review

    async def ended(self, review: review_pb2.Review, seconds: float = 60) -> review_pb2.Review:
        """Watch a review until it has ended."""
        last = review
        async with asyncio.timeout(seconds):
            tenant = names.tenant_of(review.name)
            async for response in self.client(tenant).reviews.WatchReview(
                review_pb2.WatchReviewRequest(name=review.name)
            ):
                last = response.review
        return last

    async def get(self, review: review_pb2.Review) -> review_pb2.Review:
        """Read a review as its tenant's client."""
        client = self.client(names.tenant_of(review.name)).reviews
        return (await client.GetReview(review_pb2.GetReviewRequest(name=review.name))).review

    async def waiting(
        self, review: review_pb2.Review, reason: str, seconds: float = 60
    ) -> review_pb2.Review:
        """Return a review once it says that it waits for a reason."""
        value = review_pb2.FailureReason.Value(f"FAILURE_REASON_{reason}")
        async with asyncio.timeout(seconds):
            while True:
                last = await self.get(review)
                if last.wait.reason == value:
                    return last
                if last.state not in (
                    review_pb2.REVIEW_STATE_QUEUED,
                    review_pb2.REVIEW_STATE_RUNNING,
                ):
                    raise AssertionError(f"it has ended: {last}")
                await asyncio.sleep(0.05)

    async def until_room(self, places: int, seconds: float = 60) -> None:
        """Wait until the orchestrator has heard that its runners have so many free places."""
        async with asyncio.timeout(seconds):
            while sum(one._told.free for one in self.app.fleet._heard()) != places:
                await asyncio.sleep(0.02)

    async def add_key(self, tenant: str = "acme", **values: Any) -> key_pb2.Key:
        response = await self.client(tenant).keys.AddKey(add_key_request(tenant, **values))
        return response.key

    async def validated(self, key: key_pb2.Key, seconds: float = 60) -> key_pb2.Key:
        """Watch a key until its verdict is known."""
        tenant = names.tenant_of(key.provider_key.name)
        async with asyncio.timeout(seconds):
            async for response in self.client(tenant).keys.WatchKey(
                key_pb2.WatchKeyRequest(name=key.provider_key.name)
            ):
                key = response.key
        return key

    async def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement on the orchestrator's database."""
        connection = await psycopg.AsyncConnection.connect(self.database_url, autocommit=True)
        async with connection:
            cursor = await connection.execute(statement, values)
            return await cursor.fetchall() if cursor.description else []

    async def table(self, name: str) -> list[tuple[Any, ...]]:
        """Return all rows of a table in a stable order."""
        query = psycopg.sql.SQL("SELECT t FROM {} t ORDER BY t::text")
        connection = await psycopg.AsyncConnection.connect(self.database_url, autocommit=True)
        async with connection:
            found = await connection.execute(query.format(psycopg.sql.Identifier(name)))
            return await found.fetchall()

    async def until(self, statement: str, *values: Any, seconds: float = 60) -> None:
        """Wait until a statement has rows."""
        async with asyncio.timeout(seconds):
            while not await self.sql(statement, *values):
                await asyncio.sleep(0.02)

    async def hurry(self) -> None:
        """Have every attempt that waits for its time run now."""
        await self.until("UPDATE attempt SET due_time = now() WHERE state = 'QUEUED' RETURNING 1")

    @asynccontextmanager
    async def hurrying(self) -> AsyncIterator[None]:
        """Have whatever waits for its time run at once."""

        async def hurry() -> None:
            while True:
                await self.sql("UPDATE attempt SET due_time = now() WHERE state = 'QUEUED'")
                await asyncio.sleep(0.05)

        task = asyncio.create_task(hurry())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def request_id() -> str:
    return ids.new_id("req").replace("_", "-")


def add_key_request(tenant: str = "acme", **values: Any) -> key_pb2.AddKeyRequest:
    chosen: dict[str, Any] = {
        "parent": f"tenants/{tenant}",
        "key_id": ids.new_id("key"),
        "provider": options_pb2.PROVIDER_OPENAI,
        "display_name": "main",
        "request_id": request_id(),
        "sealed_key": custody_pb2.SealedKey(
            intake_key_id=ids.new_id("ink"),
            suite=options_pb2.HPKE_SUITE_X25519_V1,
            ciphertext=hashlib.sha512(str(time.time_ns()).encode()).digest(),
        ),
    }
    return key_pb2.AddKeyRequest(**(chosen | values))


@asynccontextmanager
async def running(
    database_url: str, folder: Path, *, runners: int = 1, **overrides: Any
) -> AsyncIterator[Stack]:
    """Start all, give the stack, stop all. Further runners have addresses of their own."""

    authority = CertificateAuthority.new(DOMAIN)
    authority.write(folder / "ca")
    keyvault, runner = FakeKeyvault(), FakeRunner()
    services = grpc.aio.server()
    custody_pb2_grpc.add_CustodyServiceServicer_to_server(keyvault, services)
    content_pb2_grpc.add_ContentKeyServiceServicer_to_server(keyvault, services)
    runner_pb2_grpc.add_RunnerServiceServicer_to_server(runner, services)
    credentials = _credentials(authority, folder, "services")
    port = services.add_secure_port("127.0.0.1:0", credentials)
    await services.start()
    others = [FakeRunner() for _ in range(runners - 1)]
    found, servers = [f"127.0.0.1:{port}"], [services]
    for other in others:
        servers.append(grpc.aio.server())
        runner_pb2_grpc.add_RunnerServiceServicer_to_server(other, servers[-1])
        found.append(f"127.0.0.1:{servers[-1].add_secure_port('127.0.0.1:0', credentials)}")
        await servers[-1].start()

    async def resolve(target: str) -> list[str]:
        return found

    signing_key = Ed25519PrivateKey.generate()
    settings = _settings(authority, folder, database_url, signing_key, port, overrides)
    app = App(settings)
    app.fleet._resolve = resolve
    await app.start()
    orchestrator, address = await _serve(settings, app)
    stack = Stack(
        app,
        settings,
        keyvault,
        runner,
        others,
        database_url,
        address,
        authority,
        folder,
        signing_key.public_key(),
    )
    try:
        yield stack
    finally:
        await stack.close()
        await orchestrator.stop(0.1)
        await app.stop()
        for one in servers:
            await one.stop(0.1)


@asynccontextmanager
async def replica(stack: Stack) -> AsyncIterator[App]:
    """Start another worker on a stack's database, without a server of its own."""
    app = App(stack.settings)
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


async def _serve(settings: Settings, app: App) -> tuple[grpc.aio.Server, str]:
    orchestrator, port = await server.build(settings, app)
    await orchestrator.start()
    return orchestrator, f"127.0.0.1:{port}"


def _settings(
    authority: CertificateAuthority,
    folder: Path,
    database_url: str,
    signing_key: Ed25519PrivateKey,
    port: int,
    overrides: dict[str, Any],
) -> Settings:
    own = authority.issue(
        folder / "orchestrator", spiffe_id="orchestrator", dns=["orchestrator.test"]
    )
    url_file, key_file = folder / "database-url", folder / "grant.pem"
    url_file.write_text(database_url)
    key_file.write_bytes(
        signing_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    for file in (url_file, key_file):
        file.chmod(0o600)
    values: dict[str, Any] = {
        "deployment": "test",
        "trust_domain": DOMAIN,
        "listen": "127.0.0.1:0",
        "health_listen": "unused",
        "tls_cert": own.certificate,
        "tls_key": own.key,
        "tls_ca": folder / "ca.pem",
        "callers": f"client=spiffe://{DOMAIN}/client/* operator={spiffe('operator')}",
        "database_url_file": url_file,
        "grant_signing_key": key_file,
        "keyvault_address": f"127.0.0.1:{port}",
        "keyvault_name": "services.test",
        "runner_address": f"127.0.0.1:{port}",
        "runner_name": "services.test",
        "drain_seconds": 2,
    }
    return Settings(**(values | overrides))


def _credentials(
    authority: CertificateAuthority, folder: Path, name: str
) -> grpc.ServerCredentials:
    files = authority.issue(folder / name, spiffe_id=name, dns=[f"{name}.test"])
    return grpc.ssl_server_credentials(
        [(files.key.read_bytes(), files.certificate.read_bytes())],
        authority.pem.encode(),
        require_client_auth=True,
    )
