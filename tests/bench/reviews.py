"""Reviews end to end: what byokeep adds to a provider's time, and how many it does.

The overhead of a review is the wall time from submit to the result in Watch, less
the time that the emulator held its request.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
from byokeep import transport
from byokeep.ids import new_id
from byokeep.orchestrator.v1 import review_pb2, review_pb2_grpc
from byokeep.testing import Stack

from tests.bench.results import Row, percentile

_RATE = 20.0
_LATENCY = 0.2  # what the emulator waits, as a provider would think
_DIFF = b"""diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(path):
+    total = 1
     return open(path)
"""


class _Client:
    def __init__(self, stack: Stack) -> None:
        client = stack.config.parent
        files = transport.TlsFiles(
            client / "developer.pem", client / "developer.key", stack.root / "pki" / "ca.pem"
        )
        self.channel = transport.aio_channel(
            stack.address("orchestrator"), "orchestrator.byokeep.internal", files
        )
        self.stub = review_pb2_grpc.ReviewServiceStub(self.channel)

    async def review(self) -> tuple[float, review_pb2.Review]:
        """Submit and watch one review; return seconds and the review."""
        unique = os.urandom(20).hex()
        request = review_pb2.SubmitReviewRequest(
            parent="tenants/demo",
            input=review_pb2.ReviewInput(
                repository="bench/bench", head_commit=unique, diff=_DIFF, title="bench"
            ),
            request_id=new_id("req"),
        )
        start = time.perf_counter()
        review = (await self.stub.SubmitReview(request)).review
        watch = self.stub.WatchReview(review_pb2.WatchReviewRequest(name=review.name))
        async for message in watch:
            review = message.review
        return time.perf_counter() - start, review


def _failures(reviews: list[review_pb2.Review]) -> dict[str, int]:
    failed: dict[str, int] = {}
    for review in reviews:
        if review.state != review_pb2.REVIEW_STATE_COMPLETED:
            name = review_pb2.FailureReason.Name(review.failure)
            failed[name] = failed.get(name, 0) + 1
    return failed


async def _at_rate(review: Callable[[], Awaitable[Any]], count: int) -> list[Any]:
    """Start reviews at random moments at an average rate, whatever the others do."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(review()))
        await asyncio.sleep(random.expovariate(_RATE))
    return await asyncio.gather(*tasks)


async def _closed(review: Callable[[], Awaitable[Any]], workers: int, seconds: float) -> list[Any]:
    results: list[Any] = []
    end = time.perf_counter() + seconds

    async def worker() -> None:
        while time.perf_counter() < end:
            results.append(await review())

    await asyncio.gather(*(worker() for _ in range(workers)))
    return results


async def _measure(stack: Stack, seconds: float) -> list[Row]:
    client = _Client(stack)
    await _closed(client.review, 2, 1.0)
    stack.emulator.latency(_LATENCY)
    before = psutil.cpu_times()
    timed = await _at_rate(client.review, max(20, int(_RATE * seconds)))
    busy = _busy(before, psutil.cpu_times()) / len(timed)
    held = _LATENCY
    overheads = [(took - held) * 1000 for took, _ in timed]
    stack.emulator.latency(0.0)
    start = time.perf_counter()
    flood = await _closed(client.review, 16, seconds)
    rate = len(flood) / (time.perf_counter() - start)
    await client.channel.close()
    detail = {
        "reviews": len(timed),
        "rate_per_s": _RATE,
        "emulator_s": _LATENCY,
        # Of the whole machine, client, emulator and PostgreSQL with it: what is left of its cores
        # at that rate says how long reviews wait for each other.
        "machine_cpu_ms_per_review": round(busy * 1000, 1),
        "failures": _failures([review for _, review in timed]),
    }
    return [
        Row("review_overhead_p50_ms", percentile(overheads, 0.5), "ms", detail),
        Row("review_overhead_p99_ms", percentile(overheads, 0.99), "ms", detail),
        Row(
            "noop_reviews_per_s",
            rate,
            "reviews/s",
            {"in_flight": 16, "failures": _failures([review for _, review in flood])},
        ),
    ]


def _busy(before: Any, after: Any) -> float:
    """Seconds of all cores that were not idle."""
    idle = after.idle + after.iowait - before.idle - before.iowait
    return float(sum(after) - sum(before) - idle)


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack whose tenant `demo` has an active key."""
    return asyncio.run(_measure(stack, seconds))
