"""Runs the real emulator with a throwaway CA, and dials it in place of the providers."""

from __future__ import annotations

import json
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpcore
import httpx
from byokeep.orchestrator.v1 import key_pb2
from byokeep.testing.emulator import Emulator as EmulatorControl
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.llm_runner import wire
from services.llm_runner.providers import ADAPTERS

HOSTS = [adapter.host for adapter in ADAPTERS.values()]
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Emulator:
    """A running emulator: where it listens, whom to trust, and its control client."""

    process: subprocess.Popen[bytes]
    https_port: int
    ca: Path
    control: EmulatorControl

    def connect(
        self, host: str, ca: Path | None = None, port: int | None = None, handshake: float = 5.0
    ) -> wire.Connection:
        """A connection as the child has it, dialled here instead of by its parent."""
        context = ssl.create_default_context(cafile=str(ca or self.ca))
        try:
            sock = socket.create_connection(("127.0.0.1", port or self.https_port), 5)
        except OSError:
            cause = key_pb2.UNREACHABLE_CAUSE_CONNECT
        else:
            return wire.secure(sock, context, host, _wait, handshake)
        raise wire.UnreachableError(cause)

    def transport(self) -> httpx.HTTPTransport:
        """A transport to the emulator for any host name, with real TLS."""
        context = ssl.create_default_context(cafile=str(self.ca))
        transport = httpx.HTTPTransport(verify=context)
        transport._pool.close()
        transport._pool = httpcore.ConnectionPool(
            ssl_context=context, network_backend=_Loopback(self.https_port)
        )
        return transport


def _wait(sock: socket.socket, events: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(seconds * 1000))


class _Loopback(httpcore.SyncBackend):
    def __init__(self, port: int) -> None:
        self._port = port

    def connect_tcp(self, host, port, *args, **kwargs):
        return super().connect_tcp("127.0.0.1", self._port, *args, **kwargs)


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Write a CA and a certificate for the three hosts; returns CA, certificate, key."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test CA {folder.name}")])
    ca = _builder(name, name, ca_key).add_extension(x509.BasicConstraints(True, 0), True)
    ca = ca.add_extension(
        x509.KeyUsage(True, False, False, False, False, True, True, False, False), True
    )
    leaf = _builder(x509.Name([]), name, key).add_extension(
        x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), True
    )
    ca_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
    leaf = leaf.add_extension(ca_authority, False)
    paths = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    paths[1].write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    paths[2].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def _builder(subject, issuer, key):
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
    )


@contextmanager
def running_emulator(folder: Path, *flags: str) -> Iterator[Emulator]:
    """Start the emulator as its users do, and stop it by SIGTERM."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, cert, key = make_certificates(folder)
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "deploy.local.emulator", "--cert", cert, "--key", key]
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--ready-file", ready, *flags], cwd=ROOT, stderr=errors
        )
    try:
        ports = _wait_ready(process, ready)
        with EmulatorControl(f"http://127.0.0.1:{ports['control_port']}") as control:
            yield Emulator(process, ports["https_port"], ca, control)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
    assert process.returncode == 0
    assert (folder / "stderr").read_bytes() == b""


def _wait_ready(process: subprocess.Popen[bytes], ready: Path) -> dict[str, int]:
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert process.poll() is None, "the emulator ended before it was ready"
        assert time.monotonic() < deadline, "the emulator was not ready in time"
        time.sleep(0.02)
    return json.loads(ready.read_text())
