"""The Transit backend: one Transit key per KEK, and two identities.

`data` makes data keys, opens and rewraps them; `admin` creates, rotates, trims and deletes
keys and can open none but keyvault's own (`system`), which can open no provider key.
`deploy/vault` has their policies. A KEK's name in Transit is prefix and name, with "-" for
"/": `tenant/acme` is `byokeep-tenant-acme`.

Deleting a Transit key, or trimming its versions, is immediate: Vault's own storage and its
backups are Vault's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.common.config import ConfigError
from services.common.secret import Secret
from services.keyvault import kek
from services.keyvault.config import Settings
from services.keyvault.kek import (
    DataKey,
    Health,
    KekMissingError,
    KekUnavailableError,
    RewrapFailed,
    Rewrapped,
    Shred,
    UnwrapError,
)
from services.keyvault.kek.vault import plaintext, states
from services.keyvault.kek.vault.client import Call
from services.keyvault.kek.vault.log import KvAnchor, TransitSigner
from services.keyvault.kek.vault.login import Login
from services.keyvault.kek.vault.pool import Pool
from services.keyvault.kek.vault.reply import Reply
from services.keyvault.kek.vault.session import Session
from services.keyvault.kek.vault.watch import Watch
from services.keyvault.kek.vault.wire import Wire

_KEY_TYPE = "aes256-gcm96"
_BATCH = 500  # data keys in one rewrap: some 10 ms of Vault's time
_ADMIN_THREADS = 4
_START_SECONDS, _RETRY_SECONDS = 30.0, 1.0
#: The request header that tells Vault's audit log what a data key is opened for.
LEASE_HEADER = "X-Byokeep-Lease"

_KEK = re.compile(r"system|tenant/[a-z0-9][a-z0-9-]*|(intake|content)/[A-Za-z0-9][A-Za-z0-9-]*")
_CIPHERTEXT = re.compile(rb"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]+={0,2}")
_CIPHERTEXT_FIELD = re.compile(rb'"ciphertext"\s*:\s*"(vault:v[0-9]+:[A-Za-z0-9+/]+={0,2})"')
# Vault answers 400 to all of these, and only its text tells them apart (builtin/logical/
# transit/path_decrypt.go, sdk/helper/keysutil/policy.go). The text is looked into, not kept.
_GONE = (b"encryption key not found", b"(too old)", b"key not found", b"no existing key named")
_DAMAGED = (b"message authentication failed", b"invalid ciphertext")
_NO_ROUTE = b"no handler for route"


class VaultBackend:
    """KEKs in Vault's Transit engine (see the module)."""

    name = "vault"
    shred: Shred = "immediate"

    def __init__(self, settings: Settings) -> None:
        """Use the identities that the settings have a login for. Raises ConfigError."""
        self._mount = settings.vault_mount
        self._prefix = settings.vault_prefix
        seconds = settings.vault_deadline_ms / 1000
        self._wire = Wire(_address(settings), _existing(settings.vault_ca))
        self._watch = Watch(self._wire, settings.vault_namespace, seconds)
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
                " BYOKEEP_VAULT_ADMIN_LOGIN for role admin, both for role all"
            )

    async def start(self) -> None:
        """Log in with each identity, and keep watch; wait a while for a Vault that starts too.

        Raises:
            KekUnavailableError: why it was not possible within half a minute.
        """
        end = time.monotonic() + _START_SECONDS
        while (failed := await self._log_in()) is not None:
            if time.monotonic() > end:
                await self.close()
                raise failed
            await asyncio.sleep(_RETRY_SECONDS)
        self._watch.start(next(iter(self._sessions.values())).alive)

    async def close(self) -> None:
        """Stop watching and renewing; tokens end with their life."""
        await self._watch.close()
        for session in self._sessions.values():
            await session.close()
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
        key = self._key(kek)
        reply = await self._opener(kek).ask(
            lambda call: call.transit.generate_data_key(
                key, "plaintext", bits=256, mount_point=self._mount
            ),
            _purpose(),
        )
        try:
            self._check(reply, kek)
            opened = plaintext.take(reply.body)
            wrapped = _CIPHERTEXT_FIELD.search(reply.body)
            ciphertext = bytes(wrapped.group(1)) if wrapped else b""
        finally:
            reply.wipe()
        if opened is None or not ciphertext:
            raise states.unavailable("broken")
        return DataKey(opened, ciphertext, _version(ciphertext))

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear."""
        key = self._key(kek)
        if _CIPHERTEXT.fullmatch(wrapped) is None:
            raise UnwrapError
        ciphertext = wrapped.decode()
        reply = await self._opener(kek).ask(
            lambda call: call.transit.decrypt_data(key, ciphertext, mount_point=self._mount),
            _purpose(),
        )
        try:
            self._check(reply, kek)
            damaged = reply.status == 400 and any(reply.says(phrase) for phrase in _DAMAGED)
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

    async def create(self, kek: str) -> bool:
        """Create a KEK, not exportable; False where it exists."""
        key = self._key(kek)
        if await self._newest(kek) is not None:
            return False
        await self._change(
            lambda call: call.transit.create_key(key, key_type=_KEY_TYPE, mount_point=self._mount),
            kek,
        )
        return True

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number."""
        key = self._key(kek)
        await self._change(lambda call: call.transit.rotate_key(key, mount_point=self._mount), kek)
        return await self.newest(kek)

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version."""
        version = await self._newest(kek)
        if version is None:
            raise KekMissingError(kek)
        return version

    async def trim(self, kek: str, minimum: int) -> None:
        """Destroy every version below `minimum`; may be repeated."""
        key = self._key(kek)
        await self._change(lambda call: call.configure_minimum(self._mount, key, minimum), kek)
        await self._change(
            lambda call: call.transit.trim_key(key, minimum, mount_point=self._mount), kek
        )

    async def destroy(self, kek: str) -> None:
        """Delete a KEK with all its versions; nothing where there is none."""
        key = self._key(kek)
        if await self._newest(kek) is None:
            return
        # Only now: until then nobody deletes it by mistake.
        await self._change(
            lambda call: call.transit.update_key_configuration(
                key, deletion_allowed=True, mount_point=self._mount
            ),
            kek,
        )
        await self._change(lambda call: call.transit.delete_key(key, mount_point=self._mount), kek)

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

    async def _rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        key = self._key(kek)
        items = [{"ciphertext": one.decode("ascii", "replace")} for one in wrapped]
        reply = await self.session("data").ask(
            lambda call: call.transit.rewrap_data(
                key, None, batch_input=items, mount_point=self._mount
            )
        )
        self._check(reply, kek)
        results = reply.json()["data"]["batch_results"]
        if reply.status != 200 or len(results) != len(items):
            raise states.unavailable("broken")
        return [_rewrapped(one) for one in results]

    async def _newest(self, kek: str) -> int | None:
        key = self._key(kek)
        reply = await self.session("admin").ask(
            lambda call: call.transit.read_key(key, mount_point=self._mount)
        )
        if reply.status == 404 and not reply.says(_NO_ROUTE):
            return None
        self._check(reply, kek)
        return int(reply.json()["data"]["latest_version"])

    async def _change(self, build: Callable[[Call], Reply], kek: str) -> None:
        reply = await self.session("admin").ask(build)
        self._check(reply, kek)
        if reply.status >= 400:
            raise states.unavailable("misconfigured")

    def _check(self, reply: Reply, kek: str) -> None:
        """Raise for an answer that says that the KEK, or what it is in, is not there."""
        if reply.status == 404:
            reply.wipe()
            raise states.unavailable("no_mount")
        if reply.status == 400 and any(reply.says(phrase) for phrase in _GONE):
            reply.wipe()
            raise KekMissingError(kek)

    def _either(self) -> Session:
        return self.session("data" if "data" in self._sessions else "admin")

    def _opener(self, name: str) -> Session:
        # keyvault's own keys open no provider key, so the admin role may open them as well.
        if name == kek.SYSTEM and "data" not in self._sessions:
            return self.session("admin")
        return self.session("data")

    def _key(self, kek: str) -> str:
        if _KEK.fullmatch(kek) is None:
            raise ValueError("not the name of a KEK")
        name = self._prefix + kek.replace("/", "-")
        # A Transit key's name ends in a letter, a digit or "_"; a tenant's may end in "-" and
        # never has "_", so this makes no two alike.
        return f"{name}_" if name.endswith("-") else name


def _rewrapped(result: dict[str, str]) -> Rewrapped | RewrapFailed:
    wrapped = result.get("ciphertext", "").encode()
    if wrapped and not result.get("error"):
        return Rewrapped(wrapped, _version(wrapped))
    error = result.get("error", "").encode()
    gone = any(phrase in error for phrase in _GONE)
    return RewrapFailed("UNDECRYPTABLE" if gone else "ROW_TAMPERED")


def _version(ciphertext: bytes) -> int:
    found = _CIPHERTEXT.fullmatch(ciphertext)
    if found is None:
        raise states.unavailable("broken")
    return int(found.group(1))


def _purpose() -> dict[str, str]:
    what = kek.purpose.get()
    return {LEASE_HEADER: what} if what else {}


def _address(settings: Settings) -> str:
    address = settings.vault_address
    if address is None or not re.fullmatch(r"https?://[^/?#@\s]+", address):
        raise ConfigError("BYOKEEP_VAULT_ADDRESS is not of the form https://host:port")
    if settings.mode == "production" and not address.startswith("https://"):
        raise ConfigError("BYOKEEP_VAULT_ADDRESS is not https: data keys would go in the clear")
    return address


def _existing(file: Path | None) -> Path | None:
    if file is not None and not file.is_file():
        raise ConfigError(f"BYOKEEP_VAULT_CA: {file} is not a file")
    return file
