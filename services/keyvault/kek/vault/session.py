"""An identity's session with Vault: its token, kept alive, and calls under it.

A token is renewed at two thirds of its life, and replaced by a new login when Vault no
longer renews it (its maximum) or refuses it (403: one login, one retry).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

from services.common import logs
from services.keyvault.kek import KekUnavailableError
from services.keyvault.kek.vault import states
from services.keyvault.kek.vault.client import Call
from services.keyvault.kek.vault.login import CredentialError, Login
from services.keyvault.kek.vault.pool import Pool
from services.keyvault.kek.vault.reply import Reply, WireError
from services.keyvault.kek.vault.watch import Watch
from services.keyvault.kek.vault.wire import Wire

log = logging.getLogger(__name__)
_RENEW_AT = 2 / 3
_RETRY_SECONDS = (0.5, 15.0)
# A token that is refused this soon after a login is refused for what it may do, not for
# its age: another login would not help, and each call would bring one.
_FRESH_SECONDS = 1.0
_FOREVER = 3600.0
_NO_NAMESPACE = b"namespace not found"


class Session:
    """One identity: "data" or "admin" (see the module)."""

    def __init__(
        self, name: str, login: Login, wire: Wire, pool: Pool, namespace: str, watch: Watch
    ) -> None:
        """Log in by `login`, call through `pool`, and tell `watch` what came of it."""
        self.name = name
        self._login = login
        self._wire = wire
        self._pool = pool
        self._namespace = namespace
        self._watch = watch
        self._token = ""
        self._seconds = _FOREVER
        self._renewable = False
        self._since = 0.0
        self._logging_in = asyncio.Lock()

    async def start(self) -> None:
        """Log in; nothing where that is done already.

        Raises:
            KekUnavailableError: it was not possible now.
        """
        await self._log_in("")

    def close(self) -> None:
        """Make no more calls; the token ends with its life."""
        self._pool.close()

    async def ask(
        self, build: Callable[[Call], Reply], headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Make a call that Vault answers with 2xx or 400 (or 404, for the caller to judge).

        Raises:
            KekUnavailableError: every other answer, and none at all.
        """
        refusal = self._watch.refusal()
        if refusal is not None:
            raise refusal
        token = self._token
        reply = await self._send(build, token, headers or {})
        if reply.status == 403 and await self._replaced(token):
            reply = await self._send(build, self._token, headers or {})
        state = _state(reply)
        if state == "no_mount":
            state = "ok"
        self._watch.note(state)
        if state != "ok":
            reply.wipe()
            raise states.unavailable(state)
        return reply

    async def alive(self) -> str:
        """Return the state that a look at the own token finds: tries the whole way to Vault."""
        try:
            reply = await self._send(lambda call: call.token.lookup_self(), self._token, {})
        except KekUnavailableError as error:
            return error.state
        return _state(reply)

    async def _send(
        self, build: Callable[[Call], Reply], token: str, headers: Mapping[str, str]
    ) -> Reply:
        def work(deadline: float) -> Reply:
            return build(Call(self._wire, token, self._namespace, deadline, headers))

        state = ""
        try:
            return await self._pool.run(work)
        except WireError as error:
            state = error.state
        self._watch.note(state)
        raise states.unavailable(state)

    async def _replaced(self, refused: str) -> bool:
        """Log in again after a 403; False where that would not help."""
        if self._token == refused and time.monotonic() - self._since < _FRESH_SECONDS:
            return False
        await self._log_in(refused)
        return True

    async def _log_in(self, refused: str) -> None:
        """Replace the token, unless another call has. Raises KekUnavailableError."""
        async with self._logging_in:
            if self._token != refused:
                return
            state = ""
            try:
                token = await asyncio.to_thread(self._login.token)
                reply = await self._send(self._login.send, token, {})
                if reply.status == 200:
                    self._take(reply, token)
                elif reply.status in (400, 403):
                    state = "login_refused"
                else:
                    state = _state(reply)
            except CredentialError:
                state = "no_credential"
            if state:
                self._watch.note(state)
                raise states.unavailable(state)
            self._watch.note("ok")
            logs.event(log, "vault_login", identity=self.name, seconds=self._seconds)

    def _take(self, reply: Reply, token: str) -> None:
        if token:
            self._token, seconds = token, reply.fields("data", "ttl")["ttl"]
        else:
            auth = reply.fields("auth", "client_token", "lease_duration", "renewable")
            self._token, seconds = auth["client_token"], auth["lease_duration"]
            self._renewable = auth["renewable"]
        reply.wipe()
        # A root or orphan token in a file may have no end: 0.
        self._seconds = float(seconds) or _FOREVER
        self._since = time.monotonic()

    async def keep(self) -> None:
        """Renew the token, or log in anew, until cancelled; failures are retried."""
        pause = _RETRY_SECONDS[0]
        wait = self._seconds * _RENEW_AT
        while True:
            await asyncio.sleep(wait)
            try:
                await self._renew()
                pause = _RETRY_SECONDS[0]
                wait = max(self._seconds * _RENEW_AT, 0.2)
            except KekUnavailableError as error:
                logs.event(
                    log,
                    "vault_login_failed",
                    level=logging.ERROR,
                    identity=self.name,
                    state=error.state,
                )
                # Apart from each other, so that replicas do not come back all at once.
                wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 not a secret
                pause = min(pause * 2, _RETRY_SECONDS[1])

    async def _renew(self) -> None:
        token, full = self._token, self._seconds
        if self._renewable:
            reply = await self._send(lambda call: call.token.renew_self(), token, {})
            if reply.status == 200 and self._token == token:
                self._take(reply, "")
            # Near its maximum life Vault gives less than it did: time for a new login.
            if reply.status == 200 and self._seconds > full / 2:
                return
        await self._log_in(self._token)


def _state(reply: Reply) -> str:
    if reply.status == 404 and reply.says(_NO_NAMESPACE):
        return "no_namespace"
    return states.of_answer(reply.status)
