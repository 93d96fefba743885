"""SQL of attempts: claim, calls, results, end.

Each write of a worker names its attempt and fence and matches a RUNNING row, or it changes
nothing and raises `Fenced`: a worker that slept past its turn can't overwrite its successor.
A transaction that decides about a tenant's places locks the tenant's row first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from byokeep import ids
from byokeep.orchestrator.v1.review_pb2 import Finding

from services.common.errors import internal
from services.orchestrator import content, sql
from services.orchestrator.database import Database, Row, Session
from services.orchestrator.domain import PLANS
from services.orchestrator.queue import Queue


class Fenced(Exception):
    """The attempt is not ours any more: it was cancelled, or another took over."""


class DailyLimit(Exception):
    """The tenant's ceiling of provider calls in 24 hours is reached: the call may not be made."""


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed attempt, with all that it takes to run it.

    `turn` above 0: it was taken over in the middle of a call, after `calls_made` calls of its own.
    `input` is sealed as it comes from the table; `content_key` is there once it is opened.
    """

    attempt_id: str
    kind: str
    tenant: str
    review_id: str
    key_id: str
    key_version: int
    fence: int
    tries: int
    turn: int
    calls_made: int
    chunks_total: int
    provider: str
    model: str
    owner: str
    actor: str
    input: bytes
    done_chunks: Sequence[str]
    calls_left: int
    validations: int
    validation_hours: float
    destroy_previous: bool
    content_key: content.ContentKey | None = None


@dataclass(frozen=True, slots=True)
class Trail:
    """What the runner reports of the child that held the key."""

    lease_id: str = ""
    process_id: int = 0
    open_time: datetime | None = None
    close_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Successor:
    """The attempt that follows a failed one."""

    delay_seconds: float
    key_version: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, and what follows for its review."""

    attempt_state: str
    review_state: str
    failure: str = ""
    failure_message: str = ""
    ambiguous: bool = False
    successor: Successor | None = None


@dataclass(frozen=True, slots=True)
class ValidationEnding:
    """How a validation attempt ended; `action` is what keyvault is to be told."""

    attempt_state: str
    verdict: str
    action: str
    failure: str = ""
    models: Sequence[str] = ()
    successor: Successor | None = None


@dataclass(frozen=True, slots=True)
class Stale:
    """A RUNNING attempt whose worker gave no sign of life."""

    attempt_id: str
    kind: str
    tenant: str
    review_id: str
    key_id: str
    key_version: int
    fence: int
    tries: int
    turn: int
    provider: str
    model: str
    unfinished_call: bool
    calls_left: int


class AttemptStore:
    """Attempts and what they write."""

    def __init__(self, database: Database, queue: Queue) -> None:
        """Use a database, and the queue that lives in it."""
        self._database = database
        self._queue = queue

    async def claim(self, attempt_id: str) -> Work | None:
        """Make a queued attempt RUNNING and return it; None if it is not there to be run."""
        async with self._database.statement() as session:
            row = await session.one(sql.CLAIM, {"id": attempt_id})
        return None if row is None else Work(**row._asdict())

    async def take_over(self, attempt_id: str, seconds: float) -> Work | None:
        """Return an attempt whose worker fell silent in a provider call for so long, to go on
        with; None if there is none. The other worker's writes raise Fenced from now on."""
        async with self._database.statement() as session:
            row = await session.one(sql.TAKE_OVER, {"id": attempt_id, "seconds": seconds})
        return None if row is None else Work(**row._asdict())

    async def taken_over(self, work: Work) -> bool:
        """Say whether another worker goes on with an attempt that was this one's."""
        async with self._database.statement() as session:
            return await session.one(sql.TAKEN_OVER, _held(work)) is not None

    async def call_started(
        self, work: Work, trail: Trail, *, number: int, chunk_id: str, chunks_total: int
    ) -> None:
        """Store a provider call before it is made, with who makes it.

        Raises Fenced, DailyLimit.
        """
        row = await self._guarded(
            sql.CALL_STARTED,
            {
                **_held(work),
                "lease_id": trail.lease_id,
                "process_id": trail.process_id,
                "call_number": number,
                "chunk_id": chunk_id,
                "chunks_total": chunks_total,
            },
        )
        if not row.stored:
            raise DailyLimit

    async def chunk_done(
        self, work: Work, chunk_id: str, findings: Sequence[Finding], dropped: int
    ) -> None:
        """Store a chunk's findings; nothing if the chunk is done already. Raises Fenced."""
        await self._guarded(
            sql.CHUNK_DONE,
            {
                **_held(work),
                "chunk_id": chunk_id,
                "dropped": dropped,
                "finding_count": len(findings),
                "findings": _sealed(work, chunk_id, findings) if findings else None,
            },
        )

    async def end_review(self, work: Work | Stale, ending: Ending, trail: Trail) -> None:
        """Store the end of a review's attempt, and queue what follows. Raises Fenced."""
        if ending.successor is None:
            async with self._database.statement() as session:
                parked = await self._end_review(session, work, ending, trail)
        else:
            async with self._database.transaction() as session:
                parked = await self._end_review(session, work, ending, trail)
        if parked:
            await self.admit_one(work.tenant)

    async def end_validation(
        self, work: Work | Stale, ending: ValidationEnding, trail: Trail
    ) -> None:
        """Store the end of a validation attempt, and queue what follows. Raises Fenced."""
        async with self._database.transaction() as session:
            await self._end_validation(session, work, ending, trail)

    async def trail_of_cancelled(self, work: Work, trail: Trail) -> None:
        """Complete the trail of an attempt that was cancelled while its child lived."""
        parameters = {**_held(work), **_trail(trail)}
        async with self._database.statement() as session:
            await session.run(sql.TRAIL_OF_CANCELLED, parameters)

    async def heartbeat(self, attempt_ids: Sequence[str]) -> set[str]:
        """Say that attempts' workers live; return those that still are ours."""
        async with self._database.statement() as session:
            found = await session.all(sql.HEARTBEAT, {"ids": list(attempt_ids)})
        return {row.id for row in found}

    async def cancel_review(self, tenant: str, review_id: str) -> bool:
        """Cancel a review of the tenant with its attempts; False if it had ended."""
        async with self._database.transaction() as session:
            plan = await lock_tenant(session, tenant)
            await session.all(sql.CANCEL_ATTEMPTS, {"review_id": review_id})
            done = await session.one(sql.CANCEL_REVIEW, {"review_id": review_id})
            await self.admit(session, tenant, plan)
        return done is not None

    async def cancel_all(self, tenant: str) -> None:
        """Cancel all that is queued or runs for a tenant."""
        async with self._database.statement() as session:
            reviews = await session.all(sql.OPEN_REVIEWS, {"tenant": tenant})
            await session.all(sql.CANCEL_VALIDATIONS, {"tenant": tenant})
        for row in reviews:
            await self.cancel_review(tenant, row.id)

    async def admit(self, session: Session, tenant: str, plan: str) -> None:
        """Give a tenant's free places to what waited longest; the tenant's row is locked."""
        places = PLANS[plan].attempts_in_flight
        for row in await session.all(sql.ADMIT, {"tenant": tenant, "places": places}):
            await self._queue.enqueue(session.connection, row.id)

    async def stale(self, seconds: float, held: float) -> list[tuple[str, str]]:
        """Return (id, tenant) of attempts whose worker gave no sign of life for so long; for
        `held` seconds, where a call is open that may be taken over."""
        async with self._database.statement() as session:
            found = await session.all(sql.STALE_IDS, {"seconds": seconds, "held": held})
        return [(row.id, row.tenant) for row in found]

    async def fence_off(
        self,
        attempt_id: str,
        tenant: str,
        seconds: float,
        decide: Any,
    ) -> Stale | None:
        """End a stale attempt as `decide(Stale)` says; None if it is not stale any more."""
        async with self._database.transaction() as session:
            plan = await lock_tenant(session, tenant)
            row = await session.one(sql.STALE, {"id": attempt_id, "seconds": seconds})
            if row is None:
                return None
            stale = Stale(**row._asdict())
            ending = decide(stale)
            if isinstance(ending, ValidationEnding):
                await self._end_validation(session, stale, ending, Trail())
            else:
                await self._end_review(session, stale, ending, Trail())
                await self.admit(session, tenant, plan)
            return stale

    async def requeue_overdue(self, seconds: float) -> int:
        """Enqueue attempts again whose job seems lost; return how many."""
        return await self._requeue(sql.OVERDUE, seconds)

    async def requeue_orphans(self, seconds: float) -> int:
        """Enqueue attempts that some worker may `take_over`; return how many."""
        return await self._requeue(sql.ORPHANS, seconds)

    async def admit_parked(self) -> None:
        """Give free places of every tenant to what waits for one."""
        async with self._database.statement() as session:
            tenants = [row.tenant for row in await session.all(sql.PARKED_TENANTS)]
        for tenant in tenants:
            await self.admit_one(tenant)

    async def admit_one(self, tenant: str) -> None:
        """Give free places of one tenant to what waits for one."""
        async with self._database.transaction() as session:
            await self.admit(session, tenant, await lock_tenant(session, tenant))

    async def _requeue(self, statement: LiteralString, seconds: float) -> int:
        async with self._database.transaction() as session:
            found = await session.all(statement, {"seconds": seconds})
            for row in found:
                await self._queue.enqueue(session.connection, row.id)
        return len(found)

    async def _end_review(
        self,
        session: Session,
        work: Work | Stale,
        ending: Ending,
        trail: Trail,
    ) -> bool:
        """Return whether the tenant has attempts that wait for a place."""
        following = _following(ending.successor)
        row = await _one(
            session,
            sql.END_REVIEW,
            {
                **_held(work),
                "tenant": work.tenant,
                "attempt_state": ending.attempt_state,
                "failure": ending.failure,
                "ambiguous": ending.ambiguous,
                "review_state": ending.review_state,
                "review_failure": ending.failure if ending.review_state == "FAILED" else "",
                "failure_message": ending.failure_message,
                **following,
                **_trail(trail),
            },
        )
        await self._follow(session, ending.successor, following)
        return bool(row.parked)

    async def _end_validation(
        self,
        session: Session,
        work: Work | Stale,
        ending: ValidationEnding,
        trail: Trail,
    ) -> None:
        following = _following(ending.successor)
        await _one(
            session,
            sql.END_VALIDATION,
            {
                **_held(work),
                "attempt_state": ending.attempt_state,
                "failure": ending.failure,
                "ambiguous": False,
                "verdict": ending.verdict,
                "models": list(ending.models),
                "action": ending.action,
                **following,
                **_trail(trail),
            },
        )
        await self._follow(session, ending.successor, following)

    async def _follow(
        self,
        session: Session,
        successor: Successor | None,
        following: Mapping[str, Any],
    ) -> None:
        if successor is not None:
            await self._queue.enqueue(
                session.connection, following["next_id"], delay_seconds=successor.delay_seconds
            )

    async def _guarded(self, statement: LiteralString, parameters: Mapping[str, Any]) -> Row:
        async with self._database.statement() as session:
            return await _one(session, statement, parameters)


async def lock_tenant(session: Session, tenant: str) -> str:
    """Lock a tenant's places in this transaction; return its plan."""
    row = await session.one(sql.LOCK_TENANT, {"tenant": tenant})
    return str(row.plan)


async def _one(session: Session, statement: LiteralString, parameters: Mapping[str, Any]) -> Any:
    row = await session.one(statement, parameters)
    if row is None:
        raise Fenced
    return row


def _sealed(work: Work, chunk_id: str, findings: Sequence[Finding]) -> bytes:
    if work.content_key is None:
        raise internal()
    return content.seal_findings(work.content_key, work.review_id, chunk_id, findings)


def _held(work: Work | Stale) -> dict[str, Any]:
    return {"id": work.attempt_id, "fence": work.fence, "turn": work.turn}


def _trail(trail: Trail) -> dict[str, Any]:
    return {
        "lease_id": trail.lease_id,
        "process_id": trail.process_id,
        "open_time": trail.open_time,
        "close_time": trail.close_time,
    }


def _following(successor: Successor | None) -> dict[str, Any]:
    return {
        "successors": 0 if successor is None else 1,
        "next_id": ids.new_id("att"),
        "next_version": 0 if successor is None else successor.key_version,
        "delay": 0.0 if successor is None else successor.delay_seconds,
    }
