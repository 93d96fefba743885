"""Audit figures: how fast an export is verified, and what reconciling many keys costs.

`python -m tests.bench.audit [--keys N]`: audit_verify_events_per_s alone is quick; with keys,
a keyvault database is filled with that many key versions of one tenant.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from byokeep import auditlog
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.postgres import EmbeddedPostgres, new_password
from services.keyvault import chain, migrate
from services.keyvault.anchor import Anchor
from services.keyvault.anchor_store import FileAnchor
from services.keyvault.database import Database
from services.keyvault.reconcile import Reconcile
from tests.bench.results import Row, show

_TENANT = "tenants/bench"
_START = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


def _links(count: int) -> Iterator[audit_pb2.ChainedEvent]:
    """Links as leases make them: every other one leases, every other one releases."""
    previous = chain.GENESIS
    caller, actor = "spiffe://byokeep.local/runner/default", "spiffe://byokeep.local/client/shop"
    for number in range(1, count + 1):
        event = audit_pb2.AuditEvent(
            deployment="bench",
            chain=_TENANT,
            sequence=number,
            type=audit_pb2.AUDIT_EVENT_TYPE_LEASED,
            key_id=new_id("key"),
            key_version=1,
            provider=1,
            lease_id=new_id("lea"),
            grant_id=new_id("gra"),
            review_id=new_id("rev"),
            attempt_id=new_id("att"),
            fence=number,
            purpose=1,
            actor=actor if number % 2 else "",
            caller=caller,
        )
        if not number % 2:
            event.type, event.outcome = audit_pb2.AUDIT_EVENT_TYPE_RELEASED, 1
            event.report.process_id = number
            event.report.open_time.FromMicroseconds(1_772_000_000_000_000 + number)
            event.report.close_time.FromMicroseconds(1_772_000_000_100_000 + number)
        event.event_time.FromDatetime(_START + datetime.timedelta(milliseconds=number))
        body = event.SerializeToString()
        digest = chain.link_hash(previous, body)
        yield audit_pb2.ChainedEvent(body=body, previous_hash=previous, hash=digest)
        previous = digest


def verify_speed(count: int = 200_000) -> Row:
    """Return audit_verify_events_per_s: of a file, as `byokeep audit verify` reads it, by the
    clock on the wall; in the detail, CPU seconds of all processes, and events per second of CPU
    where one process does it alone."""
    from tests.harness.chain import Chain, SigningKey

    key = SigningKey("alk", Ed25519PrivateKey.generate())
    made = Chain(name=_TENANT, deployment="bench", key=key)
    made.links = list(_links(count))
    with tempfile.TemporaryFile() as file:
        file.writelines(line.encode() + b"\n" for line in made.export())

        def verify(processes: int) -> None:
            file.seek(0)
            chunks = auditlog.chunks_of(file)
            trusted = {key.key_id: key.public}
            auditlog.verify_chunks(chunks, trusted, deployment="bench", processes=processes)

        alone = _used(lambda: verify(1))
        processes, start = auditlog.cores(), time.perf_counter()
        cpu = _used(lambda: verify(processes))
        took = time.perf_counter() - start
    detail = {
        "events": count,
        "processes": processes,
        "cpu_s": round(cpu, 2),
        "alone_per_cpu_s": round(count / alone),
    }
    return Row("audit_verify_events_per_s", count / took, "1/s", detail)


def _used(act: Callable[[], None]) -> float:
    """Return the CPU seconds that something takes, here and in processes that it starts."""
    before = os.times()
    act()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


async def _fill(database: Database, keys: int) -> None:
    """Store keys of one tenant with one STAGED event each, as a chain that verifies."""
    previous, sequence = chain.GENESIS, 0
    async with database.transaction() as connection:
        await chain.create(connection, chain.SYSTEM)
        await chain.create(connection, _TENANT)
        cursor = connection.cursor()
        rows, versions = [], []
        for sequence in range(1, keys + 1):
            key_id = f"key_{sequence:026}"
            event = audit_pb2.AuditEvent(
                deployment="bench",
                chain=_TENANT,
                sequence=sequence,
                type=audit_pb2.AUDIT_EVENT_TYPE_STAGED,
                key_id=key_id,
                key_version=1,
            )
            body = event.SerializeToString()
            digest = chain.link_hash(previous, body)
            rows.append((_TENANT, sequence, key_id, body, previous, digest))
            versions.append((key_id, sequence))
            previous = digest
        copy = "COPY audit_event (chain, sequence, key_id, body, previous_hash, hash) FROM STDIN"
        async with cursor.copy(copy) as target:
            for row in rows:
                await target.write_row(row)
        copy = "COPY provider_key (tenant, key_id, provider, owner, display_name) FROM STDIN"
        async with cursor.copy(copy) as target:
            for key_id, _ in versions:
                await target.write_row(("bench", key_id, "openai", "", key_id))
        copy = (
            "COPY key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,"
            " kek_backend, kek_version, wrapped_dek, envelope) FROM STDIN"
        )
        blob = hashlib.sha512(b"x").digest()
        async with cursor.copy(copy) as target:
            for key_id, number in versions:
                row = ("bench", key_id, 1, 1, number, blob[:32], "", "local", 1, blob, blob * 2)
                await target.write_row(row)
        await connection.execute(
            "UPDATE chain SET sequence = %s, hash = %s WHERE chain = %s",
            (sequence, previous, _TENANT),
        )


def _cpu(server: psutil.Process) -> float:
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def _reconcile(url: str, folder: Path, keys: int, server: psutil.Process) -> list[Row]:
    database = Database(url, 4)
    await database.open()
    try:
        await _fill(database, keys)
        anchor = Anchor(database, FileAnchor(folder / "anchor.json"), "bench")
        await anchor.tick()
        tracemalloc.start()
        first = Reconcile(database, database, anchor, bytes(32), "bench")
        begun = time.perf_counter()
        await first.once()
        followed = time.perf_counter() - begun
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        await first.save()
        again = Reconcile(database, database, anchor, bytes(32), "bench")
        begun = time.perf_counter()
        await again.once()
        started = time.perf_counter() - begun
        own, theirs = time.process_time(), _cpu(server)
        passes = 4
        for _ in range(passes):
            await again.once()
        own, theirs = time.process_time() - own, _cpu(server) - theirs
        assert again.frozen() == 0
        begun, own_tick = time.perf_counter(), time.process_time()
        for _ in range(50):
            await anchor.tick()
        tick = (time.perf_counter() - begun) / 50
        own_tick = (time.process_time() - own_tick) / 50
    finally:
        await database.close()
    detail = {"keys": keys}
    share = 100 / (passes * 20)
    return [
        Row("reconcile_memory_mb", held / 1e6, "MB", detail),
        Row("reconcile_first_s", followed, "s", detail | {"traced": True}),
        Row("reconcile_start_s", started, "s", detail | {"from": "snapshot"}),
        Row("reconcile_cpu_percent", own * share, "% of core", detail | {"of": "keyvault"}),
        Row("reconcile_db_percent", theirs * share, "% of core", detail | {"of": "postgres"}),
        Row("anchor_tick_ms", tick * 1000, "ms", {"cpu_ms": round(own_tick * 1000, 2)}),
    ]


def reconcile_cost(keys: int) -> list[Row]:
    """Measure with an embedded PostgreSQL of its own."""
    folder = Path(tempfile.mkdtemp(prefix="byokeep-bench-", dir="/tmp"))
    # As root, the server runs as a user of its own, which must get there.
    folder.chmod(0o755)
    server = EmbeddedPostgres(folder / "pg")
    try:
        server.start()
        url = server.create_database("keyvault", "byokeep_keyvault", new_password())
        migrate.upgrade(url)
        return asyncio.run(_reconcile(url, folder, keys, psutil.Process(server.pid)))
    finally:
        server.stop(discard=True)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=int(os.environ.get("BENCH_KEYS") or 0))
    arguments = parser.parse_args()
    rows = [verify_speed()]
    if arguments.keys:
        rows += reconcile_cost(arguments.keys)
    show(rows)


if __name__ == "__main__":
    main()
