"""The Transit backend: one Transit key per KEK, and two identities.

`data` makes data keys, opens and rewraps them (`data.py`); `admin` creates, rotates, trims and
deletes KEKs (`admin.py`) and can open data keys of none but keyvault's own (`system`), which
can open no provider key. `deploy/vault` has their policies.

Deleting a Transit key, or trimming its versions, is immediate: Vault's own storage and its
backups are Vault's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from services.common.background import Background
from services.common.config import URL, ConfigError
from services.common.secret import Secret
from services.keyvault.config import Settings
from services.keyvault.kek import (
    SYSTEM,
    DataKey,
    Health,
    KekUnavailableError,
    RewrapFailed,
    Rewrapped,
    Shred,
)
from services.keyvault.kek.vault.admin import Keys
from services.keyvault.kek.vault.data import DataKeys
from services.keyvault.kek.vault.log import KvAnchor, TransitSigner
from services.keyvault.kek.vault.login import Login
from services.keyvault.kek.vault.pool import Pool
from services.keyvault.kek.vault.session import Session
from services.keyvault.kek.vault.transit import Place
from services.keyvault.kek.vault.watch import Watch
from services.keyvault.kek.vault.wire import Wire

_ADMIN_THREADS = 4


class VaultBackend:
    """KEKs in Vault's Transit engine (see the module)."""

    name = "vault"
    shred: Shred = "immediate"

    def __init__(self, settings: Settings) -> None:
        """Use the identities that the settings have a login for. Raises ConfigError."""
        place = Place(settings.vault_mount, settings.vault_prefix)
        self._mount = place.mount
        self._data = DataKeys(self._opener, place)
        self._keys = Keys(lambda: self.session("admin"), place)
        seconds = settings.vault_deadline_ms / 1000
        self._wire = Wire(_address(settings), _existing(settings.vault_ca))
        self._background = Background()
        self._watch = Watch(self._wire, settings.vault_namespace, seconds, self._background)
        self._sessions: dict[str, Session] = {}
        for name, text, threads in (
            ("data", settings.vault_data_login, settings.vault_calls),
            ("admin", settings.vault_admin_login, _ADMIN_THREADS),
        ):
            if text:
                login = Login.parse(f"BYOKEEP_VAULT_{name.upper()}_LOGIN", text)
                pool = Pool(name, threads, seconds)
                self._sessions[name] = Session(
                    name, login, self._wire, pool, settings.vault_namespace, self._watch
                )
        if not self._sessions:
            raise ConfigError(
                "backend vault needs a login: BYOKEEP_VAULT_DATA_LOGIN for role data,"
                " BYOKEEP_VAULT_ADMIN_LOGIN for role admin and for `migrate`, both for role all"
            )

    async def start(self) -> None:
        """Log in with each identity, and keep watch. May be tried again.

        Raises:
            KekUnavailableError: why it was not possible.
        """
        failed = await self._log_in()
        if failed is not None:
            raise failed
        self._watch.start(next(iter(self._sessions.values())).alive)
        for name, session in self._sessions.items():
            self._background.run(f"vault-token-{name}", session.keep)

    async def close(self) -> None:
        """Stop watching and renewing; tokens end with their life."""
        await self._background.close()
        self._watch.close()
        for session in self._sessions.values():
            session.close()
        self._wire.close()

    async def health(self) -> Health:
        """Say how Vault is, as of the last look, which is a second old at most."""
        return self._watch.health()

    def refusal(self) -> KekUnavailableError | None:
        """Return why no call is worth trying now."""
        return self._watch.refusal()

    def session(self, name: str) -> Session:
        """Return an identity. Raises RuntimeError where this process has not got it."""
        if name not in self._sessions:
            raise RuntimeError(f"this process has no {name} identity at Vault")
        return self._sessions[name]

    async def checkpoint_signer(self, key: str) -> TransitSigner:
        """Return the signer of the audit log's checkpoints. Raises KekUnavailableError."""
        return await TransitSigner.load(self._either(), self._mount, key)

    def anchor(self, place: str) -> KvAnchor:
        """Return the anchor at a place of a key/value engine: `mount/path`."""
        return KvAnchor(self._either(), place)

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version."""
        return await self._data.generate(kek)

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear."""
        return await self._data.unwrap(kek, wrapped)

    async def rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        """Wrap data keys again under the KEK's newest version."""
        return await self._data.rewrap(kek, wrapped)

    async def create(self, kek: str) -> bool:
        """Create a KEK, not exportable; False where it exists."""
        return await self._keys.create(kek)

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number."""
        return await self._keys.rotate(kek)

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version."""
        return await self._keys.newest(kek)

    async def trim(self, kek: str, minimum: int) -> None:
        """Destroy every version below `minimum`; may be repeated."""
        await self._keys.trim(kek, minimum)

    async def destroy(self, kek: str) -> None:
        """Delete a KEK with all its versions; nothing where there is none."""
        await self._keys.destroy(kek)

    async def _log_in(self) -> KekUnavailableError | None:
        """Log in with each identity that has no session yet; return what stands in the way."""
        failed = None
        try:
            for session in self._sessions.values():
                await session.start()
        except KekUnavailableError as error:
            failed = error
        await self._watch.look()
        return failed or self._watch.refusal()

    def _either(self) -> Session:
        return self.session("data" if "data" in self._sessions else "admin")

    def _opener(self, kek: str) -> Session:
        # keyvault's own keys open no provider key, so the admin role may open them as well.
        if kek == SYSTEM and "data" not in self._sessions:
            return self.session("admin")
        return self.session("data")


def _address(settings: Settings) -> str:
    address = settings.vault_address
    pattern, form = URL
    if address is None or not re.fullmatch(pattern, address):
        raise ConfigError(f"BYOKEEP_VAULT_ADDRESS must be {form}")
    if settings.mode == "production" and not address.startswith("https://"):
        raise ConfigError("BYOKEEP_VAULT_ADDRESS is not https: data keys would go in the clear")
    return address


def _existing(file: Path | None) -> Path | None:
    if file is not None and not file.is_file():
        raise ConfigError(f"BYOKEEP_VAULT_CA: {file} is not a file")
    return file
