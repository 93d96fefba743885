"""lease_vault_ratio and rewrap_vault_ratio, where a Vault can be had without building one.

The first divides a lease on a stack whose KEKs are in a real Vault over TLS by the sum of its
parts done bare: one hvac Transit decrypt, one commit, one mTLS echo, each p50 with one call in
flight, in the same run. The second divides the backend's rewrap by hvac's own batch rewrap of
the same rows.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hvac
import psycopg
from byokeep import transport
from byokeep.keyvault.v1 import lease_pb2
from byokeep.testing import Stack

from tests.bench.keyvault_client import Call, Tenant
from tests.bench.results import Row, percentile
from tests.harness import vault_backend
from tests.harness.keyvault import Deployment
from tests.harness.vault import VaultServer
from tests.harness.vault_binary import chosen

_ROWS = 2000
_BATCH = 400  # as many as keyvault's, which OpenBao takes too


def run(seconds: float, uncapped: dict[str, dict[str, str]]) -> list[Row]:
    """Measure; nothing where no Vault is at hand, and say so."""
    if not chosen().found():
        print(
            "no vault: lease_vault_ratio and rewrap_vault_ratio are not measured", file=sys.stderr
        )
        return []
    folder = Path(tempfile.mkdtemp(prefix="byokeep-bench-vault-"))
    vault = VaultServer(folder)
    try:
        vault.start()
        vault.set_up("approle")
        settings = vault.settings(folder, vault_deadline_ms=5000)
        environment = {f"BYOKEEP_{name.upper()}": str(value) for name, value in settings.items()}
        merged = {**uncapped, "keyvault": {**uncapped["keyvault"], **environment}}
        with Stack(environment=merged, in_memory=False) as stack:
            lease = asyncio.run(_lease(stack, vault, seconds))
        return [lease, asyncio.run(_rewrap(vault, folder / "rewrap", settings))]
    finally:
        vault.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _lease(stack: Stack, vault: VaultServer, seconds: float) -> Row:
    tenant = Tenant(stack)
    await tenant.add_key()
    # A grant is signed by the orchestrator: not a part of LeaseKey.
    signed: list[lease_pb2.LeaseKeyRequest] = []
    lease = tenant.presenting(signed.pop)

    # In turns, so that a busy machine is busy for all of them alike.
    parts: dict[str, list[float]] = {"lease": [], "decrypt": [], "commit": [], "echo": []}
    decrypt = _hvac_decrypt(vault)
    with _committer(stack) as connection, _echo_server(stack) as (address, files):
        async with transport.aio_channel(address, "keyvault.byokeep.internal", files) as channel:
            echo = channel.unary_unary("/bench.Echo/Echo")
            payload = b"x" * 1600
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                signed += [tenant.request() for _ in range(20)]
                parts["lease"] += await _timed(lease, 20)
                await tenant.release()
                parts["echo"] += await _timed(lambda: echo(payload), 20)
                parts["decrypt"] += _timed_here(decrypt, 20)
                parts["commit"] += _timed_here(lambda: _commit(connection), 20)
    p50 = {name: percentile(values[20:] or values, 0.5) * 1000 for name, values in parts.items()}
    bare = p50["decrypt"] + p50["commit"] + p50["echo"]
    detail = {f"{name}_p50_ms": round(value, 3) for name, value in p50.items()}
    return Row("lease_vault_ratio", p50["lease"] / bare, "ratio", detail)


async def _timed(call: Call, times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        await call()
        found.append(time.perf_counter() - start)
    return found


def _timed_here(call: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _hvac_decrypt(vault: VaultServer) -> Callable[[], object]:
    client = hvac.Client(vault.address, token=vault.token("keyvault-data"), verify=str(vault.ca))
    vault.api("POST", "transit/keys/byokeep-tenant-bare", type="aes256-gcm96")
    made = client.secrets.transit.generate_data_key("byokeep-tenant-bare", "plaintext")
    ciphertext = made["data"]["ciphertext"]
    return lambda: client.secrets.transit.decrypt_data("byokeep-tenant-bare", ciphertext)


def _committer(stack: Stack) -> psycopg.Connection[tuple[object, ...]]:
    connection = psycopg.connect(stack.database_url("keyvault"), autocommit=True)
    connection.execute("CREATE TABLE IF NOT EXISTS bench_commit (n bigint)")
    return connection


def _commit(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    with connection.transaction():
        connection.execute("INSERT INTO bench_commit VALUES (1)")


class _echo_server:
    def __init__(self, stack: Stack) -> None:
        self._pki = stack.root / "pki"

    def __enter__(self) -> tuple[str, transport.TlsFiles]:
        pki = self._pki
        command = [sys.executable, "-m", "tests.bench.echo", str(pki / "keyvault.pem")]
        command += [str(pki / "keyvault.key"), str(pki / "ca.pem")]
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        port = self._server.stdout.readline().strip()
        files = transport.TlsFiles(pki / "runner.pem", pki / "runner.key", pki / "ca.pem")
        return f"127.0.0.1:{port}", files

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        with self._server:
            pass


async def _rewrap(vault: VaultServer, folder: Path, settings: dict[str, object]) -> Row:
    folder.mkdir()
    client = hvac.Client(vault.address, token=vault.token("keyvault-data"), verify=str(vault.ca))
    # The backend alone: no database is opened.
    deployment = Deployment(folder, "postgresql://nowhere")
    async with vault_backend.started(deployment, settings) as backend:
        await backend.create("tenant/rewrap")
        made = await backend.generate_data_key("tenant/rewrap")
        made.plaintext.wipe()
        await backend.rotate("tenant/rewrap")
        rows = [made.wrapped] * _ROWS
        ours, bare = [], []
        for _ in range(5):
            start = time.perf_counter()
            assert len(await backend.rewrap("tenant/rewrap", rows)) == _ROWS
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            _bare_rewrap(client, rows)
            bare.append(time.perf_counter() - start)
    speed = {name: _ROWS / min(times) for name, times in (("ours", ours), ("bare", bare))}
    detail = {f"{name}_rows_per_s": round(value) for name, value in speed.items()}
    return Row("rewrap_vault_ratio", speed["ours"] / speed["bare"], "ratio", detail)


def _bare_rewrap(client: hvac.Client, rows: list[bytes]) -> None:
    for start in range(0, len(rows), _BATCH):
        items = [{"ciphertext": one.decode()} for one in rows[start : start + _BATCH]]
        answer = client.secrets.transit.rewrap_data(
            "byokeep-tenant-rewrap", None, batch_input=items
        )
        assert len(answer["data"]["batch_results"]) == len(items)


if __name__ == "__main__":
    from tests.bench.__main__ import UNCAPPED
    from tests.bench.results import show

    show(run(float(os.environ.get("BENCH_SECONDS") or 5), UNCAPPED))
