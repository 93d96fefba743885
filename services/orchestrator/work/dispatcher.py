"""Runs attempts whose turn it is, as many as runners have room for, and decides what follows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from byokeep import names
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.keyvault.v1 import custody_pb2

from services.common import deadline, logs, tracing
from services.common.background import start
from services.common.errors import ByokeepError
from services.orchestrator import metrics
from services.orchestrator.custody import content
from services.orchestrator.custody.grants import Subject
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
from services.orchestrator.store.attempts import (
    AttemptStore,
    Ending,
    Fenced,
    Stale,
    Successor,
    ValidationEnding,
    Work,
)
from services.orchestrator.store.events import CANCEL, DUE, Events, Subscription
from services.orchestrator.work.execution import Execution, Result
from services.orchestrator.work.fleet import Fleet, Place
from services.orchestrator.work.verdicts import Verdicts

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS: Final = 2.5
# A beat on a connection that is silent is given up, for the next to be in time.
_BEAT_SECONDS: Final = 2.0
# Two beats and some: a worker that is only slow loses its attempt, but no call and no answer.
# Well below the 30 s for which a runner keeps what nobody took.
ORPHANED_SECONDS: Final = 8.0
_VALIDATION_SECONDS: Final = 60
# What becomes due by the clock, and what a lost notification told of, is seen by then.
_LOOK_SECONDS: Final = 0.5


@dataclass(eq=False, slots=True)
class _Running:
    work: Work
    execution: Execution


class Dispatcher:
    """The worker: picks, runs and ends attempts."""

    def __init__(
        self,
        store: AttemptStore,
        keyvault: Keyvault,
        contents: content.ContentKeys,
        verdicts: Verdicts,
        events: Events,
        fleet: Fleet,
        sign: Callable[[Subject, bytes], SignedEnvelope],
        *,
        attempt_seconds: int,
        concurrency: int,
    ) -> None:
        """`sign` signs a grant for a public key; `concurrency` is the most attempts at once."""
        self._store = store
        self._keyvault = keyvault
        self._contents = contents
        self._verdicts = verdicts
        self._events = events
        self._fleet = fleet
        self._sign = sign
        self._seconds = attempt_seconds
        self._concurrency = concurrency
        self._running: set[_Running] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        # Whether more may wait than there was room for.
        self._wants_room = True

    async def run(self) -> None:
        """Pick and run attempts, for ever."""
        with self._events.subscribe(DUE, "") as due:
            while True:
                try:
                    picked = 0 if self._stopping else await self.pick()
                except ByokeepError:
                    picked = 0  # told where it was raised
                if not picked:
                    await due.wait(_LOOK_SECONDS)

    async def pick(self) -> int:
        """Start the attempts whose turn it is, where there is room; return how many."""
        # Taken before, so that none is given away while the database is asked.
        places = self._fleet.take(self._concurrency - len(self._tasks))
        picked: list[Work] = []
        try:
            if places:
                picked = await self._store.pick(len(places))
        finally:
            for place in places[len(picked) :]:
                place.give_back()
        self._wants_room = len(picked) == len(places)
        for work, place in zip(picked, places, strict=False):
            self._start(work, place)
        return len(picked)

    def room_changed(self) -> None:
        """Take note that runners told of their room: worth a look where that was wanted."""
        if self._wants_room:
            self._events.wake(DUE, "")

    async def take_over(self) -> None:
        """Go on with attempts whose workers fell silent in a call."""
        room = self._concurrency - len(self._tasks)
        if room > 0 and not self._stopping:
            for work in await self._store.take_over(ORPHANED_SECONDS, room):
                self._start(work, None)

    async def drain(self) -> None:
        """Pick nothing more, and wait for what runs."""
        self._stopping = True
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """End what still runs here: its runners go on, for another replica to take over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def beat(self) -> None:
        """Say that our attempts live; stop those that are not ours any more."""
        ours = {one.work.attempt_id: one.execution for one in self._running}
        if not ours:
            return
        with deadline.within(_BEAT_SECONDS):
            alive = await self._store.heartbeat(
                {attempt_id: execution.answer_bytes for attempt_id, execution in ours.items()}
            )
        # At once: no runner that takes no word may keep the next beat from coming.
        await asyncio.gather(*(ours[attempt_id].stop() for attempt_id in ours.keys() - alive))

    def _start(self, work: Work, place: Place | None) -> None:
        task = start("attempt", self._traced(work, place))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, place))

    def _ended(self, task: asyncio.Task[None], place: Place | None) -> None:
        self._tasks.discard(task)
        if place is not None:
            place.give_back()
        self._events.wake(DUE, "")

    async def _traced(self, work: Work, place: Place | None) -> None:
        with tracing.span(
            "attempt",
            parent=work.trace_parent,
            attempt=work.attempt_id,
            review=work.review_id,
            fence=work.fence,
        ):
            logs.correlate(attempt=work.attempt_id, trace=tracing.trace_id())
            await self._handle(work, place)

    async def _handle(self, work: Work, place: Place | None) -> None:
        opened = await self._opened(work) if work.review_id else work
        if opened is None:
            return
        work = opened
        seconds = self._seconds if work.review_id else min(self._seconds, _VALIDATION_SECONDS)
        execution = Execution(work, self._store, self._fleet, place, self._sign, seconds)
        one = _Running(work, execution)
        self._running.add(one)
        with self._events.subscribe(CANCEL, work.attempt_id) as cancelled:
            watcher = start("cancelled", self._watch(cancelled, work.attempt_id, execution))
            try:
                await self._run(work, execution)
            finally:
                watcher.cancel()
                self._running.discard(one)

    async def _opened(self, work: Work) -> Work | None:
        """Open what is to be reviewed; where it can't be, the attempt has ended with that."""
        try:
            key = await self._contents.of(work.tenant, work.input)
            clear = key.open(work.review_id, content.INPUT, work.input)
            return replace(work, input=clear, content_key=key)
        except ByokeepError as error:
            # What was taken over has a call that may have been answered, and so billed.
            failure = replace(failures.of_content(error), ambiguous=work.turn > 0)
        with contextlib.suppress(Fenced):
            await self._finish(work, Result(failure))
        return None

    async def _run(self, work: Work, execution: Execution) -> None:
        failed: Exception | None = None
        try:
            await execution.run(lambda result: self._finish(work, result))
        except Fenced:
            logs.event(log, "attempt_lost", attempt=work.attempt_id, fence=work.fence)
            return
        except ByokeepError:
            # The database is away: silence is what the sweeper knows how to judge.
            raise
        except Exception as error:
            failed = error
        if failed is not None:
            logs.failure(log, "attempt_broke", failed, attempt=work.attempt_id)
            await self._finish(work, execution.broken())

    async def _watch(self, cancelled: Subscription, attempt_id: str, execution: Execution) -> None:
        while True:
            # Woken also where notifications may have been lost: the table knows.
            await cancelled.wait()
            with contextlib.suppress(ByokeepError):
                if not await self._store.heartbeat({attempt_id: execution.answer_bytes}):
                    await execution.stop()
                    return

    async def _finish(self, work: Work, result: Result) -> None:
        """Store the end of an attempt. Raises Fenced where another worker has it now."""
        outcome = "COMPLETED" if result.failure is None else result.failure.reason
        metrics.ATTEMPTS.labels(work.kind, work.provider, outcome).inc()
        try:
            if work.kind == "REVIEW":
                await self._finish_review(work, result)
            elif work.kind == "CHECK":
                await self._end_validation(work, check_ending(work, result), result)
            else:
                await self._finish_validation(work, result)
        except Fenced:
            logs.event(log, "attempt_fenced", attempt=work.attempt_id, fence=work.fence)
            if await self._store.taken_over(work):
                raise
            await self._store.trail_of_cancelled(work, result.trail)

    async def _finish_review(self, work: Work, result: Result) -> None:
        failure = result.failure
        if failure is None:
            await self._store.end_review(work, Ending("COMPLETED", "COMPLETED"), result.trail)
            return
        newer = 0
        if failures.newer_version_helps(failure.reason):
            key = await self._key(work)
            active = key.active_version if key is not None and usable(key) else 0
            newer = active if active > work.key_version else 0
            failure = replace(failure, reason=_in_truth(failure.reason, key, work.key_version))
        model = ""
        if failures.other_model_helps(failure.reason):
            model = next(iter(work.fallback_models), "")
        decision = failures.decide(
            failure,
            tries=work.tries,
            waited_seconds=work.waited_seconds if work.wait_reason == failure.reason else 0.0,
            spare_calls=result.spare_calls,
            refused_call=result.refused_call,
            at_once=newer > 0 or bool(model),
            retry_ambiguous=work.retry_ambiguous,
        )
        successor = None
        if decision.follows is not Follows.END:
            version = newer or work.key_version
            successor = Successor(decision.delay_seconds, version, decision, failure.cause, model)
        if successor is not None and not (result.trail.lease_id or work.turn or successor.model):
            # No key was given, so there is nothing to tell of but the wait.
            await self._store.put_back(work, successor)
        else:
            ending = review_ending(work, failure, decision, successor)
            await self._store.end_review(work, ending, result.trail)
        logs.event(
            log,
            "attempt_failed",
            attempt=work.attempt_id,
            review=work.review_id,
            failure=failure.reason,
            follows=decision.follows.name,
            delay_ms=round(decision.delay_seconds * 1000),
            cause=failure.cause,
        )

    async def _key(self, work: Work) -> custody_pb2.ProviderKey | None:
        try:
            return await self._keyvault.get(names.key_name(work.tenant, work.key_id))
        except ByokeepError:
            return None

    async def _finish_validation(self, work: Work, result: Result) -> None:
        ending = await self._validation_ending(work, result)
        await self._end_validation(work, ending, result)
        if ending.action:
            await self._verdicts.apply(
                work.tenant,
                work.key_id,
                work.key_version,
                ending.action,
                work.actor,
                destroy_previous=work.destroy_previous,
            )

    async def _end_validation(self, work: Work, ending: ValidationEnding, result: Result) -> None:
        await self._store.end_validation(work, ending, result.trail)
        logs.event(
            log,
            "key_asked",
            attempt=work.attempt_id,
            kind=work.kind,
            key=work.key_id,
            version=work.key_version,
            verdict=ending.verdict or "UNREACHABLE",
            failure=ending.failure,
            cause=ending.cause,
        )

    async def _validation_ending(self, work: Work, result: Result) -> ValidationEnding:
        state, reason, verdict, cause = _told(result)
        if verdict != "UNREACHABLE":
            return ValidationEnding(
                state, verdict, action_of(verdict), reason, models=result.models
            )
        if reason and failures.newer_version_helps(reason) and not await self._pending(work):
            # Revoked or destroyed meanwhile: nobody waits for a verdict.
            return ValidationEnding(state, verdict, "", reason)
        return unreachable(work.validations, work.validation_hours, work.key_version, reason, cause)

    async def _pending(self, work: Work) -> bool:
        key = await self._key(work)
        return key is None or any(
            version.version == work.key_version
            and version.state == custody_pb2.KEY_VERSION_STATE_PENDING
            for version in key.versions
        )


def _in_truth(reason: str, key: custody_pb2.ProviderKey | None, version: int) -> str:
    """Return what keyvault, which knows more of a key than a runner, makes of a reason."""
    states = {} if key is None else {one.version: one.state for one in key.versions}
    state = states.get(version)
    if reason == "KEY_REVOKED" and state == custody_pb2.KEY_VERSION_STATE_ACTIVE:
        # Its lease alone was: by an operator, who may hold the tenant's others too.
        return "CHILD_LOST"
    if reason == "KEY_REJECTED" and state == custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY:
        return "KEY_NEEDS_REKEY"  # another's look at it was faster
    return reason


def review_ending(
    work: Work | Stale,
    failure: Failure,
    decision: Decision,
    successor: Successor | None,
    state: str = "FAILED",
) -> Ending:
    """Return the end of a failed attempt: its review waits for the successor, or fails."""
    if successor is not None:
        return Ending(
            state, "QUEUED", failure.reason, "", failure.ambiguous, failure.cause, successor
        )
    sentence = failures.failed_sentence(
        decision.reason,
        key=work.key_id,
        model=f"{work.provider}/{work.model}",
        lost_call=failure.ambiguous,
        managed=work.owner == OPERATOR,
    )
    return Ending(state, "FAILED", decision.reason, sentence, failure.ambiguous, failure.cause)


def unreachable(
    validations: int,
    hours: float,
    key_version: int,
    reason: str,
    cause: str = "",
    state: str = "FAILED",
) -> ValidationEnding:
    """Return the end of a validation whose provider could not be asked: later, or too late."""
    if hours >= VALIDATION_HOURS:
        return ValidationEnding(state, "UNREACHABLE", "DESTROY", reason, cause)
    delay = validation_delay(validations + 1)
    return ValidationEnding(
        state, "UNREACHABLE", "", reason, cause, successor=Successor(delay, key_version)
    )


def check_ending(work: Work | Stale, result: Result, state: str = "") -> ValidationEnding:
    """Return the end of the look at a version that serves: reviews go on, or wait for a new
    version, or for the provider to be asked again. Where none waits, it is asked once."""
    told, reason, verdict, cause = _told(result)
    state = state or told
    if verdict == "INVALID":
        return ValidationEnding(
            state, verdict, "", reason, pauses="KEY_NEEDS_REKEY", resumes="KEY_REJECTED"
        )
    if verdict != "UNREACHABLE" or (reason and failures.newer_version_helps(reason)):
        # Taken after all; or it ended meanwhile, which their own attempts will be told.
        kept = "" if verdict == "UNREACHABLE" else verdict
        return ValidationEnding(
            state, kept, "", reason, models=result.models, resumes="KEY_REJECTED"
        )
    reason = reason or failures.of_unreachable(cause)
    again = Successor(validation_delay(work.tries), work.key_version)
    successor = again if work.reviews_wait else None
    state = "FAILED" if state == "COMPLETED" else state
    return ValidationEnding(state, "", "", reason, cause, successor=successor)


def _told(result: Result) -> tuple[str, str, str, str]:
    """Return (the attempt's state, its failure, the verdict, what was unreachable)."""
    failure, verdict = result.failure, result.verdict
    if verdict == "UNSPECIFIED":
        verdict = "UNREACHABLE" if failure is None else failures.verdict_of(failure)
    if failure is None:
        return "COMPLETED", "", verdict, result.cause
    return "FAILED", failure.reason, verdict, result.cause or failure.cause
