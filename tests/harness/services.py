"""Each service as a process of its own, with nobody around it but a database."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.pki import CertificateAuthority
from tests.harness import keyvault as kv
from tests.harness.replica import environment

ROOT = Path(__file__).resolve().parents[2]
ZONES = ("keyvault", "orchestrator", "llm_runner")
_DOMAIN = "byokeep.test"


class Service:
    """A service's process."""

    def __init__(self, zone: str, environ: Mapping[str, str], folder: Path) -> None:
        self.zone = zone
        self.environ = dict(environ)
        self._folder = folder
        self._log = folder / f"{zone}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: str = "serve") -> None:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self.zone}", command],
                cwd=ROOT,
                env={**kept, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def said(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines of an event; every line of a log is JSON."""
        lines = [json.loads(line) for line in self.said().splitlines()]
        return [line for line in lines if line["event"] == name]

    def ended(self, seconds: float = 60) -> tuple[int, float]:
        """Wait for its end; return its status, and what it used of a processor in seconds."""
        assert self._process is not None
        end = time.monotonic() + seconds
        while True:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._process.returncode = code
                return code, used.ru_utime + used.ru_stime
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def terminate(self, seconds: float = 60) -> int:
        """SIGTERM, and its status at the end."""
        os.kill(self.pid, signal.SIGTERM)
        return self.ended(seconds)[0]

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.wait(30)

    def serving(self) -> bool | None:
        """What its health port says; None where it says nothing."""
        with grpc.insecure_channel(self.environ["BYOKEEP_HEALTH_LISTEN"]) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=5
                )
            except grpc.RpcError:
                return None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait for a condition, while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self._process is not None
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)


@contextlib.contextmanager
def service(zone: str, folder: Path, database_url: str, **changes: str) -> Iterator[Service]:
    """A service that is not started, with all its files right; killed when the block ends."""
    made = Service(zone, {**good(zone, folder, database_url), **changes}, folder)
    try:
        yield made
    finally:
        made.kill()


def good(zone: str, folder: Path, database_url: str) -> dict[str, str]:
    """Make a zone's files, and return the environment that names them."""
    common = {
        "BYOKEEP_LISTEN": f"unix:{folder}/{zone}.sock",
        "BYOKEEP_HEALTH_LISTEN": f"unix:{folder}/{zone}.health",
    }
    if zone == "keyvault":
        return environment(kv.Deployment(folder, database_url).settings()) | common
    authority = CertificateAuthority.new(_DOMAIN)
    (folder / "ca.pem").write_text(authority.pem)
    own = authority.issue(folder / zone, spiffe_id=zone, dns=[f"{zone}.test"])
    common |= {
        "BYOKEEP_MODE": "development",
        "BYOKEEP_DEPLOYMENT": "test",
        "BYOKEEP_TRUST_DOMAIN": _DOMAIN,
        "BYOKEEP_TLS_CERT": str(own.certificate),
        "BYOKEEP_TLS_KEY": str(own.key),
        "BYOKEEP_TLS_CA": str(folder / "ca.pem"),
        "BYOKEEP_CALLERS": f"client=spiffe://{_DOMAIN}/client/*",
        "BYOKEEP_KEYVAULT_ADDRESS": f"unix:{folder}/nobody.sock",
        "BYOKEEP_KEYVAULT_NAME": "keyvault.test",
    }
    if zone == "llm_runner":
        return common
    return common | {
        "BYOKEEP_RUNNER_ADDRESS": f"unix:{folder}/nobody.sock",
        "BYOKEEP_RUNNER_NAME": "runner.test",
        "BYOKEEP_DATABASE_URL_FILE": str(secret(folder / "database", database_url)),
        "BYOKEEP_GRANT_SIGNING_KEY": str(secret(folder / "grant.pem", _ed25519())),
    }


def secret(path: Path, text: str) -> Path:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _ed25519() -> str:
    return (
        Ed25519PrivateKey.generate()
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        .decode()
    )
