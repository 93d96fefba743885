"""What changed, as PostgreSQL tells it: one LISTEN connection fans out to all who wait.

A notification is a hint, never the truth: whoever is woken reads the tables. Waits time out, so
that a lost connection delays and does not hide a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from services.common import logs, postgres
from services.common.background import end_if_cancelled

log = logging.getLogger(__name__)
REVIEW: Final = "byokeep_review"
KEY: Final = "byokeep_key"
CANCEL: Final = "byokeep_cancel"
#: Some attempt may have become due; its payload is empty.
DUE: Final = "byokeep_due"
_RECONNECT_SECONDS: Final = 1.0


class Subscription:
    """Changes of one thing since the last wait."""

    def __init__(self) -> None:
        """Start without a change."""
        self._event = asyncio.Event()

    async def wait(self, seconds: float | None = None) -> bool:
        """Return at a change, or after some seconds; True where something changed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        changed = self._event.is_set()
        self._event.clear()
        return changed

    def wake(self) -> None:
        """Tell of a change."""
        self._event.set()


class Events:
    """Fans notifications out within one process."""

    def __init__(self, database_url: str) -> None:
        """Prepare to listen on a `postgresql://` URL."""
        self._url = database_url
        self._subscriptions: dict[tuple[str, str], set[Subscription]] = {}
        self._told = logs.Repeated(log)

    @contextmanager
    def subscribe(self, channel: str, payload: str) -> Iterator[Subscription]:
        """Give a subscription to one thing's changes."""
        subscription = Subscription()
        self._subscriptions.setdefault((channel, payload), set()).add(subscription)
        try:
            yield subscription
        finally:
            left = self._subscriptions[channel, payload]
            left.discard(subscription)
            if not left:
                del self._subscriptions[channel, payload]

    async def listen(self) -> None:
        """Listen for ever; a lost connection is made anew."""
        while True:
            try:
                await self._receive()
            except psycopg.Error as error:
                self._told.failure("listen_failed", error, cause=postgres.cause(error))
            end_if_cancelled()
            self._wake_all()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _receive(self) -> None:
        connection = await postgres.Connection.connect(
            self._url, application_name="byokeep-orchestrator-events"
        )
        async with connection:
            await connection.execute(
                f"LISTEN {REVIEW}; LISTEN {KEY}; LISTEN {CANCEL}; LISTEN {DUE}"
            )
            self._told.well("listen_failed")
            self._wake_all()
            async for notice in postgres.notices(connection):
                self.wake(notice.channel, notice.payload)

    def wake(self, channel: str, payload: str) -> None:
        """Wake this process's own subscribers to one thing."""
        for subscription in self._subscriptions.get((channel, payload), ()):
            subscription.wake()

    def _wake_all(self) -> None:
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.wake()
