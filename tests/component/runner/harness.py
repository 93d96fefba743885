"""A real runner process between a keyvault that tests can bend, a real emulator, and a client."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from byokeep import dsse, hpke, transport
from byokeep.ids import new_id
from byokeep.keyvault.v1 import grant_pb2, lease_pb2, lease_pb2_grpc
from byokeep.leasing import lease_info
from byokeep.names import provider_value
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2, runner_pb2_grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.emulator.models import CHAT_MODELS
from deploy.local.pki import CertificateAuthority
from deploy.local.processes import wait_for
from services.common.errors import ByokeepError
from tests.component.providers.harness import HOSTS, Emulator, running_emulator

ROOT = Path(__file__).resolve().parents[3]
KEYS = {
    "openai": "sk-proj-plain-0123456789abcdef",
    "anthropic": "sk-ant-api03-plain-0123456789abcdef",
    "gemini": "AIzaSyPlain-0123456789abcdef",
}
DIFF = b"""diff --git a/app/db.py b/app/db.py
--- a/app/db.py
+++ b/app/db.py
@@ -10,2 +10,3 @@
 import hashlib
+rows = db.execute(f"SELECT * FROM users WHERE id = {user_id}")
 ok = True
"""


class FakeKeyvault(lease_pb2_grpc.LeaseServiceServicer):
    """Seals keys for grants that it doesn't verify; remembers what it was told."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.watchers: list[queue.SimpleQueue[str]] = []
        self.reset()

    def reset(self) -> None:
        self.refusal: ByokeepError | None = None
        self.wrong_recipient = False
        self.life_seconds = 300.0
        self.mute = False
        self.slow_seconds = 0.0  # until a stream of revocations says its first word
        self.before_answer: Callable[[str], None] = lambda lease_id: None
        self.leases: dict[str, lease_pb2.LeaseKeyRequest] = {}
        self.releases: list[lease_pb2.ReleaseLeaseRequest] = []
        self.live: set[str] = set()

    def LeaseKey(self, request, context):
        if self.refusal is not None:
            context.set_trailing_metadata(self.refusal.trailing_metadata())
            context.abort(self.refusal.code, self.refusal.message)
        grant = grant_pb2.Grant.FromString(request.grant.payload)
        lease_id = new_id("lea")
        self.leases[lease_id] = request
        self.live.add(lease_id)
        recipient = request.recipient_public_key
        if self.wrong_recipient:
            recipient = hpke.PrivateKey.generate(request.suite).public_bytes
        sealed = hpke.seal(
            request.suite,
            recipient,
            self.keys[grant.key_id].encode(),
            lease_info(request.grant.payload, lease_id),
        )
        self.before_answer(lease_id)
        answer = lease_pb2.LeaseKeyResponse(lease_id=lease_id, sealed_key=sealed)
        answer.life.FromNanoseconds(int(self.life_seconds * 1e9))
        return answer

    def ReleaseLease(self, request, context):
        self.releases.append(request)
        self.live.discard(request.lease_id)
        return lease_pb2.ReleaseLeaseResponse()

    def WatchRevocations(self, request, context):
        if self.mute:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        revoked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.watchers.append(revoked)
        message = lease_pb2.WatchRevocationsResponse
        time.sleep(self.slow_seconds)
        yield message(sequence=1, resync=message.Resync(live_lease_ids=sorted(self.live)))
        while context.is_active() and not self.mute:
            try:
                lease_id = revoked.get(timeout=0.1)
            except queue.Empty:
                yield message(sequence=1, heartbeat=message.Heartbeat())
            else:
                yield message(sequence=2, revocation=message.Revocation(lease_ids=[lease_id]))

    def revoke(self, lease_id: str) -> None:
        self.live.discard(lease_id)
        for watcher in self.watchers:
            watcher.put(lease_id)


@dataclass
class Attempt:
    """One stream to the runner, as an orchestrator speaks it."""

    call: grpc.Call = field(repr=False)
    requests: queue.SimpleQueue = field(repr=False)
    bench: Bench
    assign: runner_pb2.Assign
    key: str
    seen: list[runner_pb2.ExecuteResponse] = field(default_factory=list)
    pid: int = 0

    def send(self, **message) -> None:
        self.requests.put(runner_pb2.ExecuteRequest(**message))

    def next(self, kind: str | None = None) -> runner_pb2.ExecuteResponse:
        response = next(self.call)
        self.seen.append(response)
        got = response.WhichOneof("message")
        assert kind in (None, got), f"{got} came instead of {kind}: {response}"
        if got == "accepted":
            self.pid = response.accepted.process_id
        return response

    def ack(self, sequence: int) -> None:
        self.send(ack=runner_pb2.Ack(sequence=sequence))

    def proceed(self, *, done=(), **changed) -> None:
        """Send a grant for the child that was accepted, with some fields changed."""
        accepted = next(one.accepted for one in self.seen if one.HasField("accepted"))
        key_id = new_id("key")
        self.bench.keyvault.keys[key_id] = self.key
        values = {
            "grant_id": new_id("gra"),
            "key_id": key_id,
            "provider": self.assign.provider,
            "attempt_id": self.assign.attempt_id,
            "fence": self.assign.fence,
            "purpose": self.assign.purpose,
            "recipient_key_sha256": hashlib.sha256(accepted.public_key).digest(),
        }
        grant = grant_pb2.Grant(**(values | changed))
        envelope = dsse.sign(
            dsse.GRANT, grant.SerializeToString(), "gsk_test", Ed25519PrivateKey.generate()
        )
        self.send(proceed=runner_pb2.Proceed(grant=envelope, done_chunk_ids=done))

    def until(self, kind: str) -> runner_pb2.ExecuteResponse:
        """Answer as the runner expects, up to the first response of a kind, not yet acked."""
        while True:
            response = self.next()
            got = response.WhichOneof("message")
            if got == kind:
                return response
            assert got != "outcome", f"{kind} never came: {response}"
            self.ack(response.sequence)
            if got == "accepted":
                self.proceed()

    def finish(self, *, runner_ends: bool = False) -> runner_pb2.Outcome:
        """Run to the end; what came is in `seen`.

        A runner that ends closes its connection with the last stream: where gRPC still writes to
        it at that moment, the stream's status is lost, and nobody needs it (`_goodbye`).
        """
        response = self.until("outcome")
        self.ack(response.sequence)
        try:
            assert next(self.call, None) is None
        except grpc.RpcError as lost:
            if not runner_ends or lost.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        self.requests.put(None)
        return response.outcome

    def of(self, kind: str) -> list:
        return [getattr(one, kind) for one in self.seen if one.HasField(kind)]


@dataclass
class Bench:
    """Everything of one runner."""

    process: subprocess.Popen
    keyvault: FakeKeyvault
    emulator: Emulator
    stub: runner_pb2_grpc.RunnerServiceStub
    log: Path

    def as_new(self) -> Bench:
        """Forget what an earlier test did."""
        assert wait_for(lambda: not self.children)
        self.keyvault.reset()
        self.emulator.control.reset()
        return self

    def open(self, **first) -> Attempt:
        """Open a stream with any first request."""
        requests: queue.SimpleQueue = queue.SimpleQueue()
        requests.put(runner_pb2.ExecuteRequest(**first))
        call = self.stub.Execute(iter(requests.get, None), timeout=60)
        return Attempt(call, requests, self, first.get("assign", runner_pb2.Assign()), "")

    def review(self, provider="openai", key="", diff=DIFF, **changed) -> Attempt:
        """Assign a review."""
        review = {
            "model": CHAT_MODELS[provider][0],
            "purpose": grant_pb2.LEASE_PURPOSE_REVIEW,
            "input": review_pb2.ReviewInput(repository="acme/shop", diff=diff),
        }
        return self._attempt(provider, key, review | changed)

    def validation(self, provider="openai", key="", **changed) -> Attempt:
        """Assign a validation."""
        validation = {"purpose": grant_pb2.LEASE_PURPOSE_VALIDATION}
        return self._attempt(provider, key, validation | changed)

    def _attempt(self, provider, key, values) -> Attempt:
        defaults = {
            "attempt_id": new_id("att"),
            "fence": 1,
            "provider": provider_value(provider),
            "max_calls": 20,
            "timeout_seconds": 60,
        }
        attempt = self.open(assign=runner_pb2.Assign(**(defaults | values)))
        attempt.key = key or KEYS[provider]
        return attempt

    def capacity(self):
        """Watch how much room the runner has."""
        return self.stub.WatchCapacity(runner_pb2.WatchCapacityRequest(), timeout=60)

    @property
    def children(self) -> set[int]:
        """Process ids of the living children of the zygote."""
        return {pid for zygote in child_pids(self.process.pid) for pid in child_pids(zygote)}

    @property
    def zygote(self) -> int:
        (pid,) = child_pids(self.process.pid)
        return pid


def child_pids(pid: int) -> set[int]:
    """Living, not yet dead, children of a process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


@contextmanager
def running_bench(folder: Path, **settings: str) -> Iterator[Bench]:
    """Start it all; every process is ended again."""
    ca = CertificateAuthority.new("byokeep.test")
    (folder / "ca.pem").write_text(ca.pem)
    vault = ca.issue(folder / "keyvault", spiffe_id="keyvault", dns=["keyvault.test"])
    runner = ca.issue(folder / "runner", spiffe_id="runner/default", dns=["runner.test"])
    client = ca.issue(folder / "orchestrator", spiffe_id="orchestrator")
    keyvault = FakeKeyvault()
    server = grpc.server(futures.ThreadPoolExecutor(16))
    lease_pb2_grpc.add_LeaseServiceServicer_to_server(keyvault, server)
    credentials = grpc.ssl_server_credentials(
        [(vault.key.read_bytes(), vault.certificate.read_bytes())],
        ca.pem.encode(),
        require_client_auth=True,
    )
    vault_port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    with running_emulator(folder / "emulator", "--accept-any") as emulator:
        environ = {
            "BYOKEEP_MODE": "development",
            "BYOKEEP_DEPLOYMENT": "test",
            "BYOKEEP_TRUST_DOMAIN": "byokeep.test",
            "BYOKEEP_LISTEN": f"unix:{folder}/runner.sock",
            "BYOKEEP_HEALTH_LISTEN": f"unix:{folder}/health.sock",
            "BYOKEEP_READY_FILE": str(folder / "ready.json"),
            "BYOKEEP_TLS_CERT": str(runner.certificate),
            "BYOKEEP_TLS_KEY": str(runner.key),
            "BYOKEEP_TLS_CA": str(folder / "ca.pem"),
            "BYOKEEP_CALLERS": "orchestrator=spiffe://byokeep.test/orchestrator",
            "BYOKEEP_KEYVAULT_ADDRESS": f"127.0.0.1:{vault_port}",
            "BYOKEEP_KEYVAULT_NAME": "keyvault.test",
            "BYOKEEP_PROVIDER_CA": str(emulator.ca),
            "BYOKEEP_PROVIDER_DIAL": " ".join(
                f"{host}=127.0.0.1:{emulator.https_port}" for host in HOSTS
            ),
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
            **settings,
        }
        log = folder / "runner.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.llm_runner", "serve"],
                cwd=ROOT,
                env=environ,
                stderr=errors,
            )
        channel = transport.sync_channel(
            f"unix:{folder}/runner.sock",
            "runner.test",
            client.certificate.read_bytes(),
            client.key.read_bytes(),
            ca.pem.encode(),
        )
        try:
            assert wait_for(lambda: ready(folder / "ready.json") or process.poll(), 30)
            assert process.poll() is None, log.read_text()
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            yield Bench(process, keyvault, emulator, stub, log)
        finally:
            channel.close()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            server.stop(None).wait(5)


def ready(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text())["pid"])
    except (OSError, ValueError):
        return False


def refusal(code: grpc.StatusCode, reason: str, **metadata: str) -> ByokeepError:
    return ByokeepError(code, reason, "refused", **metadata)
