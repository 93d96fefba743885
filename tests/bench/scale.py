"""What many keys and many tenants add: `lease_scale_ratio`, the middle latency of a lease in a
tenant of 10,000 keys held against one in a tenant of ten; `change_ms`, a promotion in the large
tenant without the anchor's wait; `start_s`, how long a keyvault takes to serve that has many
tenants.

Both tenants are leased from in turns, one lease at a time, so that what else the machine does falls
on both. The keys are what staging and promoting them one by one would have left.
"""

from __future__ import annotations

import asyncio
import os
import time

from byokeep.testing import Stack

from tests.bench.inside import Inside, inside
from tests.bench.keyvault_client import Call, Tenant
from tests.bench.results import Row, percentile

_FEW, _MANY = 10, 10_000
_TENANTS = 2_000
_CHANGES = 200
_SHORT_SECONDS = 10.0
_TURNS = 4


async def _sequential(tenant: Tenant, call: Call, seconds: float) -> list[float]:
    """Lease one at a time, each released before the next; return latencies in seconds."""
    latencies, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        await call()
        latencies.append(time.perf_counter() - start)
        await tenant.release()
    return latencies


async def _leases(stack: Stack, core: Inside, seconds: float) -> Row:
    calls: dict[str, tuple[Tenant, Call]] = {}
    for name, keys in (("few", _FEW), ("many", _MANY)):
        tenant = Tenant(stack, name=f"bench-{name}")
        await tenant.create()
        tenant.key_id = (await core.add_keys(tenant.name, keys))[0]
        tenant.deployment = core.deployment
        calls[name] = tenant, tenant.leasing()
        await _sequential(*calls[name], min(1.0, seconds))
    latencies: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            latencies[name] += await _sequential(*call, seconds / _TURNS)
    few, many = latencies["few"], latencies["many"]
    return Row(
        "lease_scale_ratio",
        percentile(many, 0.5) / percentile(few, 0.5),
        "ratio",
        {
            "keys": _MANY,
            "keys_few": _FEW,
            "p50_ms": round(percentile(many, 0.5) * 1000, 2),
            "p50_few_ms": round(percentile(few, 0.5) * 1000, 2),
            "p99_ms": round(percentile(many, 0.99) * 1000, 2),
            "p99_few_ms": round(percentile(few, 0.99) * 1000, 2),
        },
    )


async def _changes(core: Inside) -> Row:
    name = "bench-change"
    await core.add_tenant(name)
    key_ids = (await core.add_keys(name, _MANY))[:_CHANGES]
    await core.add_pending(name, key_ids)
    latencies = []
    for key_id in key_ids:
        start = time.perf_counter()
        await core.promote(name, key_id)
        latencies.append(time.perf_counter() - start)
    detail = {"keys": _MANY, "p99_ms": round(percentile(latencies, 0.99) * 1000, 2)}
    return Row("change_ms", percentile(latencies, 0.5) * 1000, "ms", detail)


async def _add_tenants(core: Inside, count: int) -> None:
    for number in range(count):
        await core.add_tenant(f"bench-start-{number}")


def _start(stack: Stack) -> float:
    process = stack.process("keyvault")
    process.stop()
    start = time.perf_counter()
    process.start()
    stack.wait_ready("keyvault")
    return time.perf_counter() - start


async def _measure(stack: Stack, seconds: float, tenants: int) -> list[Row]:
    known = Tenant(stack)
    await known.create()
    await known.add_key()
    async with inside(stack, known.deployment) as core:
        rows = [await _leases(stack, core, seconds), await _changes(core)]
        await _add_tenants(core, tenants)
    return rows


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack whose keyvault has no lease cap in the way; its keyvault starts anew."""
    tenants = int(
        os.environ.get("BENCH_TENANTS") or (_TENANTS if seconds >= _SHORT_SECONDS else 200)
    )
    rows = asyncio.run(_measure(stack, seconds, tenants))
    # The first start owes all of them to the log, which the second one finds there.
    first, again = _start(stack), _start(stack)
    detail = {"tenants": tenants, "first_s": round(first, 2)}
    return [*rows, Row("start_s", again, "s", detail)]
