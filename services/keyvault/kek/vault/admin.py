"""The admin identity: creates, rotates, trims and deletes KEKs. It opens no data key.

What it may do at Vault is `deploy/vault/policies/keyvault-admin.hcl`.
"""

from __future__ import annotations

from collections.abc import Callable

from services.keyvault.kek import KekMissingError
from services.keyvault.kek.vault import states, transit
from services.keyvault.kek.vault.client import Call
from services.keyvault.kek.vault.reply import Reply
from services.keyvault.kek.vault.session import Session
from services.keyvault.kek.vault.transit import Place

_KEY_TYPE = "aes256-gcm96"


class Keys:
    """KEKs in Transit; `session` returns the admin identity."""

    def __init__(self, session: Callable[[], Session], place: Place) -> None:
        """Keep the KEKs at a place."""
        self._session = session
        self._place = place
        self._mount = place.mount

    async def create(self, kek: str) -> bool:
        """Create a KEK, not exportable; False where it exists."""
        key = self._place.key(kek)
        if await self._newest(kek) is not None:
            return False
        await self._change(
            kek,
            lambda call: call.transit.create_key(key, key_type=_KEY_TYPE, mount_point=self._mount),
        )
        return True

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number."""
        key = self._place.key(kek)
        await self._change(kek, lambda call: call.transit.rotate_key(key, mount_point=self._mount))
        return await self.newest(kek)

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version."""
        version = await self._newest(kek)
        if version is None:
            raise KekMissingError(kek)
        return version

    async def trim(self, kek: str, minimum: int) -> None:
        """Destroy every version below `minimum`; may be repeated."""
        key = self._place.key(kek)
        await self._change(kek, lambda call: call.configure_minimum(self._mount, key, minimum))
        await self._change(
            kek, lambda call: call.transit.trim_key(key, minimum, mount_point=self._mount)
        )

    async def destroy(self, kek: str) -> None:
        """Delete a KEK with all its versions; nothing where there is none."""
        key = self._place.key(kek)
        if await self._newest(kek) is None:
            return
        # Only now: until then nobody deletes it by mistake.
        await self._change(
            kek,
            lambda call: call.transit.update_key_configuration(
                key, deletion_allowed=True, mount_point=self._mount
            ),
        )
        await self._change(kek, lambda call: call.transit.delete_key(key, mount_point=self._mount))

    async def _newest(self, kek: str) -> int | None:
        key = self._place.key(kek)
        reply = await self._session().ask(
            lambda call: call.transit.read_key(key, mount_point=self._mount)
        )
        if reply.is_nothing():
            return None
        transit.check(reply, kek)
        return int(reply.fields("data", "latest_version")["latest_version"])

    async def _change(self, kek: str, build: Callable[[Call], Reply]) -> None:
        reply = await self._session().ask(build)
        transit.check(reply, kek)
        if reply.status >= 400:
            raise states.unavailable("misconfigured")
