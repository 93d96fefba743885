"""SQL of how attempts end, and what follows for their reviews and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from byokeep import ids

from services.orchestrator.policy.failures import (
    RETRIES_AT_ONCE,
    RETRY_SECONDS,
    Decision,
    Follows,
    Holds,
)
from services.orchestrator.policy.states import (
    Action,
    AttemptKind,
    AttemptState,
    Reason,
    ReviewState,
    Verdict,
)
from services.orchestrator.store import waits
from services.orchestrator.store.attempts import (
    AnyAttempt,
    KeyAttempt,
    ReviewAttempt,
    Trail,
    guarded,
    held,
    trailed,
)
from services.orchestrator.store.database import Database, Session
from services.orchestrator.store.picks import IN_CALL, load_keys, load_reviews


@dataclass(frozen=True, slots=True)
class Again:
    """A review's start that follows a failed one. `model` is the one that it runs on from now on,
    where that changes."""

    decision: Decision
    key_version: int
    cause: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class ReviewEnding:
    """How an attempt of a review ended, and what follows for the review."""

    attempt_state: AttemptState
    review_state: ReviewState
    failure: Reason | None = None
    failure_message: str = ""
    ambiguous: bool = False
    cause: str = ""
    again: Again | None = None


@dataclass(frozen=True, slots=True)
class KeyEnding:
    """How a look at a key ended.

    `verdict` is None where an ACTIVE version could not be asked again. `action` is what keyvault
    is to be told; `pauses` and `resumes` are reasons for which the key's reviews wait from now on,
    or no longer. `again_seconds`: when the provider is asked again; None: not at all.
    """

    attempt_state: AttemptState
    verdict: Verdict | None
    action: Action = Action.NONE
    failure: Reason | None = None
    cause: str = ""
    models: Sequence[str] = ()
    again_seconds: float | None = None
    pauses: Reason | None = None
    resumes: Reason | None = None


_END_ATTEMPT: Final = """
    WITH a AS (
        UPDATE attempt SET state = %(attempt_state)s, failure = %(failure)s, cause = %(cause)s,
            end_time = now(),
            runner_id = coalesce(nullif(%(runner_id)s, ''), runner_id),
            lease_id = coalesce(nullif(%(lease_id)s, ''), lease_id),
            process_id = greatest(%(process_id)s, process_id),
            open_time = coalesce(CAST(%(open_time)s AS timestamptz), open_time),
            close_time = coalesce(CAST(%(close_time)s AS timestamptz), close_time)
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        RETURNING *),
    c AS (
        UPDATE provider_call SET finish_time = now(), ambiguous = %(ambiguous)s
        WHERE attempt_id = %(id)s AND finish_time IS NULL AND EXISTS (SELECT FROM a)
        RETURNING ambiguous),"""

_END_REVIEW: Final = (
    _END_ATTEMPT  # noqa: S608 - constants
    + """
    r AS (
        UPDATE review SET state = %(review_state)s, failure = %(review_failure)s,
            failure_message = %(failure_message)s, version = version + 1,
            end_time = CASE WHEN %(review_state)s = 'QUEUED' THEN NULL ELSE now() END,
            ambiguous_calls = ambiguous_calls + (SELECT count(*) FROM c WHERE ambiguous),
            fence = review.fence + %(successors)s, attempts = attempts + %(successors)s,
            max_calls = max_calls + %(refund)s,
            model = coalesce(nullif(%(next_model)s, ''), model),
            fallback_models = CASE WHEN %(next_model)s = '' THEN fallback_models
                ELSE array_remove(fallback_models, %(next_model)s) END,
            chosen_model = CASE WHEN %(next_model)s = '' OR chosen_model <> '' THEN chosen_model
                ELSE model END,
            model_fallback = CASE WHEN %(next_model)s = '' THEN model_fallback
                ELSE 'NOT_FOUND' END,
            plan_model = CASE WHEN %(next_model)s <> '' AND plan_model = '' AND EXISTS (
                    SELECT FROM chunk_done WHERE review_id = review.id)
                THEN model ELSE plan_model END
        FROM a WHERE review.id = a.review_id
        RETURNING review.*),
    x AS (
        DELETE FROM review_content USING r
        WHERE review_content.review_id = r.id AND %(review_state)s = 'COMPLETED'),
    -- As a bucket that leaks: booked is when the last of them would be at an even pace.
    budget AS (
        INSERT INTO retry_budget (tenant, booked)
        SELECT tenant, now() + make_interval(secs => %(retry_seconds)s) FROM a
        WHERE %(counted)s = 1
        ON CONFLICT (tenant) DO UPDATE SET booked = greatest(retry_budget.booked, now())
            + make_interval(secs => %(retry_seconds)s)
        RETURNING booked - make_interval(secs => %(retry_seconds)s * %(retries_at_once)s) AS free),
    n AS (
        INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version, number, fence, tries,
            priority, due_time, wait_reason, wait_cause, wait_since, stalled_since)
        SELECT %(next_id)s, a.kind, a.tenant, r.id, a.key_id, %(next_version)s, r.attempts, r.fence,
            a.tries + %(counted)s, a.priority,
            greatest(now() + make_interval(secs => %(delay)s), (SELECT free FROM budget)),
            %(wait_reason)s, %(wait_cause)s,
            CASE WHEN a.wait_reason = %(wait_reason)s THEN a.wait_since ELSE now() END,
            coalesce(a.stalled_since, now())
        FROM a, r WHERE %(successors)s = 1
        RETURNING pg_notify('byokeep_due', ''))
    SELECT pg_notify('byokeep_review', r.id), (SELECT count(*) FROM n) AS following FROM r"""
)

# What used no key goes back as it was, under another fence; its place in the lane stays.
_PUT_BACK: Final = """
    WITH held AS (
        SELECT id, review_id FROM attempt
        WHERE id = %(id)s AND fence = %(fence)s AND turn = %(turn)s AND state = 'RUNNING'
        FOR UPDATE),
    r AS (
        UPDATE review SET state = 'QUEUED', fence = fence + 1, version = version + 1
        FROM held WHERE review.id = held.review_id
        RETURNING review.id, review.fence, pg_notify('byokeep_review', review.id))
    UPDATE attempt SET state = 'QUEUED', fence = r.fence, key_version = %(next_version)s,
        tries = tries + %(counted)s,
        due_time = CASE WHEN %(delay)s > 0
            THEN now() + make_interval(secs => %(delay)s) ELSE due_time END,
        wait_since = CASE WHEN wait_reason = %(wait_reason)s THEN wait_since ELSE now() END,
        wait_reason = %(wait_reason)s, wait_cause = %(wait_cause)s,
        stalled_since = coalesce(stalled_since, now())
    FROM held, r WHERE attempt.id = held.id
    RETURNING pg_notify('byokeep_due', '')"""

_END_KEY: Final = (
    _END_ATTEMPT  # noqa: S608 - constants
    + """
    v AS (
        -- An ACTIVE version that could not be asked again is what it was.
        UPDATE key_validation SET
            verdict = coalesce(nullif(%(verdict)s, ''), verdict), cause = %(cause)s,
            models = CASE WHEN cardinality(CAST(%(models)s AS text[])) > 0
                THEN CAST(%(models)s AS text[]) ELSE models END,
            attempts = attempts + 1,
            check_time = CASE WHEN %(verdict)s <> '' THEN now() ELSE check_time END,
            action = %(action)s,
            retry_time = CASE WHEN %(successors)s = 1
                THEN now() + make_interval(secs => %(delay)s) END,
            fence = key_validation.fence + %(successors)s
        FROM a WHERE key_validation.tenant = a.tenant AND key_validation.key_id = a.key_id
            AND version = a.key_version
        RETURNING key_validation.key_id, key_validation.fence),
    n AS (
        INSERT INTO attempt (id, kind, tenant, key_id, key_version, number, fence, tries, due_time)
        SELECT %(next_id)s, a.kind, a.tenant, a.key_id, a.key_version, v.fence, v.fence,
            a.tries + 1, now() + make_interval(secs => %(delay)s)
        FROM a, v WHERE %(successors)s = 1)
    SELECT pg_notify('byokeep_key', v.key_id) FROM v"""
)

_STALE_IDS: Final = f"""
    SELECT id FROM attempt
    WHERE state = 'RUNNING' AND heartbeat_time < now() - make_interval(secs => %(seconds)s)
        AND (heartbeat_time < now() - make_interval(secs => %(held)s) OR NOT ({IN_CALL}))
    ORDER BY heartbeat_time LIMIT 100"""  # noqa: S608 - constants
_STALE: Final = """
    SELECT kind FROM attempt
    WHERE id = %(id)s AND state = 'RUNNING'
        AND heartbeat_time < now() - make_interval(secs => %(seconds)s)
    FOR UPDATE SKIP LOCKED"""
# Asked once the attempt is locked, and no call of it can begin. What locks it can't ask: it sees
# calls as they were when it began to look, though the attempt as it is.
_UNFINISHED_CALL: Final = """
    SELECT 1 FROM provider_call WHERE attempt_id = %(id)s AND finish_time IS NULL LIMIT 1"""


class EndingStore:
    """Ends attempts."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def end_review(self, attempt: ReviewAttempt, ending: ReviewEnding, trail: Trail) -> None:
        """Store the end of a review's attempt, and queue what follows. Raises Fenced."""
        if ending.again is None:
            async with self._database.statement() as session:
                await _end_review(session, attempt, ending, trail)
        else:
            async with self._database.transaction() as session:
                await _end_review(session, attempt, ending, trail)

    async def put_back(self, attempt: ReviewAttempt, again: Again) -> None:
        """Have an attempt that used no key wait, and start again as it is. Raises Fenced."""
        async with self._database.transaction() as session:
            await guarded(session, _PUT_BACK, {**held(attempt), **_following(again)})
            await waits.hold(session, attempt, again.decision)

    async def end_key(self, attempt: KeyAttempt, ending: KeyEnding, trail: Trail) -> None:
        """Store the end of a look at a key, and queue what follows. Raises Fenced."""
        async with self._database.transaction() as session:
            await _end_key(session, attempt, ending, trail)

    async def stale(self, seconds: float, held_seconds: float) -> list[str]:
        """Return attempts whose worker gave no sign of life for so long; for
        `held_seconds`, where a call is open that may be taken over."""
        async with self._database.statement() as session:
            found = await session.all(_STALE_IDS, {"seconds": seconds, "held": held_seconds})
        return [row.id for row in found]

    async def fence_off(
        self,
        attempt_id: str,
        seconds: float,
        after_review: Callable[[ReviewAttempt, bool], ReviewEnding],
        after_key: Callable[[KeyAttempt], KeyEnding],
    ) -> AnyAttempt | None:
        """End a stale attempt as is decided, by whether a call is open; None if it is not stale
        any more. Raises Fenced."""
        async with self._database.transaction() as session:
            row = await session.one(_STALE, {"id": attempt_id, "seconds": seconds})
            if row is None:
                return None
            attempt: AnyAttempt
            if row.kind == AttemptKind.REVIEW:
                (attempt,) = await load_reviews(session, [attempt_id])
                unfinished = await session.one(_UNFINISHED_CALL, {"id": attempt_id}) is not None
                ending = after_review(attempt, unfinished)
                await _end_review(session, attempt, ending, Trail())
            else:
                (attempt,) = await load_keys(session, [attempt_id])
                await _end_key(session, attempt, after_key(attempt), Trail())
            return attempt


async def _end_review(
    session: Session, attempt: ReviewAttempt, ending: ReviewEnding, trail: Trail
) -> None:
    failed = ending.review_state is ReviewState.FAILED
    parameters = {
        **held(attempt),
        "attempt_state": ending.attempt_state,
        "failure": ending.failure or "",
        "ambiguous": ending.ambiguous,
        "review_state": ending.review_state,
        "cause": ending.cause,
        "review_failure": ending.failure if failed else "",
        "failure_message": ending.failure_message,
        "retry_seconds": RETRY_SECONDS,
        "retries_at_once": RETRIES_AT_ONCE,
        **_following(ending.again),
        **trailed(trail),
    }
    await guarded(session, _END_REVIEW, parameters)
    if ending.again is not None:
        await waits.hold(session, attempt, ending.again.decision)


async def _end_key(session: Session, attempt: KeyAttempt, ending: KeyEnding, trail: Trail) -> None:
    parameters = {
        **held(attempt),
        "attempt_state": ending.attempt_state,
        "failure": ending.failure or "",
        "ambiguous": False,
        "verdict": ending.verdict or "",
        "cause": ending.cause,
        "models": list(ending.models),
        "action": ending.action,
        "next_id": ids.new_id("att"),
        "successors": 0 if ending.again_seconds is None else 1,
        "delay": ending.again_seconds or 0.0,
        **trailed(trail),
    }
    await guarded(session, _END_KEY, parameters)
    if ending.pauses is not None:
        await waits.pause(session, attempt.tenant, attempt.key_id, ending.pauses)
    if ending.resumes is not None:
        await waits.resume(session, attempt.tenant, attempt.key_id, [ending.resumes])


_NOTHING: Final = {
    "successors": 0,
    "next_id": "",
    "next_version": 0,
    "delay": 0.0,
    "counted": 0,
    "refund": 0,
    "wait_reason": "",
    "wait_cause": "",
    "next_model": "",
}


def _following(again: Again | None) -> dict[str, Any]:
    if again is None:
        return _NOTHING
    decision = again.decision
    return {
        "successors": 1,
        "next_id": ids.new_id("att"),
        "next_version": again.key_version,
        # Who waits with others is due as before: what holds them all says for how long.
        "delay": decision.delay_seconds if decision.holds is Holds.ATTEMPT else 0.0,
        "counted": int(decision.follows is Follows.RETRY),
        "refund": decision.refund,
        "wait_reason": decision.reason,
        "wait_cause": again.cause,
        "next_model": again.model,
    }
