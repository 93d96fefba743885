"""Procrastinate's job manager, made to survive what ours must survive.

The library stops fetching when one query fails, loses its heartbeat or its ear
without a word when their task fails, never finds a job whose fetch or end went
unanswered under a living worker, and lets a worker that was taken for dead delete
the job that its successor runs. docs/decisions/0002-queue.md has more.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

import procrastinate
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager, NotificationCallback

from services.common import deadline, logs, postgres
from services.common.background import end_if_cancelled

QUEUE = "attempts"
STALLED_SECONDS = 10.0
RECONNECT_SECONDS = 1.0
# Below STALLED_SECONDS: who can't fetch, or say that it lives, knows that before others do.
_FETCH_SECONDS = 4.0

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

_Key: TypeAlias = tuple[int | None, int]

_log = logging.getLogger(__name__)


def _key(job: Job) -> _Key:
    # A job that was put back and fetched again is another one.
    return (job.id, job.attempts)


class Connector(procrastinate.PsycopgConnector):
    """Procrastinate's way to PostgreSQL, whose ear is pinged."""

    async def _loop_notify(self, on_notification: Any, connection: Any, timeout: float = 0) -> None:
        async for notice in postgres.notices(connection):
            await on_notification(channel=notice.channel, payload=notice.payload)


class HeldJobs(JobManager):
    """Job manager that survives a lost database and ends only jobs that it still holds."""

    def __init__(self, connector: procrastinate.PsycopgConnector) -> None:
        """Serve the one worker that the process runs at a time."""
        super().__init__(connector)
        self._worker_id: int | None = None
        self._blind_until = 0.0
        self._held: set[_Key] = set()
        self._suspects: set[_Key] = set()
        #: What keeps failing while the database is away.
        self.told = logs.Repeated(_log)

    async def register_worker(self) -> int:
        """Register, and remember as whom."""
        self._worker_id = await super().register_worker()
        return self._worker_id

    async def unregister_worker(self, worker_id: int) -> None:
        """Unregister; what is then still "doing" is anybody's."""
        self._worker_id = None
        await super().unregister_worker(worker_id)

    async def update_heartbeat(self, worker_id: int) -> None:
        """Beat, or try again at the next beat.

        An upsert: a worker that was frozen for long has lost its row, and with it the
        right to fetch.
        """
        try:
            with deadline.within(_FETCH_SECONDS):
                await self.connector.execute_query_async(_BEAT, worker_id=worker_id)
        except ConnectorException as error:
            # The other workers' beats may have failed like ours.
            self._blind_until = time.monotonic() + STALLED_SECONDS
            self.told.failure("queue_heartbeat_failed", error)

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        """Fetch a job, or none if the database does not answer.

        Raised, the error would stop the worker until its running jobs are done.
        """
        try:
            with deadline.within(_FETCH_SECONDS):
                job = await super().fetch_job(queues, worker_id)
        except ConnectorException as error:
            self.told.failure("queue_fetch_failed", error)
            return None
        for name in ("queue_fetch_failed", "queue_heartbeat_failed", "queue_listen_failed"):
            self.told.well(name)
        if job:
            self._held.add(_key(job))
        return job

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        """End a job if it is still held."""
        await self._end(job, None, status, delete_job)

    async def retry_job(
        self,
        job: Job,
        retry_at: datetime.datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        lock: str | None = None,
    ) -> None:
        """Put a job back if it is still held; the library's other arguments have no use here."""
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
            self.told.failure("queue_end_failed", error, job=job.id)
        finally:
            self._held.discard(_key(job))

    async def listen_for_jobs(
        self, *, on_notification: NotificationCallback, queues: Iterable[str] | None = None
    ) -> None:
        """Listen, again and again; polling goes on meanwhile."""
        while True:
            try:
                await super().listen_for_jobs(on_notification=on_notification, queues=queues)
            except ConnectorException as error:
                self.told.failure("queue_listen_failed", error)
            end_if_cancelled()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def sweep(self) -> None:
        """Put jobs back that nobody runs: of dead workers, and those lost on the way to us."""
        if self._worker_id is not None:
            await self.update_heartbeat(self._worker_id)
        for job in await self._stalled() + await self._lost():
            logs.event(_log, "queue_job_recovered", level=logging.WARNING, job=job.id)
            await self.retry_job(job)

    async def _stalled(self) -> list[Job]:
        if time.monotonic() < self._blind_until:
            return []
        await self.prune_stalled_workers(STALLED_SECONDS)
        return list(
            await self.get_stalled_jobs(queue=QUEUE, seconds_since_heartbeat=STALLED_SECONDS)
        )

    async def _lost(self) -> list[Job]:
        """Jobs that are ours by their row, but that we don't run: the answer to a fetch or the
        end of a job was lost. Only those seen twice, since a fetch may be on its way."""
        if self._worker_id is None:
            return []
        ours = await self.list_jobs_async(queue=QUEUE, status="doing", worker_id=self._worker_id)
        idle = {_key(job): job for job in ours if _key(job) not in self._held}
        lost = [job for key, job in idle.items() if key in self._suspects]
        self._suspects = set(idle)
        return lost
