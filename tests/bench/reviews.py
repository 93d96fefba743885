"""Reviews end to end: what byokeep adds to a provider's time, and how many it does.

The overhead of a review is the wall time from submit to the result in Watch, less
the time that the emulator held its request.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from byokeep import transport
from byokeep.ids import new_id
from byokeep.names import tenant_name
from byokeep.orchestrator.v1 import review_pb2, review_pb2_grpc
from byokeep.testing import Stack

from tests.bench.processes import Processes
from tests.bench.results import Row, percentile
from tests.harness import tenants

_TENANTS = 10
_REPOSITORY = "bench/bench"
_RATE = 20.0
_LATENCY = 0.2  # what the emulator waits, as a provider would think
_CALL = 3.0  # a call that outlives the orchestrator that asked for it
_OVER = (
    review_pb2.REVIEW_STATE_COMPLETED,
    review_pb2.REVIEW_STATE_FAILED,
    review_pb2.REVIEW_STATE_CANCELLED,
)
_DIFF = b"""diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(path):
+    total = 1
     return open(path)
"""


class Client:
    """Submits reviews of tenants in turn, each with a key of its own."""

    def __init__(self, stack: Stack, names: Sequence[str]) -> None:
        """Add a key to each of the tenants, which exist."""
        client = stack.config.parent
        files = transport.TlsFiles(
            client / "developer.pem", client / "developer.key", stack.root / "pki" / "ca.pem"
        )
        self.channel = transport.aio_channel(
            stack.address("orchestrator"), "orchestrator.byokeep.internal", files
        )
        self.stub = review_pb2_grpc.ReviewServiceStub(self.channel)
        for name in names:
            tenants.add_key(stack, name, "openai")
        self._tenants = itertools.cycle(names)

    async def review(self) -> tuple[float, review_pb2.Review]:
        """Submit and watch one review; return seconds and the review."""
        start = time.perf_counter()
        review = await self.watch(await self.submit())
        return time.perf_counter() - start, review

    async def submit(self) -> review_pb2.Review:
        """Submit a review of the next tenant."""
        request = review_pb2.SubmitReviewRequest(
            parent=tenant_name(next(self._tenants)),
            input=review_pb2.ReviewInput(
                repository=_REPOSITORY,
                head_commit=os.urandom(20).hex(),
                diff=_DIFF,
                title="bench",
            ),
            request_id=new_id("req"),
        )
        review: review_pb2.Review = (await self.stub.SubmitReview(request)).review
        return review

    async def watch(self, review: review_pb2.Review) -> review_pb2.Review:
        """Watch a review to its end, also past an orchestrator that was killed."""
        while review.state not in _OVER:
            try:
                async for message in self.stub.WatchReview(
                    review_pb2.WatchReviewRequest(name=review.name), wait_for_ready=True
                ):
                    review = message.review
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
        return review

    async def cancel_all(self) -> None:
        """Cancel what has not ended of the next tenant."""
        request = review_pb2.CancelReviewsRequest(
            parent=tenant_name(next(self._tenants)),
            filter=review_pb2.ReviewFilter(repository=_REPOSITORY),
            request_id=new_id("req"),
        )
        while True:
            request.page_token = (await self.stub.CancelReviews(request)).next_page_token
            if not request.page_token:
                return


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
    # One key may have 600 leases a minute, and one tenant's plan so many attempts at once: a load
    # of one tenant would measure the caps.
    names = [tenants.create(stack, f"bench-{number}") for number in range(_TENANTS)]
    client = Client(stack, names)
    await _closed(client.review, 2, 1.0)
    stack.emulator.latency(_LATENCY)
    ours = Processes(stack)
    timed = await _at_rate(client.review, max(20, int(_RATE * seconds)))
    cpu = ours.cpu_seconds() / len(timed)
    overheads = [(took - _LATENCY) * 1000 for took, _ in timed]
    stack.emulator.latency(0.0)
    start = time.perf_counter()
    flood = await _closed(client.review, 16, seconds)
    rate = len(flood) / (time.perf_counter() - start)
    recovery = await _recovery(stack, client)
    await client.channel.close()
    at_rate = {"reviews": len(timed), "rate_per_s": _RATE, "emulator_s": _LATENCY}
    detail = {**at_rate, "failures": _failures([review for _, review in timed])}
    return [
        Row("review_overhead_p50_ms", percentile(overheads, 0.5), "ms", detail),
        Row("review_overhead_p99_ms", percentile(overheads, 0.99), "ms", detail),
        Row("review_cpu_ms", cpu * 1000, "ms", at_rate),
        Row(
            "noop_reviews_per_s",
            rate,
            "reviews/s",
            {"in_flight": 16, "failures": _failures([review for _, review in flood])},
        ),
        recovery,
    ]


async def _recovery(stack: Stack, client: Client) -> Row:
    """Kill the orchestrator under reviews that are in a call; time until the last has ended."""
    stack.emulator.latency(_CALL)
    reviews = [await client.submit() for _ in range(_TENANTS)]
    while len(stack.emulator.calls()) == 0:
        await asyncio.sleep(0.05)
    stack.process("orchestrator").kill()
    start = time.perf_counter()
    stack.process("orchestrator").start()
    ended = await asyncio.gather(*(client.watch(review) for review in reviews))
    took = time.perf_counter() - start
    stack.emulator.latency(0.0)
    return Row(
        "recovery_s",
        took,
        "s",
        {"reviews": _TENANTS, "call_s": _CALL, "failures": _failures(ended)},
    )


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack with the settings that users get."""
    return asyncio.run(_measure(stack, seconds))
