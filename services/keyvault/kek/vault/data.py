"""The data identity: makes data keys, opens them, wraps them again. It changes no KEK.

What it may do at Vault is `deploy/vault/policies/keyvault-data.hcl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.common.secret import Secret
from services.keyvault import kek as keks
from services.keyvault.kek import DataKey, RewrapFailed, Rewrapped, UnwrapError
from services.keyvault.kek.vault import plaintext, states, transit
from services.keyvault.kek.vault.session import Session
from services.keyvault.kek.vault.transit import Place

#: The request header that tells Vault's audit log what a data key is opened for.
LEASE_HEADER = "X-Byokeep-Lease"
# Data keys in one rewrap: some 10 ms of Vault's time. OpenBao takes 1000 strings in a request's
# JSON (its listener's max_request_json_strings): two for each data key, and one.
_BATCH = 400


class DataKeys:
    """Data keys in Transit; `session` returns the identity that opens those of a KEK."""

    def __init__(self, session: Callable[[str], Session], place: Place) -> None:
        """Wrap by the KEKs at a place."""
        self._session = session
        self._place = place
        self._mount = place.mount

    async def generate(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version."""
        key = self._place.key(kek)
        reply = await self._session(kek).ask(
            lambda call: call.transit.generate_data_key(
                key, "plaintext", bits=256, mount_point=self._mount
            ),
            _purpose(),
        )
        try:
            transit.check(reply, kek)
            opened = plaintext.take(reply.body)
            ciphertext = transit.ciphertext_in(reply)
        finally:
            reply.wipe()
        if opened is None or not ciphertext:
            raise states.unavailable("broken")
        return DataKey(opened, ciphertext, transit.version(ciphertext))

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear."""
        key = self._place.key(kek)
        if not transit.is_ciphertext(wrapped):
            raise UnwrapError
        ciphertext = wrapped.decode()
        reply = await self._session(kek).ask(
            lambda call: call.transit.decrypt_data(key, ciphertext, mount_point=self._mount),
            _purpose(),
        )
        try:
            transit.check(reply, kek)
            damaged = transit.damaged(reply)
            opened = plaintext.take(reply.body) if reply.status == 200 else None
        finally:
            reply.wipe()
        if damaged:
            raise UnwrapError
        if opened is None:
            raise states.unavailable("broken")
        return opened

    async def rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        """Wrap data keys again under the KEK's newest version, in batches."""
        done: list[Rewrapped | RewrapFailed] = []
        for start in range(0, len(wrapped), _BATCH):
            done += await self._rewrap(kek, wrapped[start : start + _BATCH])
        return done

    async def _rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        key = self._place.key(kek)
        items = [{"ciphertext": one.decode("ascii", "replace")} for one in wrapped]
        reply = await self._session(kek).ask(
            lambda call: call.transit.rewrap_data(
                key, None, batch_input=items, mount_point=self._mount
            )
        )
        transit.check(reply, kek)
        if reply.status != 200:
            raise states.unavailable("misconfigured")
        results = reply.fields("data", "batch_results")["batch_results"]
        if len(results) != len(items):
            raise states.unavailable("broken")
        return [transit.rewrapped(one) for one in results]


def _purpose() -> dict[str, str]:
    what = keks.purpose.get()
    return {LEASE_HEADER: what} if what else {}
