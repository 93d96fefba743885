"""Runs attempts whose turn it is, as many as runners have room for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from services.common import deadline, logs, tracing
from services.common.background import start
from services.common.errors import ByokeepError
from services.orchestrator.custody import content
from services.orchestrator.policy import failures
from services.orchestrator.store.attempts import (
    AnyAttempt,
    AttemptStore,
    Fenced,
    KeyAttempt,
    ReviewAttempt,
)
from services.orchestrator.store.events import CANCEL, DUE, Events, Subscription
from services.orchestrator.store.picks import PickStore
from services.orchestrator.work.execution import Execution, Means, R
from services.orchestrator.work.executions import KeyExecution, ReviewExecution, ReviewResult
from services.orchestrator.work.fleet import Fleet, Place
from services.orchestrator.work.outcomes import Outcomes

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS: Final = 2.5
# A beat on a connection that is silent is given up, for the next to be in time.
_BEAT_SECONDS: Final = 2.0
# Two beats and some: a worker that is only slow loses its attempt, but no call and no answer.
# Well below the 30 s for which a runner keeps what nobody took.
ORPHANED_SECONDS: Final = 8.0
# What becomes due by the clock, and what a lost notification told of, is seen by then.
_LOOK_SECONDS: Final = 0.5


class Dispatcher:
    """The worker: picks attempts and runs them."""

    def __init__(
        self,
        picks: PickStore,
        attempts: AttemptStore,
        outcomes: Outcomes,
        contents: content.ContentKeys,
        events: Events,
        fleet: Fleet,
        means: Means,
        *,
        attempt_seconds: int,
        concurrency: int,
    ) -> None:
        """`means` is what each attempt is run with; `concurrency` is the most at once."""
        self._picks = picks
        self._attempts = attempts
        self._outcomes = outcomes
        self._contents = contents
        self._events = events
        self._fleet = fleet
        self._means = means
        self._seconds = attempt_seconds
        self._concurrency = concurrency
        self._running: dict[str, Execution[Any]] = {}
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
        picked: list[AnyAttempt] = []
        try:
            if places:
                picked = await self._picks.pick(len(places))
        finally:
            for place in places[len(picked) :]:
                place.give_back()
        self._wants_room = len(picked) == len(places)
        for attempt, place in zip(picked, places, strict=False):
            self._start(attempt, place)
        return len(picked)

    def room_changed(self) -> None:
        """Take note that runners told of their room: worth a look where that was wanted."""
        if self._wants_room:
            self._events.wake(DUE, "")

    async def take_over(self) -> None:
        """Go on with attempts whose workers fell silent in a call."""
        room = self._concurrency - len(self._tasks)
        if room > 0 and not self._stopping:
            for attempt in await self._picks.take_over(ORPHANED_SECONDS, room):
                self._start(attempt, None)

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
        ours = dict(self._running)
        if not ours:
            return
        with deadline.within(_BEAT_SECONDS):
            alive = await self._attempts.heartbeat(
                {attempt_id: execution.answer_bytes for attempt_id, execution in ours.items()}
            )
        # At once: no runner that takes no word may keep the next beat from coming.
        await asyncio.gather(*(ours[attempt_id].stop() for attempt_id in ours.keys() - alive))

    def _start(self, attempt: AnyAttempt, place: Place | None) -> None:
        task = start("attempt", self._traced(attempt, place))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, place))

    def _ended(self, task: asyncio.Task[None], place: Place | None) -> None:
        self._tasks.discard(task)
        if place is not None:
            place.give_back()
        self._events.wake(DUE, "")

    async def _traced(self, attempt: AnyAttempt, place: Place | None) -> None:
        review = attempt if isinstance(attempt, ReviewAttempt) else None
        with tracing.span(
            "attempt",
            parent="" if review is None else review.trace_parent,
            attempt=attempt.attempt_id,
            review="" if review is None else review.review_id,
            fence=attempt.fence,
        ):
            logs.correlate(attempt=attempt.attempt_id, trace=tracing.trace_id())
            await self._handle(attempt, place)

    async def _handle(self, attempt: AnyAttempt, place: Place | None) -> None:
        match attempt:
            case ReviewAttempt():
                opened = await self._opened(attempt)
                if opened is not None:
                    review = ReviewExecution(opened, self._means, place, self._seconds)
                    await self._run(
                        opened, review, lambda result: self._outcomes.of_review(opened, result)
                    )
            case KeyAttempt():
                look = KeyExecution(attempt, self._means, place, self._seconds)
                await self._run(
                    attempt, look, lambda result: self._outcomes.of_key(attempt, result)
                )

    async def _opened(self, attempt: ReviewAttempt) -> ReviewAttempt | None:
        """Open what is to be reviewed; where it can't be, the attempt has ended with that."""
        try:
            key = await self._contents.of(attempt.tenant, attempt.input)
            clear = key.open(attempt.review_id, content.INPUT, attempt.input)
            return replace(attempt, input=clear, content_key=key)
        except ByokeepError as error:
            # What was taken over has a call that may have been answered, and so billed.
            failure = replace(failures.of_content(error), ambiguous=attempt.turn > 0)
        with contextlib.suppress(Fenced):
            await self._outcomes.of_review(attempt, ReviewResult(failure))
        return None

    async def _run(
        self,
        attempt: AnyAttempt,
        execution: Execution[R],
        finish: Callable[[R], Awaitable[None]],
    ) -> None:
        self._running[attempt.attempt_id] = execution
        with self._events.subscribe(CANCEL, attempt.attempt_id) as cancelled:
            watcher = start("cancelled", self._watch(cancelled, attempt.attempt_id, execution))
            try:
                await self._until_stored(attempt, execution, finish)
            finally:
                watcher.cancel()
                # Whoever took it over from us may run it here, too.
                if self._running.get(attempt.attempt_id) is execution:
                    del self._running[attempt.attempt_id]

    async def _until_stored(
        self,
        attempt: AnyAttempt,
        execution: Execution[R],
        finish: Callable[[R], Awaitable[None]],
    ) -> None:
        failed: Exception | None = None
        try:
            await execution.run(finish)
        except Fenced:
            logs.event(log, "attempt_lost", attempt=attempt.attempt_id, fence=attempt.fence)
            return
        except ByokeepError:
            # The database is away: silence is what the sweeper knows how to judge.
            raise
        except Exception as error:
            failed = error
        if failed is not None:
            logs.failure(log, "attempt_broke", failed, attempt=attempt.attempt_id)
            await finish(execution.broken())

    async def _watch(
        self, cancelled: Subscription, attempt_id: str, execution: Execution[Any]
    ) -> None:
        while True:
            # Woken also where notifications may have been lost: the table knows.
            await cancelled.wait()
            with contextlib.suppress(ByokeepError):
                if not await self._attempts.heartbeat({attempt_id: execution.answer_bytes}):
                    await execution.stop()
                    return
