"""rewrap_keys_per_s: how many data keys of one tenant keyvault wraps again in a second.

A real keyvault process and a real embedded PostgreSQL. The rate is between the first batch and the
last, by the events that keyvault wrote of them: what is done once for all of them does not count.
What rewraps (keyvault) and what stores (PostgreSQL) share the machine.
"""

from __future__ import annotations

import asyncio
import sys
import time

from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc, audit_pb2
from byokeep.testing import Stack
from byokeep.transport import TlsFiles, aio_channel

from services.common.postgres import database_url
from services.keyvault.database import Database
from tests.bench.inside import inside
from tests.bench.results import Row

_KEYS = 10_000
_TENANT = "bench-rewrap"
_EVENTS = "SELECT body FROM event WHERE tenant = %s ORDER BY sequence"


def run() -> list[Row]:
    """Fill a tenant, rotate its KEK, rewrap, and measure."""
    # The pace that an operator sets is not what is measured.
    environment = {"keyvault": {"BYOKEEP_REWRAP_ROWS_PER_SECOND": "10000000"}}
    with Stack(environment=environment, in_memory=False) as stack:
        print(f"measuring a rewrap of {_KEYS} keys …", file=sys.stderr)
        return asyncio.run(_measure(stack))


async def _measure(stack: Stack) -> list[Row]:
    client = stack.root / "client"
    files = TlsFiles(
        client / "operator.pem", client / "operator.key", stack.root / "pki" / "ca.pem"
    )
    channel = aio_channel(stack.address("keyvault"), "keyvault.byokeep.internal", files)
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    try:
        names = {"tenant": f"tenants/{_TENANT}", "request_id": new_id("req")}
        await admin.CreateTenantKey(admin_pb2.CreateTenantKeyRequest(**names))
        deployment = (await admin.GetStatus(admin_pb2.GetStatusRequest())).deployment
        async with inside(stack, deployment) as core:
            await core.add_keys(_TENANT, _KEYS)
        await admin.RotateTenantKey(admin_pb2.RotateTenantKeyRequest(**names))
        started = time.perf_counter()
        request = admin_pb2.RewrapTenantRequest(tenant=f"tenants/{_TENANT}")
        async for last in admin.RewrapTenant(request, timeout=300):
            phase = last.phase
        took = time.perf_counter() - started
        assert phase == admin_pb2.KEK_JOB_PHASE_DONE
        rate = await _rate(stack)
    finally:
        await channel.close()
    return [Row("rewrap_keys_per_s", rate, "keys/s", {"keys": _KEYS, "whole_s": took})]


async def _rate(stack: Stack) -> float:
    """Return keys a second between the first batch's event and the last one's."""
    database = Database(database_url(stack.root / "secrets" / "keyvault-database-url"), 1)
    await database.open()
    try:
        rows = await database.all(_EVENTS, (_TENANT,))
    finally:
        await database.close()
    events = [audit_pb2.AuditEvent.FromString(row[0]) for row in rows]
    rewrapped = audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED
    batches = [event for event in events if event.type == rewrapped and event.count]
    assert sum(event.count for event in batches) == _KEYS
    first, last = (event.event_time.ToNanoseconds() for event in (batches[0], batches[-1]))
    return sum(event.count for event in batches[1:]) / (last - first) * 1e9


if __name__ == "__main__":
    for one in run():
        print(one)
