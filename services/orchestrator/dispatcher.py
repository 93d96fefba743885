"""Runs attempts that the queue says are due, and decides what follows from their ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from byokeep import names
from byokeep.common.v1.options_pb2 import SignedEnvelope
from byokeep.keyvault.v1 import custody_pb2

from services.common import background, deadline, logs
from services.common.errors import ByokeepError
from services.orchestrator import content, domain
from services.orchestrator.domain import Failure
from services.orchestrator.events import CANCEL, Events, Subscription
from services.orchestrator.execution import Execution, Result, Stream
from services.orchestrator.grants import Subject
from services.orchestrator.keyvault_client import Keyvault
from services.orchestrator.store_attempts import (
    AttemptStore,
    Ending,
    Fenced,
    Stale,
    Successor,
    ValidationEnding,
    Work,
)
from services.orchestrator.verdicts import Verdicts

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS: Final = 5.0
# A beat on a connection that is silent is given up, for the next to be in time.
_BEAT_SECONDS: Final = 4.0
# Two beats and some: a worker that is only slow loses its attempt, but no call and no answer.
# Well below the 30 s for which a runner keeps what nobody took.
ORPHANED_SECONDS: Final = 12.0
_VALIDATION_SECONDS: Final = 60


class Dispatcher:
    """The worker of the queue: claims, runs and ends attempts."""

    def __init__(
        self,
        store: AttemptStore,
        keyvault: Keyvault,
        contents: content.ContentKeys,
        verdicts: Verdicts,
        events: Events,
        execute: Callable[..., Stream],
        sign: Callable[[Subject, bytes], SignedEnvelope],
        attempt_seconds: int,
    ) -> None:
        """`execute` opens a stream to a runner, `sign` signs a grant for a public key."""
        self._store = store
        self._keyvault = keyvault
        self._contents = contents
        self._verdicts = verdicts
        self._events = events
        self._execute = execute
        self._sign = sign
        self._seconds = attempt_seconds
        self._running: dict[str, Execution] = {}

    async def handle(self, attempt_id: str) -> None:
        """Run an attempt, or go on with one whose worker fell silent in a call, unless it is
        not there to be run: the queue may tell twice."""
        if attempt_id in self._running:
            return
        work = await self._store.claim(attempt_id)
        if work is None:
            work = await self._store.take_over(attempt_id, ORPHANED_SECONDS)
        if work is not None and work.review_id:
            work = await self._opened(work)
        if work is None:
            return
        seconds = self._seconds if work.review_id else min(self._seconds, _VALIDATION_SECONDS)
        execution = Execution(work, self._store, self._execute, self._sign, seconds)
        self._running[attempt_id] = execution
        with self._events.subscribe(CANCEL, attempt_id) as cancelled:
            watcher = background.start(
                "cancel-watch", self._watch(cancelled, attempt_id, execution)
            )
            try:
                await self._run(work, execution)
            finally:
                watcher.cancel()
                del self._running[attempt_id]

    async def beat(self) -> None:
        """Say that our attempts live; stop those that are not ours any more."""
        ours = dict(self._running)
        if not ours:
            return
        with deadline.within(_BEAT_SECONDS):
            alive = await self._store.heartbeat(list(ours))
        # At once: no runner that takes no word may keep the next beat from coming.
        await asyncio.gather(*(ours[attempt_id].stop() for attempt_id in ours.keys() - alive))

    async def _opened(self, work: Work) -> Work | None:
        """Open what is to be reviewed; where it can't be, the attempt has ended with that."""
        try:
            key = await self._contents.of(work.tenant, work.input)
            clear = key.open(work.review_id, content.INPUT, work.input)
            return replace(work, input=clear, content_key=key)
        except ByokeepError as error:
            # What was taken over has a call that may have been answered, and so billed.
            failure = replace(domain.unopened(error), ambiguous=work.turn > 0)
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
                if not await self._store.heartbeat([attempt_id]):
                    await execution.stop()
                    return

    async def _finish(self, work: Work, result: Result) -> None:
        """Store the end of an attempt. Raises Fenced where another worker has it now."""
        try:
            if work.review_id:
                await self._finish_review(work, result)
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
        successor = await self._successor(work, failure, could_finish=result.could_finish)
        await self._store.end_review(work, review_ending(work, failure, successor), result.trail)
        logs.event(
            log,
            "attempt_failed",
            attempt=work.attempt_id,
            review=work.review_id,
            failure=failure.reason,
            retried=successor is not None,
        )

    async def _successor(
        self, work: Work, failure: Failure, *, could_finish: bool
    ) -> Successor | None:
        if not could_finish or failure.ambiguous:
            return None
        if failure.reason in domain.NEWER_VERSION_HELPS:
            newer = await self._newer_version(work)
            # Once a version: it ends where no newer one is active.
            return Successor(0.0, newer) if newer else None
        delay = domain.retry_delay(failure, work.tries)
        return None if delay is None else Successor(delay, work.key_version)

    async def _newer_version(self, work: Work) -> int:
        key = await self._key(work)
        if key is None or not domain.usable(key) or key.active_version <= work.key_version:
            return 0
        return int(key.active_version)

    async def _key(self, work: Work) -> custody_pb2.ProviderKey | None:
        try:
            return await self._keyvault.get(names.key_name(work.tenant, work.key_id))
        except ByokeepError:
            return None

    async def _finish_validation(self, work: Work, result: Result) -> None:
        ending = await self._validation_ending(work, result)
        await self._store.end_validation(work, ending, result.trail)
        if ending.action:
            await self._verdicts.apply(
                work.tenant,
                work.key_id,
                work.key_version,
                ending.action,
                work.actor,
                destroy_previous=work.destroy_previous,
            )

    async def _validation_ending(self, work: Work, result: Result) -> ValidationEnding:
        failure, verdict = result.failure, result.verdict
        if verdict == "UNSPECIFIED":
            verdict = "UNREACHABLE" if failure is None else domain.verdict_of(failure)
        reason = "" if failure is None else failure.reason
        state = "COMPLETED" if failure is None else "FAILED"
        if verdict != "UNREACHABLE":
            return ValidationEnding(
                state, verdict, domain.action_of(verdict), reason, result.models
            )
        if reason in domain.NEWER_VERSION_HELPS and not await self._pending(work):
            # Revoked or destroyed meanwhile: nobody waits for a verdict.
            return ValidationEnding(state, verdict, "", reason)
        return unreachable(work.validations, work.validation_hours, work.key_version, reason)

    async def _pending(self, work: Work) -> bool:
        key = await self._key(work)
        return key is None or any(
            version.version == work.key_version
            and version.state == custody_pb2.KEY_VERSION_STATE_PENDING
            for version in key.versions
        )


def review_ending(
    work: Work | Stale, failure: Failure, successor: Successor | None, state: str = "FAILED"
) -> Ending:
    """Return the end of a failed attempt: its review waits for the successor, or fails."""
    if successor is not None:
        return Ending(state, "QUEUED", failure.reason, "", failure.ambiguous, successor)
    reason = "AMBIGUOUS" if failure.ambiguous else failure.reason
    sentence = domain.failure_sentence(
        reason,
        key=work.key_id,
        model=f"{work.provider}/{work.model}",
        review=work.review_id,
    )
    return Ending(state, "FAILED", reason, sentence, failure.ambiguous)


def unreachable(
    validations: int, hours: float, key_version: int, reason: str, state: str = "FAILED"
) -> ValidationEnding:
    """Return the end of a validation whose provider could not be asked: later, or too late."""
    if hours >= domain.VALIDATION_HOURS:
        return ValidationEnding(state, "UNREACHABLE", "DESTROY", reason)
    delay = domain.validation_delay(validations + 1)
    return ValidationEnding(
        state, "UNREACHABLE", "", reason, successor=Successor(delay, key_version)
    )
