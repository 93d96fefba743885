"""How fast an export is verified."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator

from byokeep import auditlog
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.keyvault.event import GENESIS, link_hash
from tests.bench.results import Row, show

_TENANT = "tenants/bench"
_START = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


def _links(count: int) -> Iterator[audit_pb2.ChainedEvent]:
    """Links as leases make them: every other one leases, every other one releases."""
    previous = GENESIS
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
        digest = link_hash(previous, body)
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


if __name__ == "__main__":
    show([verify_speed()])
