"""A client of keyvault for benches: a tenant with an active key, and load at a given width."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import time
from collections.abc import Awaitable, Callable

import grpc
import psutil
from byokeep import dsse, hpke, sealing, transport
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import (
    admin_pb2,
    admin_pb2_grpc,
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

#: Calls in flight at saturation.
IN_FLIGHT = 32
Call = Callable[[], Awaitable[object]]


async def saturate(call: Call, seconds: float, in_flight: int = IN_FLIGHT) -> list[float]:
    """Call for some seconds, always so many at once; return latencies in seconds."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def worker() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return latencies


async def pace(call: Call, rate: float, seconds: float) -> list[float]:
    """Call at a rate for some seconds, whatever the answers take; return latencies in seconds."""
    latencies: list[float] = []

    async def one() -> None:
        start = time.perf_counter()
        await call()
        latencies.append(time.perf_counter() - start)

    start, calls = time.perf_counter(), []
    for number in range(max(1, round(rate * seconds))):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        calls.append(asyncio.create_task(one()))
    await asyncio.gather(*calls)
    return latencies


class Meter:
    """The CPU that a process was charged while calls were measured."""

    def __init__(self, pid: int, call: Call) -> None:
        """Measure a server's process by calls to it."""
        self._process = psutil.Process(pid)
        self.call = call
        self._cpu = 0.0
        self._seconds = 0.0
        self.latencies: list[float] = []

    async def run(self, seconds: float) -> None:
        """Measure for some seconds more."""
        before, started = self._process.cpu_times(), time.perf_counter()
        self.latencies += await saturate(self.call, seconds)
        after = self._process.cpu_times()
        self._seconds += time.perf_counter() - started
        self._cpu += (after.user - before.user) + (after.system - before.system)

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per call."""
        return self._cpu / len(self.latencies) * 1e6

    @property
    def rate(self) -> float:
        """Calls per second."""
        return len(self.latencies) / self._seconds


class Tenant:
    """A tenant with an active key, prepared through keyvault's own API."""

    def __init__(self, stack: Stack, address: str = "", name: str = "demo") -> None:
        """Use a stack's keyvault, or one elsewhere, as its orchestrator and runner would."""
        self.stack = stack
        self.name = name
        self.address = address or stack.address("keyvault")
        pem = (stack.root / "secrets" / "grant-signing.pem").read_bytes()
        private = serialization.load_pem_private_key(pem, None)
        assert isinstance(private, Ed25519PrivateKey)
        self.signer = private
        self.signer_id = public_key_id("gsk", private.public_key().public_bytes_raw())
        self.child = hpke.PrivateKey.generate(hpke.HYBRID_V1)
        self.digest = hashlib.sha256(self.child.public_bytes).digest()
        self.key_id = new_id("key")
        self.deployment = ""
        #: Leases that were given and not released.
        self.given: list[str] = []

    def channel(self, role: str) -> grpc.aio.Channel:
        """Return a channel to keyvault with a role's certificate."""
        pki = self.stack.root / "pki"
        folder = pki if (pki / f"{role}.pem").exists() else self.stack.config.parent
        files = transport.TlsFiles(folder / f"{role}.pem", folder / f"{role}.key", pki / "ca.pem")
        return transport.aio_channel(self.address, "keyvault.byokeep.internal", files)

    async def create(self) -> None:
        """Create the tenant's key-encryption key, where it is not there."""
        stub = admin_pb2_grpc.AdminServiceStub(self.channel("operator"))
        await stub.CreateTenantKey(
            admin_pb2.CreateTenantKeyRequest(
                tenant=f"tenants/{self.name}", request_id=new_id("req")
            )
        )

    async def add_key(self) -> None:
        """Stage and promote the key."""
        stub = custody_pb2_grpc.CustodyServiceStub(self.channel("orchestrator"))
        answer = await stub.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=hpke.HYBRID_V1))
        statement = custody_pb2.IntakeStatement.FromString(answer.statement.payload)
        request_id = new_id("req")
        context = sealing.SealContext(self.name, "", "openai", self.key_id, "add", request_id)
        name = key_name(self.name, self.key_id)
        await stub.StageKey(
            custody_pb2.StageKeyRequest(
                name=name,
                provider=provider_value("openai"),
                display_name=f"bench-{self.key_id}",
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

    def leasing(self) -> Call:
        """Return a call that redeems a new grant each time."""
        return self.presenting(self.request)

    def presenting(self, request: Callable[[], lease_pb2.LeaseKeyRequest]) -> Call:
        """Return a call that presents what `request` returns: a grant can be signed before."""
        leases = self._leases = lease_pb2_grpc.LeaseServiceStub(self.channel("runner"))

        async def lease() -> object:
            answer = await leases.LeaseKey(request())
            self.given.append(answer.lease_id)
            return answer

        return lease

    async def release(self) -> None:
        """Release what was given: a tenant has no thousands of leases that live."""
        given, self.given = self.given, []
        await asyncio.gather(
            *(
                self._leases.ReleaseLease(
                    lease_pb2.ReleaseLeaseRequest(
                        lease_id=one, outcome=lease_pb2.LEASE_OUTCOME_COMPLETED
                    )
                )
                for one in given
            )
        )

    def request(self) -> lease_pb2.LeaseKeyRequest:
        """Return a request with a new grant."""
        grant = grant_pb2.Grant(
            grant_id=new_id("gra"),
            deployment=self.deployment,
            tenant=self.name,
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
