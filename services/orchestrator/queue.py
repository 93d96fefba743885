"""The dispatcher: tells some worker, at least once, that an attempt is due.

Procrastinate keeps the jobs; what they mean stands in our review and attempt
tables. A job holds an attempt's id and nothing else, and a handler may see an id
twice or late: the attempt's fence decides. docs/decisions/0002-queue.md has the
measurements, and why the library's job manager is overridden here.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import procrastinate
import psycopg
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager, NotificationCallback

from services.common import logs

Handler: TypeAlias = Callable[[str], Awaitable[None]]

_QUEUE = "attempts"
_TASK = "attempt"
_POLL_SECONDS = 0.25
_BEAT_SECONDS = 2.0
_STALLED_SECONDS = 10.0
_RECONNECT_SECONDS = 1.0
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0
_SCHEMA_LOCK = 0x62796F6B  # any number that every `migrate` of ours agrees on

# Ends a job (again later, or for good) if it is still ours: Procrastinate itself
# would end it for whoever asks, also while another worker runs it.
_END = """
WITH held AS MATERIALIZED (
    SELECT id FROM procrastinate_jobs
    WHERE id = %(job_id)s AND status = 'doing' AND attempts = %(attempts)s
        AND worker_id IS NOT DISTINCT FROM %(worker_id)s::bigint
    FOR UPDATE)
SELECT CASE WHEN %(retry_at)s::timestamptz IS NULL
    THEN procrastinate_finish_job_v1(id, %(status)s::procrastinate_job_status, %(delete_job)s)
    ELSE procrastinate_retry_job_v2(id, %(retry_at)s, NULL, NULL, NULL) END
FROM held
"""
_BEAT = """
INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (%(worker_id)s)
ON CONFLICT (id) DO UPDATE SET last_heartbeat = now()
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


class _Jobs(JobManager):
    """Job manager that survives a lost database and ends only jobs that it still holds."""

    def __init__(self, connector: procrastinate.PsycopgConnector) -> None:
        super().__init__(connector)
        self.worker_id: int | None = None
        self._held: set[int | None] = set()
        self._suspects: set[tuple[int | None, int]] = set()

    async def register_worker(self) -> int:
        self.worker_id = await super().register_worker()
        return self.worker_id

    async def unregister_worker(self, worker_id: int) -> None:
        self.worker_id = None
        await super().unregister_worker(worker_id)

    async def update_heartbeat(self, worker_id: int) -> None:
        # An upsert, for a worker that was frozen for long has lost its row, and with
        # it the right to fetch.
        try:
            await self.connector.execute_query_async(_BEAT, worker_id=worker_id)
        except ConnectorException as error:
            logs.failure(_log, "queue_heartbeat_failed", error)

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        try:
            job = await super().fetch_job(queues, worker_id)
        except ConnectorException as error:
            # Raised, it would stop the worker until its running jobs are done.
            logs.failure(_log, "queue_fetch_failed", error)
            return None
        if job:
            self._held.add(job.id)
        return job

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        await self._end(job, None, status, delete_job)

    async def retry_job(
        self,
        job: Job,
        retry_at: datetime.datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        lock: str | None = None,
    ) -> None:
        await self._end(job, retry_at or datetime.datetime.now(datetime.UTC))

    async def _end(
        self,
        job: Job,
        retry_at: datetime.datetime | None,
        status: Status = Status.SUCCEEDED,
        delete_job: bool = False,
    ) -> None:
        try:
            await self.connector.execute_query_async(
                _END,
                job_id=job.id,
                attempts=job.attempts,
                worker_id=job.worker_id,
                retry_at=retry_at,
                status=status.value,
                delete_job=delete_job,
            )
        except ConnectorException as error:
            # The job stays "doing" under a living worker: sweep() finds it.
            logs.failure(_log, "queue_end_failed", error, job=job.id)
        finally:
            self._held.discard(job.id)

    async def listen_for_jobs(
        self, *, on_notification: NotificationCallback, queues: Iterable[str] | None = None
    ) -> None:
        while True:
            try:
                await super().listen_for_jobs(on_notification=on_notification, queues=queues)
            except ConnectorException as error:
                logs.failure(_log, "queue_listen_failed", error)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def sweep(self) -> None:
        """Put jobs back that nobody runs: of dead workers, and those lost on the way to us."""
        if self.worker_id is not None:
            await self.update_heartbeat(self.worker_id)
        await self.prune_stalled_workers(_STALLED_SECONDS)
        stalled = list(
            await self.get_stalled_jobs(queue=_QUEUE, seconds_since_heartbeat=_STALLED_SECONDS)
        )
        for job in stalled + await self._lost():
            logs.event(_log, "queue_job_recovered", level=logging.WARNING, job=job.id)
            await self.retry_job(job)

    async def _lost(self) -> list[Job]:
        """Jobs that are ours by their row, but that we don't run: the answer to a fetch or the
        end of a job was lost. Only those seen twice, since a fetch may be on its way."""
        if self.worker_id is None:
            return []
        ours = await self.list_jobs_async(queue=_QUEUE, status="doing", worker_id=self.worker_id)
        idle = {(job.id, job.attempts): job for job in ours if job.id not in self._held}
        lost = [job for key, job in idle.items() if key in self._suspects]
        self._suspects = set(idle)
        return lost


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
        self._connector = procrastinate.PsycopgConnector(
            conninfo=database_url, min_size=1, max_size=4, timeout=5.0
        )
        self._app = procrastinate.App(connector=self._connector)
        self._jobs = _Jobs(self._connector)
        self._app.job_manager = self._jobs
        self._app.task(name=_TASK, queue=_QUEUE, retry=_Backoff())(self._dispatch)
        self._handler: Handler | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect. Raises `psycopg_pool.PoolTimeout` if the database can't be reached."""
        await self._app.open_async()

    async def close(self) -> None:
        """Disconnect; `run` must have ended."""
        await self._app.close_async()

    async def apply_schema(self) -> None:
        """Create the queue's tables, types and functions where they are missing."""
        async with self._connector.pool.connection() as raw:
            await raw.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
            found = await raw.execute("SELECT to_regclass('procrastinate_jobs') IS NOT NULL")
            if await found.fetchone() == (True,):
                return
            await raw.execute(self._app.schema_manager.get_schema())

    async def enqueue(
        self, raw: psycopg.AsyncConnection[Any], attempt_id: str, *, delay_seconds: float = 0
    ) -> None:
        """Enqueue an attempt in the caller's open transaction: no commit, no job.

        Args:
            raw: the driver's connection, with a transaction open.
            attempt_id: what the handler will get.
            delay_seconds: the earliest start, from now.
        """
        delay = {"milliseconds": round(delay_seconds * 1000)} if delay_seconds > 0 else None
        task = self._app.configure_task(
            _TASK, allow_unknown=False, connection=raw, schedule_in=delay
        )
        await task.defer_async(attempt_id=attempt_id)

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
            await asyncio.wait({worker, stopped}, return_when=asyncio.FIRST_COMPLETED)
            worker.cancel()
            await asyncio.wait({worker})
        finally:
            for task in self._running:
                task.cancel()
            if not worker.cancelling():
                worker.cancel()
            # A second cancellation of a worker would leave its jobs to the sweep of another.
            await asyncio.wait({worker})
            sweeper.cancel()
            stopped.cancel()
            await asyncio.wait({sweeper, stopped})
        if not worker.cancelled() and (error := worker.exception()):
            raise error

    async def _work(self) -> None:
        while True:
            try:
                await self._app.run_worker_async(
                    queues=[_QUEUE],
                    concurrency=self._concurrency,
                    fetch_job_polling_interval=_POLL_SECONDS,
                    delete_jobs="successful",
                    install_signal_handlers=False,
                    update_heartbeat_interval=_BEAT_SECONDS,
                    stalled_worker_timeout=_STALLED_SECONDS,
                )
            except ConnectorException as error:
                logs.failure(_log, "queue_worker_failed", error)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _sweep(self) -> None:
        # Also the heartbeat of a worker that drains: the library's own ends with its fetching.
        while True:
            try:
                await self._jobs.sweep()
            except ConnectorException as error:
                logs.failure(_log, "queue_sweep_failed", error)
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
