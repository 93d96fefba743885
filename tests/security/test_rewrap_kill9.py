"""8. A rewrap survives kill -9 at any point, and trims only at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys

import grpc
import psycopg
import pytest
from byokeep import transport
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc, state_pb2

from tests.harness import bulk
from tests.harness import keyvault as kv
from tests.security.test_rewrap import TENANT, open_all, until

pytestmark = pytest.mark.deep

_KEYS = 240
_RATE = 80  # rows a second: a rewrap of three seconds, in a dozen batches
_KILLS = 4


def _port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class _Process:
    """`python -m services.keyvault serve`, killed at the end."""

    def __init__(self, deployment: kv.Deployment) -> None:
        folder = deployment.folder
        self.port = _port()
        self.ready = folder / "ready"
        self.ready.unlink(missing_ok=True)
        settings = {
            "DEPLOYMENT": kv.DEPLOYMENT,
            "TRUST_DOMAIN": kv.TRUST_DOMAIN,
            "LISTEN": f"127.0.0.1:{self.port}",
            "HEALTH_LISTEN": "127.0.0.1:0",
            "TLS_CERT": folder / "server.pem",
            "TLS_KEY": folder / "server.key",
            "TLS_CA": folder / "ca.pem",
            "CALLERS": kv.CALLERS,
            "MODE": "development",
            "DATABASE_URL_FILE": folder / "database",
            "ANCHOR_FILE": folder / "anchor.json",
            "GRANT_KEYS_DIR": folder / "grants",
            "KEYRING_FILE": folder / "keyring.json",
            "READY_FILE": self.ready,
            "REWRAP_ROWS_PER_SECOND": _RATE,
        }
        environment = {name: value for name, value in os.environ.items() if name[:5] != "GRPC_"}
        environment |= {f"BYOKEEP_{name}": str(value) for name, value in settings.items()}
        with (folder / "keyvault.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.keyvault", "serve"],
                env=environment,
                stdout=log,
                stderr=log,
            )

    async def serving(self) -> None:
        async def is_ready() -> bool:
            assert self._process.poll() is None, "keyvault ended"
            return self.ready.exists()

        await until(is_ready, 90)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)


async def _order(deployment: kv.Deployment, port: int, request_id: str) -> None:
    """Order the rewrap, as an operator does who repeats a command that broke off."""
    channel = transport.aio_channel(f"127.0.0.1:{port}", kv.NAME, deployment.files("operator"))
    request = admin_pb2.RewrapTenantRequest(tenant=TENANT, request_id=request_id, trim=True)
    async with channel:
        async for _ in admin_pb2_grpc.AdminServiceStub(channel).RewrapTenant(request, timeout=120):
            pass


def _state(url: str) -> tuple[int, list[int], bool]:
    """Return how many versions are old, the versions of the KEK, and whether older ones went."""
    with psycopg.connect(url, autocommit=True) as connection:
        # In this order: what was trimmed by the second look was not needed at the first.
        kek = connection.execute(
            "SELECT version FROM local_kek WHERE name = 'tenant/acme' ORDER BY version"
        ).fetchall()
        parts = connection.execute("SELECT state FROM tenant_part").fetchall()
        (row,) = connection.execute("SELECT state FROM tenant WHERE name = 'acme'").fetchone()
    keys = [key for (raw,) in parts for key in state_pb2.PartState.FromString(raw).keys]
    old = sum(one.kek_version < 2 for key in keys for one in key.versions)
    (kek_state,) = state_pb2.TenantState.FromString(row).keks
    return old, [version for (version,) in kek], kek_state.trimmed == 2


@pytest.mark.timeout(400)
async def test_rewrap_kill9(deployment):
    """8. keyvault is killed again and again while it rewraps; each time it goes on where it
    was. While a version is old its KEK is there; at the end every key leases, and only then
    the old version is gone.
    """
    random.seed()
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        values = await bulk.fill(keyvault, _KEYS)
        await keyvault.admin.RotateTenantKey(
            admin_pb2.RotateTenantKeyRequest(tenant=TENANT, request_id=new_id("req"))
        )
    request_id = new_id("req")
    progress = [_KEYS]
    kills = 0
    # A busy machine may have committed nothing by then: later ones come later.
    while kills < _KILLS or (progress[-1] == _KEYS and kills < 3 * _KILLS):
        kills += 1
        process = _Process(deployment)
        try:
            await process.serving()
            order = asyncio.create_task(_order(deployment, process.port, request_id))
            await asyncio.sleep(random.uniform(0.3, 1.0) * max(1, kills - _KILLS + 1))
        finally:
            process.kill()
        with contextlib.suppress(grpc.RpcError):
            await order
        old, versions, _ = _state(deployment.database_url)
        assert old <= progress[-1]
        assert versions == [1, 2] or old == 0
        progress.append(old)
    assert progress[-1] < _KEYS, "no batch was ever committed"
    process = _Process(deployment)
    try:
        await process.serving()
        await _order(deployment, process.port, request_id)
    finally:
        process.kill()
    assert _state(deployment.database_url) == (0, [2], True)
    async with kv.running(deployment) as keyvault:
        await open_all(keyvault, values)
