"""lease_cpu_ratio: what a LeaseKey costs keyvault, held against a bare mTLS echo.

Both servers are saturated by the same client in the same run; CPU is what the
operating system charged the server's process. PostgreSQL's CPU is not in it: it is
another process; the wait for its commit is in the latency.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
from byokeep import dsse, hpke, sealing, transport
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import (
    custody_pb2,
    custody_pb2_grpc,
    grant_pb2,
    lease_pb2,
    lease_pb2_grpc,
)
from byokeep.names import key_name, provider_value
from byokeep.testing import Stack
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.bench.results import Row, percentile

_IN_FLIGHT = 16
Call = Callable[[], Awaitable[object]]


async def _saturate(call: Call, seconds: float) -> tuple[int, list[float]]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def worker() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(worker() for _ in range(_IN_FLIGHT)))
    return len(latencies), latencies


async def _cost(pid: int, call: Call, seconds: float) -> tuple[float, float, list[float]]:
    """Return microseconds of the process's CPU per call, calls per second, latencies."""
    await _saturate(call, min(1.0, seconds))
    process = psutil.Process(pid)
    before, started = process.cpu_times(), time.perf_counter()
    calls, latencies = await _saturate(call, seconds)
    after, took = process.cpu_times(), time.perf_counter() - started
    used = (after.user - before.user) + (after.system - before.system)
    return used / calls * 1e6, calls / took, latencies


class _Tenant:
    """A tenant with an active key, prepared through keyvault's own API."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        pem = (stack.root / "secrets" / "grant-signing.pem").read_bytes()
        private = serialization.load_pem_private_key(pem, None)
        assert isinstance(private, Ed25519PrivateKey)
        self.signer = private
        self.signer_id = public_key_id("gsk", private.public_key().public_bytes_raw())
        self.child = hpke.PrivateKey.generate(hpke.HYBRID_V1)
        self.digest = hashlib.sha256(self.child.public_bytes).digest()
        self.key_id = new_id("key")

    def channel(self, role: str) -> object:
        pki = self.stack.root / "pki"
        files = transport.TlsFiles(pki / f"{role}.pem", pki / f"{role}.key", pki / "ca.pem")
        return transport.aio_channel(
            self.stack.address("keyvault"), "keyvault.byokeep.internal", files
        )

    async def add_key(self) -> None:
        stub = custody_pb2_grpc.CustodyServiceStub(self.channel("orchestrator"))
        answer = await stub.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=hpke.HYBRID_V1))
        statement = custody_pb2.IntakeStatement.FromString(answer.statement.payload)
        request_id = new_id("req")
        context = sealing.SealContext("demo", "", "openai", self.key_id, "add", request_id)
        name = key_name("demo", self.key_id)
        await stub.StageKey(
            custody_pb2.StageKeyRequest(
                name=name,
                provider=provider_value("openai"),
                display_name="bench",
                operation=custody_pb2.INTAKE_OPERATION_ADD,
                sealed_key=sealing.seal_key("sk-proj-" + "b" * 40, context, statement),
                request_id=request_id,
                actor="bench",
            )
        )
        await stub.PromoteKeyVersion(
            custody_pb2.PromoteKeyVersionRequest(
                name=name, version=1, request_id=new_id("req"), actor="bench"
            )
        )
        self.deployment = statement.deployment

    def request(self) -> lease_pb2.LeaseKeyRequest:
        grant = grant_pb2.Grant(
            grant_id=new_id("gra"),
            deployment=self.deployment,
            tenant="demo",
            actor="bench",
            provider=provider_value("openai"),
            key_id=self.key_id,
            key_version=1,
            review_id="bench",
            attempt_id=new_id("att"),
            fence=1,
            purpose=grant_pb2.LEASE_PURPOSE_REVIEW,
            runner_class="default",
            recipient_key_sha256=self.digest,
        )
        now = datetime.datetime.now(datetime.UTC)
        grant.issue_time.FromDatetime(now)
        grant.expire_time.FromDatetime(now + datetime.timedelta(seconds=30))
        return lease_pb2.LeaseKeyRequest(
            grant=dsse.sign(dsse.GRANT, grant.SerializeToString(), self.signer_id, self.signer),
            recipient_public_key=self.child.public_bytes,
            suite=hpke.HYBRID_V1,
        )


async def _measure(stack: Stack, seconds: float) -> Row:
    tenant = _Tenant(stack)
    await tenant.add_key()
    leases = lease_pb2_grpc.LeaseServiceStub(tenant.channel("runner"))

    async def lease() -> object:
        return await leases.LeaseKey(tenant.request())

    lease_us, lease_rate, latencies = await _cost(stack.process("keyvault").pid, lease, seconds)
    echo_us, echo_rate = await _echo(stack.root / "pki", seconds)
    return Row(
        "lease_cpu_ratio",
        lease_us / echo_us,
        "ratio",
        {
            "lease_cpu_us": round(lease_us, 1),
            "echo_cpu_us": round(echo_us, 1),
            "leases_per_s": round(lease_rate, 1),
            "echoes_per_s": round(echo_rate, 1),
            "lease_p50_ms": round(percentile(latencies, 0.5) * 1000, 2),
            "lease_p99_ms": round(percentile(latencies, 0.99) * 1000, 2),
            "in_flight": _IN_FLIGHT,
        },
    )


async def _echo(pki: Path, seconds: float) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.echo", str(pki / "keyvault.pem")]
    command += [str(pki / "keyvault.key"), str(pki / "ca.pem")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        files = transport.TlsFiles(pki / "runner.pem", pki / "runner.key", pki / "ca.pem")
        address, name = f"127.0.0.1:{port}", "keyvault.byokeep.internal"
        try:
            async with transport.aio_channel(address, name, files) as channel:
                echo = channel.unary_unary("/bench.Echo/Echo")
                payload = b"x" * 1600  # about what a LeaseKey request has

                async def call() -> object:
                    return await echo(payload)

                cost, rate, _ = await _cost(server.pid, call, seconds)
        finally:
            server.terminate()
    return cost, rate


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack whose keyvault has no in-flight cap in the way."""
    return [asyncio.run(_measure(stack, seconds))]
