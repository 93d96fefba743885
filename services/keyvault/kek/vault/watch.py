"""Watches Vault: what state it is in, whether calls are worth trying, and when it is back.

Every second the node's health is asked, on a thread of its own. A state that is not usable,
or a row of calls that failed, closes the way: calls are refused at once instead of waiting
for a Vault that does not answer. It opens again by itself when health, and a look at the
own token (which goes the whole way through Vault), are well.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable

from services.common import logs
from services.common.background import Background
from services.keyvault.kek import Health, KekUnavailableError
from services.keyvault.kek.vault import states
from services.keyvault.kek.vault.client import Call
from services.keyvault.kek.vault.pool import Pool
from services.keyvault.kek.vault.reply import WireError
from services.keyvault.kek.vault.wire import Wire

log = logging.getLogger(__name__)
_INTERVAL_SECONDS = 1.0
_FAILURES = 3
# These are about one call, or about many calls at once: Vault itself answers.
_HARMLESS = frozenset({"ok", "busy", "rate_limited", "no_mount", "misconfigured"})


class Watch:
    """Vault's state (see the module)."""

    def __init__(self, wire: Wire, namespace: str, seconds: float, background: Background) -> None:
        """Ask through `wire`, `seconds` at most; watch in `background`."""
        self._wire = wire
        self._pool = Pool("watch", 1, seconds)
        self._namespace = namespace
        self._state = "starting"
        self._failures = 0
        self._last_failure = ""
        self._background = background

    def start(self, alive: Callable[[], Awaitable[str]]) -> None:
        """Watch from now on; `alive` tries the whole way to Vault."""
        look = functools.partial(self._look_on, alive)
        self._background.every("vault-watch", _INTERVAL_SECONDS, look)

    def close(self) -> None:
        """Ask no more."""
        self._pool.close()

    def health(self) -> Health:
        """Return how Vault is, as of the last look; asks nothing."""
        if self._background.down():
            return states.health("unwatched")
        return states.health(self._closed() or self._state)

    def refusal(self) -> KekUnavailableError | None:
        """Return why no call is worth trying now."""
        state = self._closed()
        return states.unavailable(state) if state and state != "starting" else None

    def note(self, state: str) -> None:
        """Take note of what came of a call."""
        if state == "ok":
            self._failures = 0
        elif state not in _HARMLESS:
            self._failures += 1
            self._last_failure = state

    def _closed(self) -> str:
        if self._state not in states.USABLE:
            return self._state
        return self._last_failure if self._failures >= _FAILURES else ""

    async def look(self) -> str:
        """Ask for the node's health once, and keep it."""
        try:
            reply = await self._pool.run(
                # Health is answered for the root namespace alone.
                lambda deadline: Call(self._wire, "", "", deadline).health()
            )
            state = states.OF_HEALTH.get(reply.status, "failing")
        except WireError as error:
            state = error.state
        if state != self._state:
            logs.event(
                log,
                "vault_state",
                level=logging.INFO if state in states.USABLE else logging.ERROR,
                state=state,
                before=self._state,
            )
        self._state = state
        return state

    async def _look_on(self, alive: Callable[[], Awaitable[str]]) -> None:
        state = await self.look()
        if state in states.USABLE and self._failures >= _FAILURES:
            self.note(await alive())
