"""lease_scale_ratio: the middle latency of a lease with many keys stored, held against few.

Two keyvaults on two databases of one server are leased from in turns, one lease at a time, so
that what else the machine does falls on both. The rows are what staging, promoting and one
lease of each key would have left: chains that verify, a real envelope, a lease, meters. Both
start on rows that are there, and have followed and reconciled them before they are measured.
`BENCH_KEYS` says how many keys the large one has: 1,000,000, or 20,000 in a short run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
from byokeep.keyvault.v1 import audit_pb2
from byokeep.testing import Stack

from services.keyvault import chain
from tests.bench.keyvault_client import Call, Tenant
from tests.bench.results import Row, percentile
from tests.harness.replica import Process

_FEW = 1_000
_MANY = 1_000_000
_SHORT_SECONDS = 10.0
_SHORT = 20_000
_PER_TENANT = 1_000
_TURNS = 4

_QUIET_SECONDS, _QUIET_CPU = 2.0, 0.1
_SETTLED_SECONDS = 1800.0

_CHAIN = "COPY chain (chain, sequence, hash) FROM STDIN"
_EVENT = "COPY audit_event (chain, sequence, key_id, body, previous_hash, hash) FROM STDIN"
_KEY = "COPY provider_key (tenant, key_id, provider, owner, display_name) FROM STDIN"
# The bytes of the key that is real: as long as any, and nobody opens them.
_VERSION = """
INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,
                         kek_backend, kek_version, wrapped_dek, envelope)
SELECT k.tenant, k.key_id, 1, v.state, e.sequence, v.state_mac, v.hint,
       v.kek_backend, v.kek_version, v.wrapped_dek, v.envelope
FROM provider_key k
JOIN audit_event e ON e.chain = 'tenants/' || k.tenant AND e.key_id = k.key_id
                  AND e.sequence % 2 = 0
CROSS JOIN (SELECT * FROM key_version WHERE tenant = 'demo' LIMIT 1) v
WHERE k.tenant LIKE 'bench-%'
"""
_LEASE = """
INSERT INTO lease (lease_id, grant_id, tenant, key_id, version, holder, attempt_id, review_id,
                   fence, purpose, expire_time, end_time, release_time, outcome)
SELECT 'lea_' || substr(key_id, 5), 'gra_' || substr(key_id, 5), tenant, key_id, 1, 'bench',
       'att', 'rev', 1, 2, now(), now(), now(), 1
FROM provider_key WHERE tenant LIKE 'bench-%'
"""
_METER = """
INSERT INTO lease_meter (tenant, key_id, in_flight, minute, minute_count, day, day_count)
SELECT tenant, coalesce(key_id, ''), 0, 0, 0, 0, 0
FROM provider_key WHERE tenant LIKE 'bench-%' GROUP BY GROUPING SETS ((tenant), (tenant, key_id))
"""


def _fill(url: str, keys: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection, connection.transaction():
        cursor = connection.cursor()
        heads = []
        with cursor.copy(_EVENT) as copy:
            for start in range(0, keys, _PER_TENANT):
                heads.append(_chain(copy, start, min(keys, start + _PER_TENANT)))
        with cursor.copy(_CHAIN) as copy:
            for name, sequence, head in heads:
                copy.write_row((name, sequence, head))
        with cursor.copy(_KEY) as copy:
            for number in range(keys):
                name = f"bench-{number // _PER_TENANT}"
                copy.write_row((name, _key_id(number), "openai", "", f"k{number}"))
        for statement in (_VERSION, _LEASE, _METER):
            cursor.execute(statement)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def _chain(copy: psycopg.Copy, start: int, end: int) -> tuple[str, int, bytes]:
    name = chain.tenant_chain(f"bench-{start // _PER_TENANT}")
    previous, sequence = chain.GENESIS, 0
    for number in range(start, end):
        for kind in (audit_pb2.AUDIT_EVENT_TYPE_STAGED, audit_pb2.AUDIT_EVENT_TYPE_PROMOTED):
            sequence += 1
            event = audit_pb2.AuditEvent(
                chain=name, sequence=sequence, type=kind, key_id=_key_id(number), key_version=1
            )
            body = event.SerializeToString(deterministic=True)
            digest = chain.link_hash(previous, body)
            copy.write_row((name, sequence, event.key_id, body, previous, digest))
            previous = digest
    return name, sequence, previous


def _key_id(number: int) -> str:
    return f"key_{number:026d}"


@contextlib.contextmanager
def _keyvault(stack: Stack, name: str) -> Iterator[tuple[Process, str]]:
    """A keyvault on a database of its own, not started; and that database's URL."""
    local = stack._running
    first = stack.database_url("keyvault")
    password = psycopg.conninfo.conninfo_to_dict(first)["password"]
    url = local.postgres.create_database(f"keyvault_{name}", "byokeep_keyvault", str(password))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        secret = folder / "database"
        secret.touch(mode=0o600)
        secret.write_text(url)
        environ = {
            **local.topology.environment("keyvault"),
            "BYOKEEP_DATABASE_URL_FILE": str(secret),
            "BYOKEEP_ANCHOR_FILE": str(folder / "anchor"),
        }
        subprocess.run(
            [sys.executable, "-m", "services.keyvault", "migrate"],
            env={**environ, "PATH": os.environ["PATH"]},
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )
        process = Process(environ, folder, name)
        try:
            yield process, url
        finally:
            process.kill()


async def _leasing(stack: Stack, process: Process, url: str, keys: int) -> Call:
    """Start a keyvault that stores so many keys; return a call that leases one of them."""
    tenant = Tenant(stack, process.address)
    process.start()
    await asyncio.to_thread(process.wait)
    await tenant.create()
    await tenant.add_key()
    process.kill()
    await asyncio.to_thread(_fill, url, keys)
    process.start()
    # Before it serves, it follows every chain: this once, there is nothing saved to start from.
    await asyncio.to_thread(process.wait, _SETTLED_SECONDS)
    await asyncio.to_thread(_settle, process)
    return tenant.leasing()


def _settle(process: Process) -> None:
    """Wait until a keyvault has nothing more to catch up with."""
    running, end = psutil.Process(process.pid), time.monotonic() + _SETTLED_SECONDS
    while running.cpu_percent(_QUIET_SECONDS) > _QUIET_CPU * 100:
        if time.monotonic() > end:
            raise TimeoutError("keyvault does not come to rest")


async def _sequential(call: Call, seconds: float) -> list[float]:
    latencies, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        await call()
        latencies.append(time.perf_counter() - start)
    return latencies


async def _measure(stack: Stack, seconds: float) -> Row:
    many = int(os.environ.get("BENCH_KEYS") or (_MANY if seconds >= _SHORT_SECONDS else _SHORT))
    with _keyvault(stack, "few") as few, _keyvault(stack, "many") as large:
        calls = {
            "few": await _leasing(stack, *few, _FEW),
            "many": await _leasing(stack, *large, many),
        }
        latencies: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            await _sequential(call, min(1.0, seconds))
        for _ in range(_TURNS):
            for name, call in calls.items():
                latencies[name] += await _sequential(call, seconds / _TURNS)
    middle = {name: percentile(values, 0.5) for name, values in latencies.items()}
    return Row(
        "lease_scale_ratio",
        middle["many"] / middle["few"],
        "ratio",
        {
            "keys": many,
            "keys_few": _FEW,
            "p50_ms": round(middle["many"] * 1000, 2),
            "p50_few_ms": round(middle["few"] * 1000, 2),
            "p99_ms": round(percentile(latencies["many"], 0.99) * 1000, 2),
            "p99_few_ms": round(percentile(latencies["few"], 0.99) * 1000, 2),
        },
    )


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack whose keyvault has no lease cap in the way."""
    return [asyncio.run(_measure(stack, seconds))]
