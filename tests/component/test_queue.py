"""The dispatcher on a real PostgreSQL: atomic, at least once, and hard to stop."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from procrastinate.schema import SchemaManager

from deploy.local.postgres import EmbeddedPostgres, new_password
from services.orchestrator.queue import Handler, Queue
from tests.harness import scratch

SECRET = "text-of-an-exception"


@pytest.fixture
async def queue(orchestrator_database_url: str) -> AsyncIterator[Queue]:
    queue = Queue(orchestrator_database_url, concurrency=4)
    await queue.open()
    await queue.apply_schema()
    yield queue
    await queue.close()


@pytest.fixture
async def database(orchestrator_database_url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    """A session of ours beside the queue's, in autocommit mode."""
    async with await psycopg.AsyncConnection.connect(
        orchestrator_database_url, autocommit=True
    ) as connection:
        yield connection


@asynccontextmanager
async def running(queue: Queue, handler: Handler) -> AsyncIterator[asyncio.Event]:
    """Run the queue; afterwards give handlers ten seconds."""
    stop = asyncio.Event()
    task = asyncio.create_task(queue.run(handler, stop))
    try:
        yield stop
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await task


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def enqueue(queue: Queue, database: psycopg.AsyncConnection, *ids: str) -> None:
    async with database.transaction():
        for attempt_id in ids:
            await queue.enqueue(database, attempt_id)


async def value(database: psycopg.AsyncConnection, query: str) -> object:
    row = await (await database.execute(query)).fetchone()
    return row[0] if row else None


class Recorder:
    """A handler that writes down what it was called with."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0

    async def __call__(self, attempt_id: str) -> None:
        self.seen.append(attempt_id)
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise ValueError(SECRET)
        self.ended.append(attempt_id)


async def test_the_schema_is_applied_once(queue: Queue) -> None:
    await asyncio.gather(*(queue.apply_schema() for _ in range(3)))


def test_the_schema_is_the_one_that_we_know() -> None:
    """A newer library may bring a migration: then Alembic must run it, and this name change."""
    names = sorted(path.name for path in Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    assert names[-1] == "03.04.00_50_post_add_retry_failed_job_procedure.sql"


async def test_a_job_is_as_atomic_as_its_transaction(
    queue: Queue, database: psycopg.AsyncConnection
) -> None:
    async with database.transaction(force_rollback=True):
        await queue.enqueue(database, "att_rolled_back")
    recorder = Recorder()
    async with running(queue, recorder):
        async with database.transaction():
            await queue.enqueue(database, "att_kept")
            await asyncio.sleep(0.6)
            assert recorder.seen == []
        await until(lambda: recorder.ended == ["att_kept"])


async def test_a_delayed_job_waits(queue: Queue, database: psycopg.AsyncConnection) -> None:
    recorder = Recorder()
    async with running(queue, recorder):
        async with database.transaction():
            await queue.enqueue(database, "att_later", delay_seconds=1)
        await asyncio.sleep(0.7)
        assert recorder.seen == []
        await until(lambda: recorder.ended == ["att_later"], 3)


async def test_finished_jobs_leave_nothing(queue: Queue, database: psycopg.AsyncConnection) -> None:
    recorder = Recorder()
    async with running(queue, recorder):
        await enqueue(queue, database, *(f"att_{number}" for number in range(50)))
        await until(lambda: len(recorder.ended) == 50)
    left = (
        "SELECT (SELECT count(*) FROM procrastinate_jobs)"
        " + (SELECT count(*) FROM procrastinate_events)"
        " + (SELECT count(*) FROM procrastinate_workers)"
    )
    assert await value(database, left) == 0


async def test_concurrency_is_bounded(queue: Queue, database: psycopg.AsyncConnection) -> None:
    recorder = Recorder()
    recorder.gate.clear()
    async with running(queue, recorder):
        await enqueue(queue, database, *(f"att_{number}" for number in range(6)))
        await until(lambda: len(recorder.seen) == 4)
        await asyncio.sleep(0.5)
        assert len(recorder.seen) == 4
        recorder.gate.set()
        await until(lambda: len(recorder.ended) == 6)


async def test_a_failed_job_comes_back_and_its_text_is_nowhere(
    queue: Queue, database: psycopg.AsyncConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Was shown to fail with the handler's exception passed on to the library."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="procrastinate")
    recorder = Recorder()
    recorder.failures = 2
    async with running(queue, recorder):
        await enqueue(queue, database, "att_failing")
        await until(lambda: recorder.ended == ["att_failing"])
    assert recorder.seen == ["att_failing"] * 3
    fields = [getattr(record, "byokeep_fields", {}) for record in caplog.records]
    assert [line["error"] for line in fields if "error" in line] == ["builtins.ValueError"] * 2
    formatter = logging.Formatter()
    assert all(SECRET not in formatter.format(record) for record in caplog.records)


async def test_the_library_is_silent(
    queue: Queue, database: psycopg.AsyncConnection, caplog: pytest.LogCaptureFixture
) -> None:
    """Was shown to fail without the library's log level set."""
    caplog.set_level(logging.DEBUG)
    recorder = Recorder()
    async with running(queue, recorder):
        await enqueue(queue, database, "att_quiet")
        await until(lambda: recorder.ended == ["att_quiet"])
    assert not [record for record in caplog.records if record.name.startswith("procrastinate")]


async def test_stop_waits_for_handlers(queue: Queue, database: psycopg.AsyncConnection) -> None:
    recorder = Recorder()
    recorder.gate.clear()
    async with running(queue, recorder) as stop:
        await enqueue(queue, database, "att_running")
        await until(lambda: recorder.seen == ["att_running"])
        stop.set()
        await asyncio.sleep(0.5)  # a fetch that runs may still end
        await enqueue(queue, database, "att_late")
        await asyncio.sleep(0.5)
        recorder.gate.set()
    assert recorder.ended == ["att_running"]
    assert await value(database, "SELECT status FROM procrastinate_jobs") == "todo"


async def test_a_draining_worker_is_alive(queue: Queue, database: psycopg.AsyncConnection) -> None:
    """Was shown to fail without the sweeper's heartbeat: another replica then took the job."""
    recorder = Recorder()
    recorder.gate.clear()
    async with running(queue, recorder) as stop:
        await enqueue(queue, database, "att_running")
        await until(lambda: recorder.seen == ["att_running"])
        stop.set()
        await asyncio.sleep(0.1)
        await database.execute("UPDATE procrastinate_workers SET last_heartbeat = '2000-01-01'")
        await asyncio.sleep(2.5)
        beat = "SELECT last_heartbeat > now() - interval '3 s' FROM procrastinate_workers"
        assert await value(database, beat) is True
        recorder.gate.set()


async def test_cancelling_puts_jobs_back(queue: Queue, database: psycopg.AsyncConnection) -> None:
    recorder = Recorder()
    recorder.gate.clear()
    task = asyncio.create_task(queue.run(recorder, asyncio.Event()))
    await enqueue(queue, database, "att_cut")
    await until(lambda: recorder.seen == ["att_cut"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    recorder.gate.set()
    async with running(queue, recorder):
        await until(lambda: recorder.ended == ["att_cut"], 3)


async def test_a_dead_workers_job_runs_elsewhere(
    queue: Queue, database: psycopg.AsyncConnection
) -> None:
    """Was shown to fail without the sweep."""
    await enqueue(queue, database, "att_orphan")
    await database.execute(
        "WITH dead AS (INSERT INTO procrastinate_workers (last_heartbeat)"
        " VALUES (now() - interval '11 s') RETURNING id)"
        " UPDATE procrastinate_jobs SET status = 'doing', worker_id = dead.id FROM dead"
    )
    recorder = Recorder()
    async with running(queue, recorder):
        await until(lambda: recorder.ended == ["att_orphan"], 5)


async def test_an_outage_is_not_taken_for_a_death(
    queue: Queue, database: psycopg.AsyncConnection
) -> None:
    """A worker that could not beat does not bury others that could not either. Was shown to
    fail without _blind_until."""
    recorder = Recorder()
    async with running(queue, recorder):
        await asyncio.sleep(0.3)
        await database.execute("ALTER TABLE procrastinate_workers RENAME TO away")
        await asyncio.sleep(2.5)
        await database.execute(
            "WITH other AS (INSERT INTO away (last_heartbeat)"
            " VALUES (now() - interval '11 s') RETURNING id)"
            " INSERT INTO procrastinate_jobs (queue_name, task_name, args, status, worker_id)"
            " SELECT 'attempts', 'attempt', '{\"attempt_id\": \"att_alive\"}', 'doing', id"
            " FROM other"
        )
        await database.execute("ALTER TABLE away RENAME TO procrastinate_workers")
        await asyncio.sleep(4)
        assert recorder.seen == []


async def test_a_job_lost_on_the_way_is_found(
    queue: Queue, database: psycopg.AsyncConnection
) -> None:
    """A fetch that was committed and never answered. Was shown to fail without _lost."""
    recorder = Recorder()
    async with running(queue, recorder):
        await asyncio.sleep(0.3)
        async with database.transaction():
            await queue.enqueue(database, "att_unheard")
            await database.execute(
                "UPDATE procrastinate_jobs SET status = 'doing',"
                " worker_id = (SELECT max(id) FROM procrastinate_workers)"
            )
        await until(lambda: recorder.ended == ["att_unheard"], 8)


async def test_only_the_holder_ends_a_job(queue: Queue, database: psycopg.AsyncConnection) -> None:
    """The library alone lets a worker that was taken for dead delete its successor's job;
    was shown to fail with the library's own finish_job."""
    recorder = Recorder()
    recorder.gate.clear()
    async with running(queue, recorder):
        await enqueue(queue, database, "att_taken")
        await until(lambda: recorder.seen == ["att_taken"])
        await database.execute(
            "WITH other AS (INSERT INTO procrastinate_workers DEFAULT VALUES RETURNING id)"
            " UPDATE procrastinate_jobs SET worker_id = other.id, attempts = 1 FROM other"
        )
        recorder.gate.set()
        await until(lambda: recorder.ended == ["att_taken"])
        await asyncio.sleep(0.2)
    assert await value(database, "SELECT status FROM procrastinate_jobs") == "doing"


async def test_a_frozen_worker_comes_back(queue: Queue, database: psycopg.AsyncConnection) -> None:
    """Its row was pruned meanwhile: it must register again, or it never gets a job."""
    recorder = Recorder()
    async with running(queue, recorder):
        await asyncio.sleep(0.3)
        await database.execute("DELETE FROM procrastinate_workers")
        await enqueue(queue, database, "att_after_thaw")
        await until(lambda: recorder.ended == ["att_after_thaw"], 5)


async def test_a_failed_fetch_stops_nothing(
    queue: Queue, database: psycopg.AsyncConnection
) -> None:
    """Was shown to fail with the library's own fetch_job: it then drains, deaf to new jobs."""
    recorder = Recorder()
    recorder.gate.clear()
    async with running(queue, recorder):
        await enqueue(queue, database, "att_long")
        await until(lambda: recorder.seen == ["att_long"])
        await database.execute("ALTER FUNCTION procrastinate_fetch_job_v2 RENAME TO away")
        await asyncio.sleep(0.8)
        await database.execute("ALTER FUNCTION away RENAME TO procrastinate_fetch_job_v2")
        await enqueue(queue, database, "att_next")
        await until(lambda: recorder.seen == ["att_long", "att_next"], 5)
        recorder.gate.set()


async def test_a_database_restart_stops_nothing() -> None:
    """Fetching and notifications go on while an older handler still runs; was shown to fail
    with the library's own listen_for_jobs, which goes deaf."""
    directory = scratch.folder()
    server = EmbeddedPostgres(directory)
    recorder = Recorder()
    recorder.gate.clear()
    try:
        server.start()
        url = server.create_database("orchestrator", "byokeep_orchestrator", new_password())
        queue = Queue(url, concurrency=4)
        await queue.open()
        await queue.apply_schema()
        async with running(queue, recorder):
            async with await psycopg.AsyncConnection.connect(url) as database:
                await queue.enqueue(database, "att_long")
            await until(lambda: recorder.seen == ["att_long"])
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(1)
            await asyncio.to_thread(server.start)
            async with await psycopg.AsyncConnection.connect(url) as database:
                await queue.enqueue(database, "att_next")
            await until(lambda: recorder.seen == ["att_long", "att_next"], 5)
            await asyncio.sleep(1.5)
            with server.connect() as superuser:
                listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
                assert superuser.execute(listening).fetchone() == (1,)
            recorder.gate.set()
            await until(lambda: sorted(recorder.ended) == ["att_long", "att_next"], 5)
        await queue.close()
    finally:
        server.stop(discard=True)
        shutil.rmtree(directory, ignore_errors=True)


async def test_a_database_without_schema_is_waited_for(empty_database_url) -> None:
    url = empty_database_url("orchestrator")
    queue = Queue(url, concurrency=1)
    await queue.open()
    recorder = Recorder()
    async with running(queue, recorder):  # no schema yet: every query fails
        await asyncio.sleep(0.5)
        await queue.apply_schema()
        async with await psycopg.AsyncConnection.connect(url) as database:
            await queue.enqueue(database, "att_patient")
        await until(lambda: recorder.ended == ["att_patient"], 5)
    await queue.close()
