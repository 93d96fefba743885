"""How fast, how much and how safe the queue is: `python -m tests.bench.queue_wakeup`.

Prints one JSON row a line: name, value, unit, detail. A private PostgreSQL is started
below /tmp. docs/decisions/0002-queue.md has the rows of the library that was not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import psycopg

from deploy.local.postgres import EmbeddedPostgres, new_password

CONCURRENCY = 8
TIMEOUT_SECONDS = 120


class AnyQueue(Protocol):
    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def apply_schema(self) -> None: ...
    async def enqueue(
        self, raw: psycopg.AsyncConnection[Any], attempt_id: str, *, delay_seconds: float = 0
    ) -> None: ...
    async def run(self, handler: Callable[[str], Awaitable[None]], stop: asyncio.Event) -> None: ...


MakeQueue = Callable[[str], AnyQueue]


def make_queue(url: str) -> AnyQueue:
    from services.orchestrator.queue import Queue

    return Queue(url, CONCURRENCY)


def row(name: str, value: float, unit: str, detail: str) -> None:
    print(
        json.dumps({"name": name, "value": round(value, 2), "unit": unit, "detail": detail}),
        flush=True,
    )


@contextlib.asynccontextmanager
async def working(
    queue: AnyQueue, handler: Callable[[str], Awaitable[None]]
) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(queue.run(handler, stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def wakeup(queue: AnyQueue, database: psycopg.AsyncConnection[Any], samples: int) -> None:
    """From the begin of the enqueuing transaction to the handler's first line."""
    started: dict[str, float] = {}
    event = asyncio.Event()

    async def handler(attempt_id: str) -> None:
        started[attempt_id] = time.perf_counter()
        event.set()

    times = []
    async with working(queue, handler):
        await asyncio.sleep(1)
        for number in range(samples):
            event.clear()
            begin = time.perf_counter()
            async with database.transaction():
                await queue.enqueue(database, f"att_{number}")
            await event.wait()
            times.append((started[f"att_{number}"] - begin) * 1000)
            # Not a multiple of any polling interval.
            await asyncio.sleep(random.uniform(0.03, 0.13))
    quantiles = statistics.quantiles(times, n=100)
    detail = f"{samples} samples, idle queue, load {os.getloadavg()[0]:.1f}"
    row("queue_wakeup_p50", quantiles[49], "ms", detail)
    row("queue_wakeup_p95", quantiles[94], "ms", detail)
    row("queue_wakeup_max", max(times), "ms", detail)


async def throughput(queue: AnyQueue, database: psycopg.AsyncConnection[Any], jobs: int) -> None:
    left = jobs
    done = asyncio.Event()

    async def handler(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.set()

    async with database.transaction():
        for number in range(jobs):
            await queue.enqueue(database, f"att_{number}")
    cpu = time.process_time()
    begin = time.perf_counter()
    async with working(queue, handler):
        await done.wait()
        seconds = time.perf_counter() - begin
        cpu = time.process_time() - cpu
    detail = f"{jobs} jobs, concurrency {CONCURRENCY}, load {os.getloadavg()[0]:.1f}"
    row("queue_noop_throughput", jobs / seconds, "jobs/s", detail)
    row("queue_noop_client_cpu", cpu / jobs * 1000, "ms/job", detail)


async def fairness(queue: AnyQueue, database: psycopg.AsyncConnection[Any], flood: int) -> None:
    order: list[str] = []
    done = asyncio.Event()

    async def handler(attempt_id: str) -> None:
        order.append(attempt_id)
        if attempt_id == "att_b":
            done.set()

    async with database.transaction():
        for number in range(flood):
            await queue.enqueue(database, f"att_a{number}")
        await queue.enqueue(database, "att_b")
    async with working(queue, handler):
        await done.wait()
    row(
        "queue_second_tenant_position",
        order.index("att_b") + 1,
        "th job",
        f"of {flood + 1}; first in, first out: fairness is the admitter's",
    )


async def recovery(
    queue: AnyQueue, database: psycopg.AsyncConnection[Any], url: str, command: list[str]
) -> None:
    """From SIGKILL of a worker in the middle of a job to another worker's start of it."""
    again = asyncio.Event()

    async def handler(_: str) -> None:
        again.set()

    async with database.transaction():
        await queue.enqueue(database, "att_killed")
    victim = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdin is not None
        assert victim.stdout is not None
        victim.stdin.write(url + "\n")
        victim.stdin.flush()
        assert await asyncio.to_thread(victim.stdout.readline) == "running\n"
        async with working(queue, handler):
            await asyncio.sleep(1)
            victim.send_signal(signal.SIGKILL)
            begin = time.perf_counter()
            await again.wait()
            seconds = time.perf_counter() - begin
    finally:
        victim.kill()
        victim.communicate()
    row("queue_recovery_after_kill9", seconds, "s", "another worker was up before the kill")


def import_memory(statement: str) -> None:
    code = (
        "import psycopg, psycopg_pool, asyncio, re\n"
        "def pss():\n"
        "    text = open('/proc/self/smaps_rollup').read()\n"
        "    return int(re.search(r'^Pss:\\s+(\\d+)', text, re.M).group(1))\n"
        f"before = pss()\n{statement}\nprint(pss() - before)"
    )
    if not Path("/proc/self/smaps_rollup").exists():
        return
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    row("queue_import_memory", int(done.stdout) / 1024, "MiB", "PSS beyond psycopg's")


async def worker(make: MakeQueue) -> None:
    """The victim: takes a job and never ends it. Its URL comes on standard input."""
    queue = make(sys.stdin.readline().strip())
    await queue.open()

    async def handler(_: str) -> None:
        print("running", flush=True)
        await asyncio.sleep(TIMEOUT_SECONDS)

    await queue.run(handler, asyncio.Event())


async def measure(server: EmbeddedPostgres, make: MakeQueue, command: list[str]) -> None:
    steps: list[Callable[[AnyQueue, psycopg.AsyncConnection[Any], str], Awaitable[None]]] = [
        lambda queue, database, _: wakeup(queue, database, 200),
        lambda queue, database, _: throughput(queue, database, 2000),
        lambda queue, database, _: fairness(queue, database, 1000),
        lambda queue, database, url: recovery(queue, database, url, command),
    ]
    for number, step in enumerate(steps):
        name = f"orchestrator_{os.getpid()}_{number}"
        url = server.create_database(name, "byokeep_orchestrator", new_password())
        queue = make(url)
        await queue.open()
        await queue.apply_schema()
        async with (
            asyncio.timeout(TIMEOUT_SECONDS),
            await psycopg.AsyncConnection.connect(url, autocommit=True) as database,
        ):
            await step(queue, database, url)
        await queue.close()


def main(make: MakeQueue, module: str, imports: str) -> None:
    if sys.argv[1:] == ["--victim"]:
        asyncio.run(worker(make))
        return
    directory = Path(tempfile.mkdtemp(prefix="byokeep-bench-", dir="/tmp"))
    server = EmbeddedPostgres(directory)
    try:
        server.start()
        asyncio.run(measure(server, make, [sys.executable, "-m", module, "--victim"]))
    finally:
        server.stop(discard=True)
        shutil.rmtree(directory, ignore_errors=True)
    import_memory(imports)


if __name__ == "__main__":
    main(make_queue, "tests.bench.queue_wakeup", "import procrastinate")
