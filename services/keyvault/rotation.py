"""Rotation, rewrap, migration and shred sweeps, as far as the admin role goes.

A job goes QUEUED → START → REWRAP (the data role's part, see rewrap) → SETTLE → TRIM → DONE.
It ends PARTIAL where rows are left that don't open: then nothing is trimmed; and CANCELLED
where the backend that it aims at is not the primary one any more. Every step may be repeated,
so a process may be killed at any point; a step that leaves the database is claimed for a while
first, and no transaction is open meanwhile.
"""

from __future__ import annotations

import asyncio
import datetime
import logging

import grpc
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain, kek
from services.keyvault.database import Connection, Database
from services.keyvault.domain import State
from services.keyvault.following import MISMATCH
from services.keyvault.reconcile import Reconcile
from services.keyvault.store import jobs as store
from services.keyvault.store import keys as key_store
from services.keyvault.store.jobs import Job, Order
from services.keyvault.wraps import STRIDE, Wraps

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
_OURS: tuple[store.Phase, ...] = ("QUEUED", "START", "SETTLE", "TRIM")
SWEEP = Order(rotate=True, rewrap=True, trim=True)
#: A lease that read a row just before it was wrapped again has this long to open it with the
#: old version: longer than any backend's deadline.
TRIM_DELAY = datetime.timedelta(seconds=10)
_NOW = datetime.timedelta()
#: A sweep that its tenant's chain does not tell the end of after so long is queued again, once a
#: day: its row was deleted, or it ended PARTIAL.
UNSWEPT = datetime.timedelta(days=1)


async def queue_sweep(connection: Connection, tenant: str, wait: datetime.timedelta) -> None:
    """Queue a tenant's shred sweep with the destruction that it follows; keys that are
    destroyed while it waits share it."""
    await _sweep(connection, tenant, new_id("job"), wait)


async def _sweep(
    connection: Connection, tenant: str, request_id: str, wait: datetime.timedelta
) -> None:
    await store.insert(connection, new_id("job"), tenant, request_id, "keyvault", SWEEP, wait)
    # The one that waits already may have been put off by somebody.
    await store.hasten(connection, tenant, wait)


class Rotation:
    """Starts, settles and trims jobs (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        reconcile: Reconcile,
        wraps: Wraps,
        deployment: str,
    ) -> None:
        """Administer the KEKs of a database's tenants."""
        self._database = database
        self._backends = backends
        self._reconcile = reconcile
        self._wraps = wraps
        self._deployment = deployment

    async def order(self, tenant: str, request_id: str, caller: str, order: Order) -> Job:
        """Queue a job, or find the one of the same request, and start it at once.

        Raises:
            ByokeepError: TENANT_KEY_MISSING; REQUEST_ID_CONFLICT.
        """
        async with self._database.transaction() as connection:
            await chain.lock(connection, chain.tenant_chain(tenant))
            await store.insert(connection, new_id("job"), tenant, request_id, caller, order, _NOW)
        job = await store.of_request(self._database, tenant, request_id)
        if job is None or (job.rotate, job.rewrap, job.trim) != (
            order.rotate,
            order.rewrap,
            order.trim,
        ):
            raise _conflict()
        claimed = await store.claim_one(self._database, job.job_id)
        if claimed is not None:
            await self._start(claimed)
        return await self.get(job.job_id)

    async def get(self, job_id: str) -> Job:
        """Return a job. Raises ByokeepError: TENANT_KEY_MISSING where it could not start."""
        job = await store.get(self._database, job_id)
        if job is None:
            raise _conflict()
        if job.reason == "TENANT_KEY_MISSING":
            raise chain.tenant_key_missing(job.tenant)
        return job

    async def tick(self) -> None:
        """Do every step that is due, one job at a time."""
        while (job := await store.claim(self._database, _OURS)) is not None:
            await each("kek_job", [job], self._step)

    async def resweep(self) -> None:
        """Queue the sweeps that the chains say are owed, whatever the rows of jobs say."""
        now = datetime.datetime.now(datetime.UTC)

        async def queue(tenant: str) -> None:
            async with self._database.transaction() as connection:
                await _sweep(connection, tenant, f"sweep/{now:%Y-%m-%d}", _NOW)

        await each("resweep", self._reconcile.unswept(now - UNSWEPT), queue)

    async def forget(self) -> None:
        """Delete jobs that ended a month ago."""
        await store.forget_ended(self._database)

    async def _step(self, job: Job) -> None:
        if job.target_backend not in ("", self._backends.primary.name):
            async with self._database.transaction() as connection:
                await store.move(connection, job, "CANCELLED")
            return
        steps = {"START": self._start, "SETTLE": self._settle, "TRIM": self._trim}
        await steps[job.phase](job)

    async def _start(self, job: Job) -> None:
        backend = self._backends.primary
        name = kek.tenant_kek(job.tenant)
        if await store.elsewhere(self._database, job.tenant, backend.name):
            await store.postpone(self._database, job)
            return
        try:
            created, target = await self._target(job, name)
        except kek.KekMissingError:
            await self._fail(job, "TENANT_KEY_MISSING")
            return
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(job.tenant))
            if await store.lock(connection, job.job_id, "START") is None:
                return
            if not self._reconcile.rolled_back:
                await self._bury(connection, job.tenant)
            if created or job.rotate:
                kind = (
                    audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED
                    if created
                    else audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_ROTATED
                )
                event = _event(job, kind, backend.name, target)
                await chain.append(connection, head, self._deployment, [event])
            await store.lower_minimum(connection, job.tenant, backend.name, target)
            await store.started(
                connection, job, "REWRAP" if job.rewrap else "DONE", backend.name, target
            )

    async def _target(self, job: Job, name: str) -> tuple[bool, int]:
        """Return whether the KEK was made now, and the version to aim at."""
        backend = self._backends.primary
        try:
            if job.rotate:
                return False, await backend.rotate(name)
            return False, await backend.newest(name)
        except kek.KekMissingError:
            pass
        # Made anew only where it is to move here: a KEK that is lost is not replaced silently.
        await self._elsewhere(name)
        return await backend.create(name), await backend.newest(name)

    async def _elsewhere(self, name: str) -> None:
        for backend in self._backends:
            if backend is self._backends.primary:
                continue
            try:
                await backend.newest(name)
            except kek.KekMissingError:
                continue
            return
        raise kek.KekMissingError(name)

    async def _settle(self, job: Job) -> None:
        await self._reconcile.follow(chain.tenant_chain(job.tenant))
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(job.tenant))
            locked = await store.lock(connection, job.job_id, "SETTLE")
            if locked is None:
                return
            if locked.passes < store.PASSES and await store.left(connection, locked, to_do=True):
                # Stored under an older version while the last pass ended.
                await store.next_pass(connection, locked)
                return
            await store.opened(connection, locked)
            event = _event(
                locked,
                audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED,
                locked.target_backend,
                locked.target_version,
            )
            event.count = locked.done
            await chain.append(connection, head, self._deployment, [event])
            # Under the chain's lock: who stores a version looks at the minimum under it too.
            # For what its chain does not tell of no KEK version is kept.
            left = await store.left_rows(connection, locked)
            if any(self._known(job.tenant, *one) for one in left):
                await store.move(connection, locked, "PARTIAL", "")
            elif not locked.trim:
                await store.move(connection, locked, "DONE")
            else:
                await self._raise_minimum(connection, locked)
                await store.move(connection, locked, "TRIM", wait=TRIM_DELAY)

    async def _raise_minimum(self, connection: Connection, job: Job) -> None:
        for backend in self._backends:
            version = job.target_version if backend.name == job.target_backend else store.WHOLE
            await store.raise_minimum(connection, job.tenant, backend.name, version)

    async def _trim(self, job: Job) -> None:
        name = kek.tenant_kek(job.tenant)
        # What this database is, now: one that was put back has rows that don't count.
        await self._reconcile.once()
        target = self._backends.named(job.target_backend)
        try:
            newest = await target.newest(name)
            if self._reconcile.rolled_back or not await self._proven(job, newest):
                return
            await target.trim(name, job.target_version)
        except kek.KekMissingError:
            await self._fail(job, "TENANT_KEY_MISSING")
            return
        for backend in self._backends:
            if backend is not target and await self._proven(job, newest):
                await backend.destroy(name)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(job.tenant))
            if await store.lock(connection, job.job_id, "TRIM") is None:
                return
            event = _event(
                job,
                audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMED,
                job.target_backend,
                job.target_version,
            )
            event.shred = self._backends.shred_of(job.target_backend)
            await chain.append(connection, head, self._deployment, [event])
            await store.move(connection, job, "DONE")

    async def _proven(self, job: Job, newest: int) -> bool:
        """Have it proven that no row needs what is to be destroyed (see wraps): whoever writes the
        database could say so. A row that proves nothing is wrapped again; where one is missing,
        the job ends PARTIAL."""

        async def look(connection: Connection, _: chain.Head, versions: int) -> bool:
            locked = await store.lock(connection, job.job_id, "TRIM")
            if locked is None:
                return False
            # Of the job as it is acted on: the row may say something else by now.
            await self._bury(connection, job.tenant)
            proof = await self._wraps.proof(connection, job, newest, self._known)
            if proof.versions == versions and not proof.unproven:
                return True
            again = await store.doubt(connection, job.tenant, proof.unproven)
            whole = proof.versions == versions and again == len(proof.unproven)
            if whole and locked.passes < store.PASSES:
                await store.next_pass(connection, locked)
            else:
                await self._partial(connection, locked, MISMATCH)
            return False

        reason = ""
        try:
            return await self._reconcile.at_head(chain.tenant_chain(job.tenant), look)
        except ByokeepError as error:
            if error.reason not in (MISMATCH, "STATE_TAMPERED"):
                raise
            reason = error.reason
        async with self._database.transaction() as connection:
            await self._partial(connection, job, reason)
        return False

    def _known(self, tenant: str, key_id: str, version: int) -> bool:
        return self._reconcile.told(tenant, key_id, version).known

    async def _bury(self, connection: Connection, tenant: str) -> None:
        """Delete the ciphertext of versions that the tenant's chain calls destroyed: somebody put
        it back, and it must not be wrapped anew."""
        rows = await store.wraps(connection, tenant)
        for looked, (key_id, version, _, _, wrapped, *_) in enumerate(rows):
            if looked % STRIDE == 0:
                await asyncio.sleep(0)  # others have a turn
            told = self._reconcile.told(tenant, key_id, version)
            dead = told.known and told.over(told.sequence) is State.DESTROYED
            if wrapped is not None and dead:
                logs.event(log, "ciphertext_put_back", level=logging.CRITICAL, key=key_id)
                await key_store.erase(connection, tenant, key_id, version)

    async def _partial(self, connection: Connection, job: Job, reason: str) -> None:
        logs.event(log, "trim_refused", level=logging.CRITICAL, tenant=job.tenant, reason=reason)
        await store.move(connection, job, "PARTIAL", reason)

    async def _fail(self, job: Job, reason: str) -> None:
        async with self._database.transaction() as connection:
            await store.move(connection, job, "FAILED", reason)


def _event(
    job: Job, kind: audit_pb2.AuditEventType.ValueType, backend: str, version: int
) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(type=kind, caller=job.caller, detail=f"{backend} v{version}")


def _conflict() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_CONFLICT",
        "this request id came before with other content; use a new one",
        field="request_id",
    )
