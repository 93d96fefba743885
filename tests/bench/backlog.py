"""What a backlog costs others: submitting beside 100,000 reviews that wait, and the place in the
queue of a tenant that submits one while another has 1,000 waiting.
"""

from __future__ import annotations

import asyncio
import time

import psycopg
from byokeep.names import last_of
from byokeep.testing import Stack

from tests.bench.results import Row, percentile
from tests.bench.reviews import Client
from tests.harness import tenants

_TENANTS = 25
_WAITING = 4_000  # of each: fewer than its plan lets wait
_AHEAD = 1_000
_CALL = 0.3  # so that every place is taken while the thousand wait
_RATE = 20.0

# They wait until somebody says otherwise, as those of a key that needs re-keying do.
_FILL = """
    WITH held AS (
        INSERT INTO pause (tenant, key_id, reason, until)
        VALUES (%(tenant)s, '', 'TENANT_SUSPENDED', 'infinity')),
    r AS (
        INSERT INTO review (id, tenant, repository, model, key_id, actor, chunks_total, max_calls)
        SELECT 'rev_' || lpad(n || %(tenant)s, 26, '0'), %(tenant)s, 'bench/old', 'openai/m',
            'key_old', 'bench', 1, 20
        FROM generate_series(1, %(count)s) n RETURNING id)
    INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version)
    SELECT 'att_' || substr(id, 5), 'REVIEW', %(tenant)s, id, 'key_old', 1 FROM r"""
_BETWEEN = """
    SELECT count(*) FROM attempt, review b
    WHERE b.id = %(id)s AND attempt.tenant = %(tenant)s
        AND attempt.start_time > b.create_time AND attempt.start_time < b.start_time"""


async def _submit(stack: Stack, seconds: float) -> Row:
    names = [tenants.create(stack, f"backlog-{number}") for number in range(_TENANTS)]
    client = Client(stack, names[:4])
    with psycopg.connect(stack.database_url("orchestrator"), autocommit=True) as connection:
        for name in names:
            connection.execute(_FILL, {"tenant": name, "count": _WAITING})
        took: list[float] = []

        async def one() -> None:
            start = time.perf_counter()
            await client.submit()
            took.append((time.perf_counter() - start) * 1000)

        await one()
        took.clear()
        tasks = []
        for _ in range(max(100, int(_RATE * seconds))):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(1 / _RATE)
        await asyncio.gather(*tasks)
        await client.channel.close()
        detail = {
            "waiting": _TENANTS * _WAITING,
            "rate_per_s": _RATE,
            "p50_ms": percentile(took, 0.5),
        }
        connection.execute("DELETE FROM review WHERE repository = 'bench/old'")
    return Row("submit_p99_ms", percentile(took, 0.99), "ms", detail)


async def _fair(stack: Stack) -> Row:
    many = Client(stack, [tenants.create(stack, "many")])
    one = Client(stack, [tenants.create(stack, "one")])
    stack.emulator.latency(_CALL)
    room = asyncio.Semaphore(50)

    async def submit() -> None:
        async with room:
            await many.submit()

    await asyncio.gather(*(submit() for _ in range(_AHEAD)))
    ended = await one.watch(await one.submit())
    with psycopg.connect(stack.database_url("orchestrator"), autocommit=True) as connection:
        parameters = {"id": last_of(ended.name), "tenant": "many"}
        row = connection.execute(_BETWEEN, parameters).fetchone()
    stack.emulator.latency(0.0)
    await many.cancel_all()
    for client in (many, one):
        await client.channel.close()
    assert row is not None
    return Row("fair_admissions_before", float(row[0]), "attempts", {"waiting": _AHEAD})


def run(stack: Stack, seconds: float) -> list[Row]:
    """Measure on a stack with the settings that users get."""
    return [asyncio.run(_fair(stack)), asyncio.run(_submit(stack, seconds))]
