"""SQL of attempts: claim, calls, results, end.

Each write of a worker names its attempt and fence and matches a RUNNING row, or it changes
nothing and raises `Fenced`: a worker that slept past its turn can't overwrite its successor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from byokeep import ids
from byokeep.orchestrator.v1.review_pb2 import Finding

from services.common.errors import internal
from services.orchestrator.custody import content
from services.orchestrator.policy.failures import Decision, Follows, Holds
from services.orchestrator.policy.plans import Plans
from services.orchestrator.store import sql, sql_waits, waits
from services.orchestrator.store.database import Database, Row, Session

# Tenants that a pick looks at beside those that it has places for: some are held back, or have as
# many places as they may.
_LOOK: Final = 64


class Fenced(Exception):
    """The attempt is not ours any more: it was cancelled, or another took over."""


class DailyLimit(Exception):
    """The tenant's ceiling of provider calls in 24 hours is reached: the call may not be made."""


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed attempt, with all that it takes to run it.

    `turn` above 0: it was taken over in the middle of a call, after `calls_made` calls of its own.
    `reviews_wait`: of a look at a key, whether reviews wait for what it says.
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
    runner_id: str
    wait_reason: str
    waited_seconds: float
    calls_made: int
    chunks_total: int
    provider: str
    model: str
    plan_model: str
    fallback_models: Sequence[str]
    owner: str
    actor: str
    input: bytes
    done_chunks: Sequence[str]
    calls_left: int
    validations: int
    validation_hours: float
    destroy_previous: bool
    reviews_wait: bool
    trace_parent: str
    retry_ambiguous: bool
    content_key: content.ContentKey | None = None


@dataclass(frozen=True, slots=True)
class Trail:
    """What the runner reports of the child that held the key."""

    runner_id: str = ""
    lease_id: str = ""
    process_id: int = 0
    prompt_version: str = ""
    open_time: datetime | None = None
    close_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Successor:
    """The start that follows a failed one; `decision` None: a validation's, which is no wait.
    `model` is the one that it runs on from now on, where that changes."""

    delay_seconds: float
    key_version: int
    decision: Decision | None = None
    cause: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, and what follows for its review."""

    attempt_state: str
    review_state: str
    failure: str = ""
    failure_message: str = ""
    ambiguous: bool = False
    cause: str = ""
    successor: Successor | None = None


@dataclass(frozen=True, slots=True)
class ValidationEnding:
    """How a validation attempt ended.

    `verdict` is empty where an ACTIVE version could not be asked again. `action` is what keyvault
    is to be told; `pauses` and `resumes` are reasons for which the key's reviews wait from now on,
    or no longer.
    """

    attempt_state: str
    verdict: str
    action: str
    failure: str = ""
    cause: str = ""
    models: Sequence[str] = ()
    successor: Successor | None = None
    pauses: str = ""
    resumes: str = ""


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
    runner_id: str
    provider: str
    model: str
    owner: str
    unfinished_call: bool
    calls_left: int
    retry_ambiguous: bool
    reviews_wait: bool


class AttemptStore:
    """Attempts and what they write."""

    def __init__(self, database: Database, plans: Plans) -> None:
        """Use a database, and the places that plans have."""
        self._database = database
        places, otherwise = plans.places()
        self._places = {
            "plans": list(places),
            "places": list(places.values()),
            "otherwise": otherwise,
        }

    async def pick(self, room: int) -> list[Work]:
        """Make up to `room` attempts RUNNING whose turn it is, and return them."""
        picked: list[str] = []
        more = True
        while more and len(picked) < room:
            left = room - len(picked)
            parameters = {"room": left, "look": left + _LOOK, **self._places}
            rows = await self._database.batch(
                (sql_waits.PICK_LOCK, {}), (sql_waits.PICK, parameters)
            )
            more = any(row.id is None for row in rows)
            picked += [row.id for row in rows if row.id is not None]
        return await self._load(picked)

    async def take_over(self, seconds: float, limit: int) -> list[Work]:
        """Return attempts whose workers fell silent in a provider call for so long, to go on
        with. Those workers' writes raise Fenced from now on."""
        async with self._database.statement() as session:
            taken = await session.all(sql.TAKE_OVER, {"seconds": seconds, "limit": limit})
        return await self._load([row.id for row in taken])

    async def _load(self, attempt_ids: Sequence[str]) -> list[Work]:
        if not attempt_ids:
            return []
        async with self._database.statement() as session:
            found = await session.all(sql.LOAD, {"ids": attempt_ids})
        return [Work(**row._asdict()) for row in found]

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
                "runner_id": trail.runner_id,
                "lease_id": trail.lease_id,
                "process_id": trail.process_id,
                "prompt_version": trail.prompt_version,
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

    async def chunk_split(self, work: Work, chunks_total: int) -> None:
        """Store that a chunk became several, and that its call is answered. Raises Fenced."""
        await self._guarded(sql.CHUNK_SPLIT, {**_held(work), "chunks_total": chunks_total})

    async def end_review(self, work: Work, ending: Ending, trail: Trail) -> None:
        """Store the end of a review's attempt, and queue what follows. Raises Fenced."""
        if ending.successor is None:
            async with self._database.statement() as session:
                await self._end_review(session, work, ending, trail)
        else:
            async with self._database.transaction() as session:
                await self._end_review(session, work, ending, trail)
                await waits.hold(session, work, ending.successor.decision)

    async def put_back(self, work: Work, successor: Successor) -> None:
        """Have an attempt that used no key wait, and start again as it is. Raises Fenced."""
        async with self._database.transaction() as session:
            await _one(session, sql_waits.PUT_BACK, {**_held(work), **_following(successor)})
            await waits.hold(session, work, successor.decision)

    async def end_validation(self, work: Work, ending: ValidationEnding, trail: Trail) -> None:
        """Store the end of a validation attempt, and queue what follows. Raises Fenced."""
        async with self._database.transaction() as session:
            await self._end_validation(session, work, ending, trail)

    async def trail_of_cancelled(self, work: Work, trail: Trail) -> None:
        """Complete the trail of an attempt that was cancelled while its child lived."""
        parameters = {**_held(work), **_trail(trail)}
        async with self._database.statement() as session:
            await session.run(sql.TRAIL_OF_CANCELLED, parameters)

    async def heartbeat(self, answer_bytes: Mapping[str, int]) -> set[str]:
        """Say that attempts' workers live, and how many bytes of an open call's answer each has;
        return those that still are ours."""
        parameters = {"ids": list(answer_bytes), "answer_bytes": list(answer_bytes.values())}
        async with self._database.statement() as session:
            found = await session.all(sql.HEARTBEAT, parameters)
        return {row.id for row in found}

    async def cancel_review(self, review_id: str) -> bool:
        """Cancel a review with its attempts; False if it had ended."""
        async with self._database.transaction() as session:
            return await cancel(session, review_id)

    async def cancel_all(self, tenant: str) -> None:
        """Cancel all that runs, then all that waits, for a tenant that is DELETED."""
        async with self._database.statement() as session:
            while (await session.one(sql.CANCEL_SOME, {"tenant": tenant})).attempts:
                pass

    async def stale(self, seconds: float, held: float) -> list[str]:
        """Return attempts whose worker gave no sign of life for so long; for
        `held` seconds, where a call is open that may be taken over."""
        async with self._database.statement() as session:
            found = await session.all(sql.STALE_IDS, {"seconds": seconds, "held": held})
        return [row.id for row in found]

    async def fence_off(
        self,
        attempt_id: str,
        seconds: float,
        decide: Callable[[Stale], Ending | ValidationEnding],
    ) -> Stale | None:
        """End a stale attempt as `decide` says; None if it is not stale any more."""
        async with self._database.transaction() as session:
            row = await session.one(sql.STALE, {"id": attempt_id, "seconds": seconds})
            if row is None:
                return None
            stale = Stale(**row._asdict())
            ending = decide(stale)
            if isinstance(ending, ValidationEnding):
                await self._end_validation(session, stale, ending, Trail())
            else:
                await self._end_review(session, stale, ending, Trail())
            return stale

    async def _end_review(
        self, session: Session, work: Work | Stale, ending: Ending, trail: Trail
    ) -> None:
        failed = ending.review_state == "FAILED"
        parameters = {
            **_held(work),
            "attempt_state": ending.attempt_state,
            "failure": ending.failure,
            "ambiguous": ending.ambiguous,
            "review_state": ending.review_state,
            "cause": ending.cause,
            "review_failure": ending.failure if failed else "",
            "failure_message": ending.failure_message,
            **_following(ending.successor),
            **_trail(trail),
        }
        await _one(session, sql.END_REVIEW, parameters)

    async def _end_validation(
        self, session: Session, work: Work | Stale, ending: ValidationEnding, trail: Trail
    ) -> None:
        parameters = {
            **_held(work),
            "attempt_state": ending.attempt_state,
            "failure": ending.failure,
            "ambiguous": False,
            "verdict": ending.verdict,
            "cause": ending.cause,
            "models": list(ending.models),
            "action": ending.action,
            **_following(ending.successor),
            **_trail(trail),
        }
        await _one(session, sql.END_VALIDATION, parameters)
        if ending.pauses:
            await waits.pause(session, work.tenant, work.key_id, ending.pauses)
        if ending.resumes:
            await waits.resume(session, work.tenant, work.key_id, [ending.resumes])

    async def _guarded(self, statement: LiteralString, parameters: Mapping[str, Any]) -> Row:
        async with self._database.statement() as session:
            return await _one(session, statement, parameters)


async def cancel(session: Session, review_id: str, superseded_by: str = "") -> bool:
    """Cancel a review with its attempts; False if it had ended."""
    # The first waits for an end that is being stored, the second sees what follows it.
    for _ in range(2):
        await session.all(sql.CANCEL_ATTEMPTS, {"review_id": review_id})
    parameters = {"review_id": review_id, "superseded_by": superseded_by}
    return await session.one(sql.CANCEL_REVIEW, parameters) is not None


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
        "runner_id": trail.runner_id,
        "lease_id": trail.lease_id,
        "process_id": trail.process_id,
        "open_time": trail.open_time,
        "close_time": trail.close_time,
    }


def _following(successor: Successor | None) -> dict[str, Any]:
    decision = None if successor is None else successor.decision
    holds = decision is not None and decision.holds is not Holds.ATTEMPT
    return {
        "successors": 0 if successor is None else 1,
        "next_id": ids.new_id("att"),
        "next_version": 0 if successor is None else successor.key_version,
        # Who waits with others is due as before: what holds them all says for how long.
        "delay": 0.0 if successor is None or holds else successor.delay_seconds,
        "counted": int(decision is not None and decision.follows is Follows.RETRY),
        "refund": 0 if decision is None else decision.refund,
        "wait_reason": "" if decision is None else decision.reason,
        "wait_cause": "" if successor is None else successor.cause,
        "next_model": "" if successor is None else successor.model,
    }
