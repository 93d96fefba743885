"""The dispatcher: tells some worker, at least once, that an attempt is due.

Procrastinate keeps the jobs; what they mean stands in our review and attempt
tables. A job holds an attempt's id and nothing else, and a handler may see an id
twice or late: the attempt's fence decides. docs/decisions/0002-queue.md has the
measurements.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import procrastinate
import psycopg
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job

from services.common import logs, postgres
from services.common.background import end_if_cancelled
from services.orchestrator.queue_jobs import (
    QUEUE,
    RECONNECT_SECONDS,
    STALLED_SECONDS,
    Connector,
    HeldJobs,
)

Handler: TypeAlias = Callable[[str], Awaitable[None]]

_TASK = "attempt"
_POLL_SECONDS = 0.25
_BEAT_SECONDS = 2.0
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0
_SCHEMA_LOCK = 0x62796F6B  # any number that every `migrate` of ours agrees on

# What the library's deferrer does, which takes twice as long to say it.
_ENQUEUE = f"""
SELECT procrastinate_defer_jobs_v1(ARRAY[ROW(
    '{QUEUE}', '{_TASK}', 0, NULL, NULL,
    jsonb_build_object('attempt_id', CAST(%(attempt_id)s AS text)),
    CASE WHEN %(delay)s > 0 THEN now() + make_interval(secs => %(delay)s) END
)]::procrastinate_job_to_defer_v1[])
"""
# Nobody reads the library's journal of jobs: our own tables say what became of an attempt.
_NO_JOURNAL = """
ALTER TABLE procrastinate_jobs
    DISABLE TRIGGER procrastinate_trigger_status_events_insert_v1,
    DISABLE TRIGGER procrastinate_trigger_status_events_update_v1,
    DISABLE TRIGGER procrastinate_trigger_scheduled_events_v1
"""

_log = logging.getLogger(__name__)


class _HandlerFailedError(Exception):
    """Stands for a handler's exception, without its text."""


class _Backoff(procrastinate.BaseRetryStrategy):
    """Retries for ever, ever more slowly: giving an attempt up is its handler's to decide."""

    def get_retry_decision(
        self, *, exception: BaseException, job: Job
    ) -> procrastinate.RetryDecision:
        wait = min(_FIRST_RETRY_SECONDS * 2 ** min(job.attempts, 16), _LONGEST_RETRY_SECONDS)
        if isinstance(exception, asyncio.CancelledError):
            wait = 0.0
        return procrastinate.RetryDecision(
            retry_at=datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=wait)
        )


class Queue:
    """A durable queue of attempt ids, on the orchestrator's own database."""

    def __init__(self, database_url: str, concurrency: int) -> None:
        """Connect to nothing yet.

        Args:
            database_url: `postgresql://` URL; the role owns the queue's tables.
            concurrency: handlers that `run` lets run at once.
        """
        # Its messages carry job arguments.
        logging.getLogger("procrastinate").setLevel(logging.WARNING)
        self._concurrency = concurrency
        # The library's own pool asks each connection whether it lives and wraps each statement
        # in a transaction: four round trips for one.
        self._pool = postgres.Pool(
            database_url, 4, wait_seconds=5.0, application_name="byokeep-orchestrator-queue"
        )
        self._connector = Connector()
        self._app = procrastinate.App(connector=self._connector)
        self._jobs = HeldJobs(self._connector)
        self._app.job_manager = self._jobs
        self._app.task(name=_TASK, queue=QUEUE, retry=_Backoff())(self._dispatch)
        self._handler: Handler | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Begin to connect."""
        await self._pool.open()
        await self._app.open_async(self._pool)

    async def close(self) -> None:
        """Disconnect; `run` must have ended."""
        await self._app.close_async()
        await self._pool.close()

    async def apply_schema(self) -> None:
        """Create the queue's tables, types and functions where they are missing."""
        async with self._pool.connection() as raw, raw.transaction():
            await raw.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
            found = await raw.execute("SELECT to_regclass('procrastinate_jobs') IS NOT NULL")
            if await found.fetchone() == (True,):
                return
            await raw.execute(self._app.schema_manager.get_schema())
            await raw.execute(_NO_JOURNAL)

    async def enqueue(
        self, raw: psycopg.AsyncConnection[Any], attempt_id: str, *, delay_seconds: float = 0
    ) -> None:
        """Enqueue an attempt in the caller's open transaction: no commit, no job.

        Args:
            raw: the driver's connection, with a transaction open.
            attempt_id: what the handler will get.
            delay_seconds: the earliest start, from now.
        """
        await raw.execute(_ENQUEUE, {"attempt_id": attempt_id, "delay": delay_seconds})

    async def run(self, handler: Handler, stop: asyncio.Event) -> None:
        """Run attempts until `stop` is set, then until the running handlers are done.

        Cancel it to bound that wait: it cancels the handlers and puts their jobs back.
        A handler that raises is called again later; one that returns is done.

        Args:
            handler: gets an attempt's id, maybe more than once.
            stop: ends the fetching of jobs.
        """
        self._handler = handler
        worker = asyncio.create_task(self._work(), name="queue worker")
        sweeper = asyncio.create_task(self._sweep(), name="queue sweeper")
        stopped = asyncio.create_task(stop.wait(), name="queue stop")
        try:
            # Whichever ends unasked: the other alone would leave jobs of the dead where they are.
            await asyncio.wait({worker, sweeper, stopped}, return_when=asyncio.FIRST_COMPLETED)
            worker.cancel()
            await asyncio.wait({worker})
        finally:
            # A second cancellation would leave the worker's jobs to the sweep of another.
            if not worker.cancelling():
                worker.cancel()
            while not worker.done():
                self._cancel_handlers()
                await asyncio.wait({worker}, timeout=_BEAT_SECONDS / 10)
            sweeper.cancel()
            stopped.cancel()
            await asyncio.wait({sweeper, stopped})
        for task in (worker, sweeper):
            if not task.cancelled() and (error := task.exception()):
                raise error

    def _cancel_handlers(self) -> None:
        # Each once: a handler may need to wait while it cleans up.
        for task in self._running:
            if not task.cancelling():
                task.cancel()

    async def _work(self) -> None:
        while True:
            try:
                await self._app.run_worker_async(
                    queues=[QUEUE],
                    concurrency=self._concurrency,
                    fetch_job_polling_interval=_POLL_SECONDS,
                    delete_jobs="successful",
                    install_signal_handlers=False,
                    update_heartbeat_interval=_BEAT_SECONDS,
                    stalled_worker_timeout=STALLED_SECONDS,
                )
            except ConnectorException as error:
                self._jobs.told.failure("queue_worker_failed", error)
            end_if_cancelled()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _sweep(self) -> None:
        # Also the heartbeat of a worker that drains: the library's own ends with its fetching.
        while True:
            try:
                await self._jobs.sweep()
            except ConnectorException as error:
                self._jobs.told.failure("queue_sweep_failed", error)
            end_if_cancelled()
            await asyncio.sleep(_BEAT_SECONDS)

    async def _dispatch(self, attempt_id: str) -> None:
        if self._handler is None or (task := asyncio.current_task()) is None:
            raise RuntimeError("only run() dispatches")
        self._running.add(task)
        failure: BaseException | None = None
        try:
            await self._handler(attempt_id)
        except Exception as error:
            failure = error
        finally:
            self._running.discard(task)
        if failure is not None:
            logs.failure(_log, "attempt_handler_failed", failure, attempt=attempt_id)
            failure = None
            # Outside the except block: the library must not see the cause either.
            raise _HandlerFailedError
