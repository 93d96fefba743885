"""stall_ms: another tenant's worst wait for an ordinary call, while one tenant keeps 100 dry runs
in flight, and sends again at once what is refused. Their diff is 63 kB of short lines: no other of
that size takes so long to plan.

The attack has a process of its own: what is measured is the wait at the orchestrator.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from byokeep import transport
from byokeep.names import tenant_name
from byokeep.orchestrator.v1 import review_pb2, review_pb2_grpc, settings_pb2
from byokeep.testing import Stack

from tests.bench.results import Row, percentile
from tests.harness import tenants

_IN_FLIGHT = 100
_LINES = 31_500
_DIFF = b"--- a/x\n+++ b/x\n@@ -0,0 +1,%d @@\n" % _LINES + b"+\n" * _LINES


async def _flood(address: str, tls: transport.TlsFiles, tenant: str, tell: Any) -> None:
    channel = transport.aio_channel(address, "orchestrator.byokeep.internal", tls)
    stub = review_pb2_grpc.ReviewServiceStub(channel)
    request = review_pb2.DryRunReviewRequest(
        parent=tenant_name(tenant), input=review_pb2.ReviewInput(repository="a/b", diff=_DIFF)
    )
    ended: Counter[str] = Counter()
    stop = asyncio.Event()

    async def one() -> None:
        while not stop.is_set():
            try:
                await stub.DryRunReview(request)
                ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ended[error.code().name] += 1

    workers = [asyncio.create_task(one()) for _ in range(_IN_FLIGHT)]
    await asyncio.sleep(1)
    tell.send(None)
    await asyncio.to_thread(tell.recv)
    stop.set()
    await asyncio.gather(*workers)
    tell.send(dict(ended))
    await channel.close()


def _attack(address: str, tls: transport.TlsFiles, tenant: str, tell: Any) -> None:
    asyncio.run(_flood(address, tls, tenant, tell))


def run(stack: Stack, seconds: float) -> Row:
    """Measure on a stack with the settings that users get."""
    attacker, victim = tenants.create(stack, "flood"), tenants.create(stack, "victim")
    tenants.add_key(stack, attacker, "openai")
    folder: Path = stack.config.parent
    tls = transport.TlsFiles(
        folder / "developer.pem", folder / "developer.key", stack.root / "pki" / "ca.pem"
    )
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    flood = spawn.Process(
        target=_attack, args=(stack.address("orchestrator"), tls, attacker, theirs)
    )
    waits: list[float] = []
    with stack.connect("developer", tenant=victim) as connection:
        ordinary = settings_pb2.GetSettingsRequest(name=f"{connection.parent}/settings")
        connection.settings.GetSettings(ordinary)
        flood.start()
        ours.recv()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            connection.settings.GetSettings(ordinary, timeout=60)
            waits.append((time.perf_counter() - start) * 1000)
        ours.send(None)
        ended = ours.recv()
        flood.join()
    detail = {"calls": len(waits), "p50_ms": round(percentile(waits, 0.5), 1), "attack": ended}
    return Row("stall_ms", max(waits), "ms", detail)
