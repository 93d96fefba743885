"""22, 23: certificates change while everything runs, and an old identity does not live on."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from byokeep import following, transport
from byokeep.client import Connection, connect
from byokeep.identity import TlsFiles
from byokeep.keyvault.v1 import lease_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.testing import Stack

from deploy.local import material
from deploy.local.pki import CertificateAuthority, Identity, write_file
from deploy.local.processes import wait_for
from services.common import logs
from services.keyvault.config import Settings
from tests.harness import keyvault as kv
from tests.security.test_canary import add_key, fresh_key, review

pytestmark = pytest.mark.deep

AGE, GRACE = 3, 2
SERVICES = ("keyvault", "runner", "orchestrator")


class Load:
    """Calls without a pause on one long-lived connection, and reviews, until the block ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._over = threading.Event()
        self.calls = 0
        self.reviews: list[review_pb2.Review] = []
        self.failed: list[str] = []
        self._threads = [
            threading.Thread(target=self._repeat, args=(act,))
            for act in (self._list, self._list, self._review)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def goes_on(self) -> None:
        """Wait until calls and a review have begun and ended after now."""
        calls, reviews = self.calls + 20, len(self.reviews) + 2
        assert wait_for(
            lambda: bool(self.failed) or (self.calls > calls and len(self.reviews) > reviews), 90
        ), (self.calls, calls, self.reviews, reviews)
        assert self.failed == []

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._over.is_set() and not self.failed:
            try:
                act()
            except Exception as error:
                self.failed.append(f"{act.__name__}: {error!r}")

    def _list(self) -> None:
        # To the orchestrator, which asks keyvault.
        self._connection.keys.ListKeys(key_pb2.ListKeysRequest(parent="tenants/demo"))
        self.calls += 1
        time.sleep(0.02)

    def _review(self) -> None:
        done = review(self._connection, "openai")
        if done.state != review_pb2.REVIEW_STATE_COMPLETED or done.attempts > 1:
            raise AssertionError(done)
        self.reviews.append(done)


class Pki:
    """The files of a stack's identities."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._state = stack._running.state
        self.folder = self._state.pki

    def trust(self, *authorities: CertificateAuthority) -> None:
        text = "".join(one.pem for one in authorities)
        write_file(self.folder / "ca.pem", text.encode(), mode=0o644)

    def files(self, name: str) -> TlsFiles:
        files = material.tls(self._state, name)
        if name == "developer":
            files = Identity.at(self._state.client / name)
        return TlsFiles(files.certificate, files.key, self.folder / "ca.pem")

    def reissue(self, authority: CertificateAuthority) -> None:
        """Give every identity a leaf of this authority, as a rotation would."""
        for name in SERVICES:
            path = "runner/default" if name == "runner" else name
            dns = material.SERVER_NAMES[name]
            prefix = self.files(name).certificate.with_suffix("")
            authority.issue(prefix, spiffe_id=path, dns=[dns])
        authority.issue(
            self.files("developer").certificate.with_suffix(""), spiffe_id="client/developer"
        )


@pytest.fixture
def aging() -> Iterator[Stack]:
    """A stack whose connections live for seconds; reviews have their time all the same."""
    age = {"BYOKEEP_CONNECTION_AGE_SECONDS": str(AGE)}
    short = {**age, "BYOKEEP_CONNECTION_GRACE_SECONDS": str(GRACE)}
    environment = {"keyvault": short, "runner": age, "orchestrator": age}
    with Stack(environment=environment) as stack:
        yield stack


def follows() -> None:
    """Wait until every channel that is used has looked at its files."""
    time.sleep(2 * following.CHECK_SECONDS)


@pytest.mark.timeout(600)
def test_rotate_live(aging):
    """22. Leaves and CA of every service and of a client are replaced under load: no call fails,
    every review is completed at its first attempt.

    The way of a rotation: both CAs are trusted, then leaves of the new one are issued, then the
    old one goes. Connections are so short-lived here that each step is met by new handshakes,
    and the runner's stream of revocations is cut and taken up again and again.
    Shown to fail: with `_Line._follow` returning at once (the orchestrator's channel trusts the
    old CA alone, and meets the new one).
    """
    pki = Pki(aging)
    old, new = aging.authority, CertificateAuthority.new(material.TRUST_DOMAIN, name="second CA")
    trusted = pki.folder / "both.pem"
    trusted.write_text(old.pem + new.pem)
    developer = pki.files("developer")
    with connect(
        orchestrator=aging.address("orchestrator"),
        orchestrator_name=material.SERVER_NAMES["orchestrator"],
        tls=TlsFiles(developer.certificate, developer.key, trusted),
        trust=aging.trust,
        tenant="demo",
    ) as connection:
        add_key(connection, "openai", fresh_key("openai"), "rotate")
        with Load(connection) as load:
            load.goes_on()
            pki.trust(old, new)
            follows()
            load.goes_on()
            pki.reissue(new)
            follows()
            load.goes_on()
            pki.trust(new)
            follows()
            time.sleep(AGE + GRACE)
            load.goes_on()
    assert load.failed == []
    # What was left behind: nobody without a leaf of the new CA gets in any more.
    assert "certificate_reload_failed" not in "".join(aging.log(name) for name in SERVICES)
    assert all("certificate_reloaded" in aging.log(name) for name in SERVICES)
    assert not _greeted(aging, old)


@pytest.mark.timeout(600)
def test_rotate_live_broken_files(aging):
    """22. A broken file is an alarm in the log of every side that reads it, and the last good
    identity stays in use.

    Shown to fail: with `self.value` set to None before the load in Followed.refresh.
    """
    pki = Pki(aging)
    files = pki.files("orchestrator")
    good = files.certificate.read_bytes()
    with aging.connect() as connection:
        add_key(connection, "openai", fresh_key("openai"), "broken")
        with Load(connection) as load:
            load.goes_on()
            # The orchestrator's leaf, with another identity's key: read as server and as client.
            other = pki.files("runner").certificate.read_bytes()
            write_file(files.certificate, other, mode=0o644)
            follows()
            load.goes_on()
            alarms = aging.log("orchestrator").count("certificate_reload_failed")
            assert 2 <= alarms <= 6, "each side says it, and not at every call"
            write_file(files.certificate, good, mode=0o644)
            follows()
            load.goes_on()
    assert load.failed == []
    assert "CERTIFICATE-----" not in aging.log("orchestrator")


def _greeted(stack: Stack, authority: CertificateAuthority) -> bool:
    """Whether a leaf of this authority may still call keyvault."""
    folder = stack.root / "old"
    authority.issue(folder / "leaf", spiffe_id="client/operator")
    shutil.copy(stack._running.state.pki / "both.pem", folder / "ca.pem")
    return "1.3" in _handshake(stack.address("keyvault"), "keyvault", folder, (3, 3))


def _handshake(address: str, name: str, folder, versions: tuple[int, int]) -> str:
    """Return the TLS version of a connection that the server answers, or what became of it."""
    known = {2: ssl.TLSVersion.TLSv1_2, 3: ssl.TLSVersion.TLSv1_3}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "leaf.pem", folder / "leaf.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version, context.maximum_version = (known[one] for one in versions)
    host, port = address.rsplit(":", 1)
    try:
        with (
            socket.create_connection((host, int(port)), 30) as plain,
            context.wrap_socket(plain, server_hostname=material.SERVER_NAMES[name]) as tls,
        ):
            # With 1.3 a refused certificate shows only now.
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return (tls.version() or "") if tls.recv(1) else "closed"
    except OSError as error:
        return f"refused: {type(error).__name__}"


@pytest.mark.parametrize("name", SERVICES)
def test_no_tls_below_1_3(stack, name, tmp_path):
    """Shown to fail: without GRPC_SSL_CIPHER_SUITES in services/common/__init__.py."""
    stack.authority.issue(tmp_path / "leaf", spiffe_id="client/operator")
    (tmp_path / "ca.pem").write_text(stack.authority.pem)
    address = stack.address(name)
    assert _handshake(address, name, tmp_path, (2, 3)) == "TLSv1.3"
    assert _handshake(address, name, tmp_path, (2, 2)).startswith("refused")


class _Watcher:
    """One connection of one identity: unary calls, and a stream that never ends by itself."""

    def __init__(self, keyvault: kv.Keyvault, files: TlsFiles) -> None:
        self._channel = transport.aio_channel(f"127.0.0.1:{keyvault.port}", kv.NAME, files)
        self._stub = kv.lease_pb2_grpc.LeaseServiceStub(self._channel)
        self.opened = time.monotonic()
        self._stream = self._stub.WatchRevocations(lease_pb2.WatchRevocationsRequest())

    async def answered(self) -> bool:
        """Whether a call reaches keyvault; it is refused there, for its lease is unknown."""
        request = lease_pb2.ReleaseLeaseRequest(
            lease_id=kv.new_id("lea"), outcome=lease_pb2.LEASE_OUTCOME_COMPLETED
        )
        return await kv.refusal(self._stub.ReleaseLease(request, timeout=10)) == "NOT_FOUND"

    async def stream_end(self) -> float:
        """Return how long the stream lived."""
        try:
            while await self._stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return time.monotonic() - self.opened

    async def close(self) -> None:
        await self._channel.close()


async def test_conn_age(deployment, capfd):
    """23. An identity whose CA is trusted no more is cut off within age and grace: its calls when
    its connection has reached its age, its stream after the grace; it comes in no more. Others
    go on.

    Shown to fail: without `grpc.max_connection_age_ms`, and without the grace, in server.build.
    """
    logs.setup("test", "info")
    folder = deployment.folder
    retired = CertificateAuthority.new(kv.TRUST_DOMAIN, name="retired CA")
    retired.issue(folder / "retired", spiffe_id="runner/default")
    (folder / "mine.pem").write_text(deployment.ca.pem)
    (folder / "ca.pem").write_text(deployment.ca.pem + retired.pem)
    async with kv.running(
        deployment, connection_age_seconds=AGE, connection_grace_seconds=GRACE
    ) as keyvault:
        old = _Watcher(
            keyvault, TlsFiles(folder / "retired.pem", folder / "retired.key", folder / "mine.pem")
        )
        other = _Watcher(keyvault, deployment.files("runner"))
        try:
            assert await old.answered()
            assert await other.answered()
            (folder / "ca.pem").write_text(deployment.ca.pem)
            # gRPC spreads ages by a tenth; the rest is for a busy machine.
            async with asyncio.timeout(4 * (AGE + GRACE)):
                lived = await old.stream_end()
            assert lived >= AGE * 0.9 + GRACE - 0.5, "the stream was to have its grace"
            assert lived <= AGE * 1.1 + GRACE + 5
            assert not await old.answered()
            assert await other.answered()
        finally:
            await old.close()
            await other.close()


@pytest.mark.timeout(300)
def test_conn_age_spares_a_review(aging):
    """A review that takes longer than every age and keyvault's grace: the orchestrator's stream
    to the runner has its own grace, the runner's stream of revocations is cut and taken up again,
    and the review is completed at its first attempt.

    Shown to fail: with a grace of 2 s at the runner too.
    """
    with aging.connect() as connection:
        add_key(connection, "openai", fresh_key("openai"), "slow")
        before = aging.log("runner").count("revocations_heard")
        aging.emulator.latency(3.0 * (AGE + GRACE))
        done = review(connection, "openai")
        aging.emulator.latency(0)
    assert (done.state, done.attempts) == (review_pb2.REVIEW_STATE_COMPLETED, 1), done
    assert aging.log("runner").count("revocations_heard") >= before + 2


def test_the_defaults_are_bounded():
    """The ages that a deployment has which sets none: minutes for keyvault."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    total = datetime.timedelta(
        seconds=defaults["connection_age_seconds"] + defaults["connection_grace_seconds"]
    )
    assert total <= datetime.timedelta(minutes=15)
