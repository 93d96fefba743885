"""What follows from how an attempt ended: for its review, or for its key."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from byokeep import names
from byokeep.keyvault.v1 import custody_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.orchestrator import metrics
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy import failures
from services.orchestrator.policy.failures import Decision, Failure, Follows
from services.orchestrator.policy.keys import (
    OPERATOR,
    VALIDATION_HOURS,
    action_of,
    usable,
    validation_delay,
)
from services.orchestrator.policy.states import (
    Action,
    AttemptKind,
    AttemptState,
    Reason,
    ReviewState,
    Verdict,
)
from services.orchestrator.store.attempts import (
    AnyAttempt,
    AttemptStore,
    Fenced,
    KeyAttempt,
    ReviewAttempt,
    Trail,
)
from services.orchestrator.store.endings import Again, EndingStore, KeyEnding, ReviewEnding
from services.orchestrator.work.executions import KeyResult, ReviewResult
from services.orchestrator.work.verdicts import Verdicts

log = logging.getLogger(__name__)
_COMPLETED: Final = ReviewEnding(AttemptState.COMPLETED, ReviewState.COMPLETED)


class Outcomes:
    """Stores the ends of attempts, and has done what follows."""

    def __init__(
        self, attempts: AttemptStore, endings: EndingStore, keyvault: Keyvault, verdicts: Verdicts
    ) -> None:
        """Use the stores, what keyvault knows of keys, and what tells it of verdicts."""
        self._attempts = attempts
        self._endings = endings
        self._keyvault = keyvault
        self._verdicts = verdicts

    async def of_review(self, attempt: ReviewAttempt, result: ReviewResult) -> None:
        """Store the end of an attempt of a review. Raises Fenced where another worker has it."""
        _count(attempt, result.failure)
        try:
            if result.failure is None:
                await self._endings.end_review(attempt, _COMPLETED, result.trail)
            else:
                await self._review_failed(attempt, result, result.failure)
        except Fenced:
            await self._fenced(attempt, result.trail)

    async def of_key(self, attempt: KeyAttempt, result: KeyResult) -> None:
        """Store the end of a look at a key. Raises Fenced where another worker has it."""
        _count(attempt, result.failure)
        try:
            ending = await self._key_ending(attempt, result)
            await self._endings.end_key(attempt, ending, result.trail)
        except Fenced:
            await self._fenced(attempt, result.trail)
            return
        logs.event(
            log,
            "key_asked",
            attempt=attempt.attempt_id,
            kind=attempt.kind,
            key=attempt.key_id,
            version=attempt.key_version,
            verdict=ending.verdict or Verdict.UNREACHABLE,
            failure=ending.failure or "",
            cause=ending.cause,
        )
        if ending.action is not Action.NONE:
            await self._verdicts.apply(
                attempt.tenant,
                attempt.key_id,
                attempt.key_version,
                ending.action,
                attempt.actor,
                destroy_previous=attempt.destroy_previous,
            )

    async def _fenced(self, attempt: AnyAttempt, trail: Trail) -> None:
        logs.event(log, "attempt_fenced", attempt=attempt.attempt_id, fence=attempt.fence)
        if await self._attempts.taken_over(attempt):
            raise Fenced
        await self._attempts.trail_of_cancelled(attempt, trail)

    async def _review_failed(
        self, attempt: ReviewAttempt, result: ReviewResult, failure: Failure
    ) -> None:
        newer = 0
        if failures.newer_version_helps(failure.reason):
            key = await self._key(attempt)
            active = key.active_version if key is not None and usable(key) else 0
            newer = active if active > attempt.key_version else 0
            failure = replace(failure, reason=_in_truth(failure.reason, key, attempt.key_version))
        model = ""
        if failures.other_model_helps(failure.reason):
            model = next(iter(attempt.fallback_models), "")
        decision = failures.decide(
            failure,
            tries=attempt.tries,
            waited_seconds=attempt.waited_seconds if attempt.wait_reason == failure.reason else 0.0,
            spare_calls=result.spare_calls,
            refused_call=result.refused_call,
            at_once=newer > 0 or bool(model),
            retry_ambiguous=attempt.retry_ambiguous,
        )
        again = None
        if decision.follows is not Follows.END:
            again = Again(decision, newer or attempt.key_version, failure.cause, model)
        if again is not None and not (result.trail.lease_id or attempt.turn or again.model):
            # No key was given, so there is nothing to tell of but the wait.
            await self._endings.put_back(attempt, again)
        else:
            ending = _review_ending(attempt, failure, decision, again)
            await self._endings.end_review(attempt, ending, result.trail)
        logs.event(
            log,
            "attempt_failed",
            attempt=attempt.attempt_id,
            review=attempt.review_id,
            failure=failure.reason,
            follows=decision.follows.name,
            delay_ms=round(decision.delay_seconds * 1000),
            cause=failure.cause,
        )

    async def _key_ending(self, attempt: KeyAttempt, result: KeyResult) -> KeyEnding:
        if attempt.kind is AttemptKind.CHECK:
            return check_ending(attempt, result)
        state, reason, verdict, cause = _told(result)
        if verdict is not Verdict.UNREACHABLE:
            return KeyEnding(state, verdict, action_of(verdict), reason, models=result.models)
        if reason and failures.newer_version_helps(reason) and not await self._pending(attempt):
            # Revoked or destroyed meanwhile: nobody waits for a verdict.
            return KeyEnding(state, verdict, failure=reason)
        return _unreachable(
            attempt.validations, attempt.validation_hours, AttemptState.FAILED, reason, cause
        )

    async def _pending(self, attempt: KeyAttempt) -> bool:
        key = await self._key(attempt)
        return key is None or any(
            version.version == attempt.key_version
            and version.state == custody_pb2.KEY_VERSION_STATE_PENDING
            for version in key.versions
        )

    async def _key(self, attempt: AnyAttempt) -> custody_pb2.ProviderKey | None:
        try:
            return await self._keyvault.get(names.key_name(attempt.tenant, attempt.key_id))
        except ByokeepError:
            return None


def review_after_silence(attempt: ReviewAttempt, unfinished_call: bool) -> ReviewEnding:
    """Return what follows for a review whose worker fell silent.

    A call whose answer nobody stored may have been billed: it is not repeated by itself. An
    attempt that silences its workers again and again is given up.
    """
    failure = Failure(Reason.CHILD_LOST, ambiguous=unfinished_call)
    decision = failures.decide(
        failure,
        tries=attempt.tries,
        spare_calls=attempt.calls_left - 1,
        retry_ambiguous=attempt.retry_ambiguous,
    )
    again = None
    if decision.follows is not Follows.END:
        again = Again(decision, attempt.key_version)
    return _review_ending(attempt, failure, decision, again, AttemptState.FENCED)


def key_after_silence(attempt: KeyAttempt) -> KeyEnding:
    """Return what follows for a key whose worker fell silent."""
    if attempt.kind is AttemptKind.CHECK:
        lost = KeyResult(Failure(Reason.CHILD_LOST))
        return replace(check_ending(attempt, lost), attempt_state=AttemptState.FENCED)
    return _unreachable(attempt.tries, 0.0, AttemptState.FENCED, Reason.CHILD_LOST)


def check_ending(attempt: KeyAttempt, result: KeyResult) -> KeyEnding:
    """Return the end of the look at a version that serves: reviews go on, or wait for a new
    version, or for the provider to be asked again. Where none waits, it is asked once."""
    state, reason, verdict, cause = _told(result)
    if verdict is Verdict.INVALID:
        return KeyEnding(
            state,
            verdict,
            failure=reason,
            pauses=Reason.KEY_NEEDS_REKEY,
            resumes=Reason.KEY_REJECTED,
        )
    if verdict is not Verdict.UNREACHABLE or (reason and failures.newer_version_helps(reason)):
        # Taken after all; or it ended meanwhile, which their own attempts will be told.
        kept = None if verdict is Verdict.UNREACHABLE else verdict
        return KeyEnding(
            state, kept, failure=reason, models=result.models, resumes=Reason.KEY_REJECTED
        )
    delay = validation_delay(attempt.tries) if attempt.reviews_wait else None
    reason = reason or failures.of_unreachable(cause)
    return KeyEnding(AttemptState.FAILED, None, failure=reason, cause=cause, again_seconds=delay)


def _count(attempt: AnyAttempt, failure: Failure | None) -> None:
    outcome = "COMPLETED" if failure is None else failure.reason
    metrics.ATTEMPTS.labels(attempt.kind, attempt.provider, outcome).inc()


def _in_truth(reason: Reason, key: custody_pb2.ProviderKey | None, version: int) -> Reason:
    """Return what keyvault, which knows more of a key than a runner, makes of a reason."""
    states = {} if key is None else {one.version: one.state for one in key.versions}
    state = states.get(version)
    if reason is Reason.KEY_REVOKED and state == custody_pb2.KEY_VERSION_STATE_ACTIVE:
        # Its lease alone was: by an operator, who may hold the tenant's others too.
        return Reason.CHILD_LOST
    if reason is Reason.KEY_REJECTED and state == custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY:
        return Reason.KEY_NEEDS_REKEY  # another's look at it was faster
    return reason


def _review_ending(
    attempt: ReviewAttempt,
    failure: Failure,
    decision: Decision,
    again: Again | None,
    state: AttemptState = AttemptState.FAILED,
) -> ReviewEnding:
    """Return the end of a failed attempt: its review waits for what follows, or fails."""
    if again is not None:
        return ReviewEnding(
            state,
            ReviewState.QUEUED,
            failure.reason,
            ambiguous=failure.ambiguous,
            cause=failure.cause,
            again=again,
        )
    sentence = failures.failed_sentence(
        decision.reason,
        key=attempt.key_id,
        model=f"{attempt.provider}/{attempt.model}",
        lost_call=failure.ambiguous,
        managed=attempt.owner == OPERATOR,
    )
    return ReviewEnding(
        state, ReviewState.FAILED, decision.reason, sentence, failure.ambiguous, failure.cause
    )


def _unreachable(
    validations: int, hours: float, state: AttemptState, reason: Reason | None, cause: str = ""
) -> KeyEnding:
    """Return the end of a validation whose provider could not be asked: later, or too late."""
    late = hours >= VALIDATION_HOURS
    return KeyEnding(
        state,
        Verdict.UNREACHABLE,
        Action.DESTROY if late else Action.NONE,
        reason,
        cause,
        again_seconds=None if late else validation_delay(validations + 1),
    )


def _told(result: KeyResult) -> tuple[AttemptState, Reason | None, Verdict, str]:
    """Return (the attempt's state, its failure, the verdict, what was unreachable)."""
    failure, verdict = result.failure, result.verdict
    if verdict is Verdict.UNSPECIFIED:
        verdict = Verdict.UNREACHABLE if failure is None else failures.verdict_of(failure)
    if failure is None:
        return AttemptState.COMPLETED, None, verdict, result.cause
    return AttemptState.FAILED, failure.reason, verdict, result.cause or failure.cause
