"""rewrap_keys_per_s: how many data keys of one tenant keyvault wraps again in a second.

A real keyvault process and a real embedded PostgreSQL. The rate is between the first
batch and the last, by the database's clock: a job's start, and the count at its end,
are once per job. What rewraps (keyvault) and what stores (PostgreSQL) share the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc
from byokeep.testing import Stack
from byokeep.transport import TlsFiles, aio_channel

from services.common.postgres import database_url
from services.keyvault import system_keys
from services.keyvault.database import Database
from services.keyvault.kek import Backends
from services.keyvault.kek.keyring import load_keyring
from services.keyvault.kek.local import LocalBackend
from tests.bench.results import Row
from tests.harness.bulk import add_active_keys

_KEYS = 10_000
_TENANT = "bench-rewrap"
_LOOK = """
SELECT done, extract(epoch FROM update_time)::float8, phase, failed FROM kek_job
WHERE rewrap AND tenant = %s ORDER BY create_time DESC LIMIT 1
"""


def run() -> list[Row]:
    """Fill a tenant, rotate its KEK, rewrap, and measure."""
    # The pace that an operator sets is not what is measured.
    environment = {"keyvault": {"BYOKEEP_REWRAP_ROWS_PER_SECOND": "10000000"}}
    with Stack(environment=environment, in_memory=False) as stack:
        print(f"measuring a rewrap of {_KEYS} keys …", file=sys.stderr)
        return asyncio.run(_measure(stack))


async def _measure(stack: Stack) -> list[Row]:
    secrets, client = stack.root / "secrets", stack.root / "client"
    database = Database(database_url(secrets / "keyvault-database-url"), 4)
    await database.open()
    ca = stack.root / "pki" / "ca.pem"
    files = TlsFiles(client / "operator.pem", client / "operator.key", ca)
    channel = aio_channel(stack.address("keyvault"), "keyvault.byokeep.internal", files)
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    try:
        names = {"tenant": f"tenants/{_TENANT}", "request_id": new_id("req")}
        await admin.CreateTenantKey(admin_pb2.CreateTenantKeyRequest(**names))
        deployment = (await admin.GetStatus(admin_pb2.GetStatusRequest())).deployment
        keyring = load_keyring(secrets / "keyring.json", {})
        backend = LocalBackend(database, keyring, deployment)
        keys = await system_keys.load(database, Backends(backend), deployment)
        await add_active_keys(database, backend, keys.state_mac, deployment, _TENANT, _KEYS)
        await admin.RotateTenantKey(admin_pb2.RotateTenantKeyRequest(**names))
        rate, took = await _rewrap(database, admin)
    finally:
        await channel.close()
        await database.close()
    detail = {"keys": _KEYS, "whole_job_s": took}
    return [Row("rewrap_keys_per_s", rate, "keys/s", detail)]


async def _rewrap(
    database: Database, admin: admin_pb2_grpc.AdminServiceAsyncStub
) -> tuple[float, float]:
    async def order() -> None:
        request = admin_pb2.RewrapTenantRequest(tenant=f"tenants/{_TENANT}")
        async for last in admin.RewrapTenant(request, timeout=300):
            phase = last.phase
        assert phase == admin_pb2.KEK_JOB_PHASE_DONE

    started = time.perf_counter()
    task = asyncio.create_task(order())
    first: tuple[int, float] | None = None
    newest: tuple[int, float] | None = None
    with contextlib.suppress(asyncio.CancelledError):
        while not task.done():
            row = await database.one(_LOOK, (_TENANT,))
            if row is not None and row[2] == "REWRAP" and row[0]:
                newest = (row[0], row[1])
                first = first or newest
            await asyncio.sleep(0.005)
    await task
    assert first is not None
    assert newest is not None
    assert newest[0] > first[0]
    rate = (newest[0] - first[0]) / (newest[1] - first[1])
    return rate, time.perf_counter() - started


if __name__ == "__main__":
    for one in run():
        print(one)
