"""Rewrap, in the data role: jobs are worked off in batches, each one transaction.

A batch wraps data keys again under the newest version of the tenant's KEK; a row that
another backend holds, or of which keyvault did not write the data key, moves instead: it
gets a fresh data key from the primary one and a new envelope (docs/decisions/0006). All
state is in the rows: whoever is killed leaves a job that goes on where the last batch was
committed. Leases go on meanwhile; a row that changed since it was read is not written.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Sequence

from services.common import logs
from services.common.secret import Secret
from services.keyvault import kek
from services.keyvault.database import Connection, Database, Row
from services.keyvault.envelope import (
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    decrypt,
    encrypt,
)
from services.keyvault.store import jobs as store
from services.keyvault.store.jobs import Failure, Job, Swap
from services.keyvault.wraps import Wraps

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5
_BATCH = 500
# A row that moves costs calls of its own: fewer in a transaction, some of them at once.
_MOVES = 64
_AT_ONCE = 8


class Rewrap:
    """Works off jobs (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        wraps: Wraps,
        deployment: str,
        rows_per_second: int,
    ) -> None:
        """Rewrap a database's rows, at most so many a second."""
        self._database = database
        self._backends = backends
        self._wraps = wraps
        self._deployment = deployment
        self._rows_per_second = max(1, rows_per_second)
        # Small enough that the pace is held within every quarter of a second.
        self._limit = min(_BATCH, max(1, self._rows_per_second // 4))

    async def tick(self) -> None:
        """Work off what is due. Raises KekUnavailableError: the job stays as it is."""
        started = time.monotonic()
        while (rows := await self._batch()) is not None:
            pace = rows / self._rows_per_second - (time.monotonic() - started)
            await asyncio.sleep(max(0.0, pace))
            started = time.monotonic()

    async def _batch(self) -> int | None:
        """Do one batch; return its rows, or None where no job is due."""
        job: Job | None = None
        failed: Exception | None = None
        rows: list[Row] = []
        failures: list[Failure] = []
        try:
            async with self._database.transaction() as connection:
                job = await store.next_rewrap(connection)
                if job is not None:
                    rows, failures = await self._work(connection, job)
        except Exception as error:
            failed = error
        if failed is not None:
            # The next tenant's job must not wait for this one's backend.
            if job is not None:
                await store.postpone(self._database, job)
            raise failed
        if job is None:
            return None
        _report(job, failures)
        return len(rows)

    async def _work(self, connection: Connection, job: Job) -> tuple[list[Row], list[Failure]]:
        if job.target_backend != self._backends.primary.name:
            await store.move(connection, job, "CANCELLED")
            return [], []
        total = await store.left(connection, job, to_do=False) if job.total is None else 0
        rows = await store.batch(connection, job, self._limit)
        if not rows:
            await self._end_pass(connection, job)
            return [], []
        moving = {row[:2] for row in rows if not self._stays(job, row)}
        if moving:
            rows = rows[:_MOVES]
        swaps, failures = await self._wrap(connection, job, rows, moving)
        done = await self._write(connection, job, swaps, failures)
        await store.progress(connection, job, total, done, len(failures), rows[-1])
        return rows, failures

    async def _end_pass(self, connection: Connection, job: Job) -> None:
        if job.passes < store.PASSES and await store.left(connection, job, to_do=True):
            await store.next_pass(connection, job)
        else:
            await store.move(connection, job, "SETTLE")

    async def _write(
        self, connection: Connection, job: Job, swaps: list[Swap], failures: list[Failure]
    ) -> int:
        done = await store.swap(connection, job, swaps) if swaps else 0
        if failures:
            await store.unopened(connection, job.tenant, failures, job.job_id)
        return done

    async def _wrap(
        self, connection: Connection, job: Job, rows: Sequence[Row], moving: Collection[Row]
    ) -> tuple[list[Swap], list[Failure]]:
        here = [row for row in rows if row[:2] not in moving]
        away = [row for row in rows if row[:2] in moving]
        results = await self._rewrapped(job, here) + await self._moved(connection, job, away)
        swaps = [one for one in results if isinstance(one, Swap)]
        return swaps, [one for one in results if isinstance(one, Failure)]

    async def _rewrapped(self, job: Job, rows: Sequence[Row]) -> list[Swap | Failure]:
        if not rows:
            return []
        backend = self._backends.named(job.target_backend)
        try:
            results = await backend.rewrap(kek.tenant_kek(job.tenant), [row[3] for row in rows])
        except kek.KekMissingError:
            return [Failure(row[0], row[1], "UNDECRYPTABLE") for row in rows]
        return [
            self._swap(job, row, result.wrapped, result.kek_version, None)
            if isinstance(result, kek.Rewrapped)
            else Failure(row[0], row[1], result.reason)
            for row, result in zip(rows, results, strict=True)
        ]

    def _stays(self, job: Job, row: Row) -> bool:
        """Say whether a row keeps its data key. One that keyvault did not write may be another
        version's: signed anew, it would prove that this version's own is not needed any more. What
        moves is opened first."""
        key_id, version, backend, wrapped, kek_version, mac, envelope_sha256 = row
        return bool(backend == job.target_backend) and self._wraps.sound(
            job.tenant, (key_id, version), backend, kek_version, wrapped, mac, envelope_sha256
        )

    def _swap(
        self, job: Job, row: Row, wrapped: bytes, kek_version: int, envelope: bytes | None
    ) -> Swap:
        key_id, version, _, old = row[:4]
        digest = row[6] if envelope is None else hashlib.sha256(envelope).digest()
        mac = self._wraps.mac(
            job.tenant, (key_id, version), job.target_backend, kek_version, wrapped, digest
        )
        return Swap(key_id, version, old, wrapped, kek_version, mac, envelope)

    async def _moved(
        self, connection: Connection, job: Job, rows: Sequence[Row]
    ) -> list[Swap | Failure]:
        if not rows:
            return []
        found = {
            (row[0], row[1]): row[2:]
            for row in await store.envelopes(
                connection, job.tenant, [row[0] for row in rows], [row[1] for row in rows]
            )
        }
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def move(row: Row) -> Swap | Failure:
            async with at_once:
                return await self._move(job, row, *found[row[0], row[1]])

        # What is not found was destroyed since the batch was read.
        return await asyncio.gather(*(move(row) for row in rows if (row[0], row[1]) in found))

    async def _move(
        self, job: Job, row: Row, owner: str, provider: str, envelope: bytes
    ) -> Swap | Failure:
        key_id, version, source, wrapped = row[:4]
        name = kek.tenant_kek(job.tenant)
        context = Context(self._deployment, job.tenant, owner, provider, key_id, version)
        reason = "UNDECRYPTABLE"
        try:
            with kek.opened_for(job.job_id):
                opened = await self._backends.named(source).unwrap(name, wrapped)
            with opened as old:
                plaintext = Secret(decrypt(old.reveal(), envelope, context))
            with plaintext:
                fresh = await self._backends.named(job.target_backend).generate_data_key(name)
                with fresh.plaintext as new:
                    moved = encrypt(new.reveal(), plaintext.reveal(), context)
            return self._swap(job, row, fresh.wrapped, fresh.kek_version, moved)
        except (kek.KekMissingError, UnknownEnvelopeError):
            pass
        except (kek.UnwrapError, EnvelopeError):
            reason = "ROW_TAMPERED"
        return Failure(key_id, version, reason)


def _report(job: Job, failures: Sequence[Failure]) -> None:
    for failure in failures:
        logs.event(
            log,
            "rewrap_failed",
            level=logging.ERROR,
            tenant=job.tenant,
            key=failure.key_id,
            version=failure.version,
            reason=failure.reason,
        )
