"""Backend `local`: KEKs under root keys that the operator keeps (see `keyring`).

Each KEK is 256 random bits, wrapped by a root key and stored in keyvault's
database; the root keys never are.

`shred` is "none": whoever holds an old copy of the database and the keyring can
open what was destroyed.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence

from byokeep.encoding import fields
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.secret import Secret
from services.keyvault.database import Connection, Database
from services.keyvault.kek import (
    DataKey,
    Health,
    KekMissingError,
    RewrapFailed,
    Rewrapped,
    Shred,
    UnwrapError,
)
from services.keyvault.kek.keyring import Keyring

# A wrapped key: nonce ‖ AES-256-GCM ciphertext and tag; before a data key's, the KEK's version.
_VERSION_BYTES, _NONCE = 4, 12
_WRAPPED = _NONCE + 32 + 16
_KEK_LABEL = "byokeep/local-kek/v1"
_DEK_LABEL = "byokeep/local-dek/v1"
# Unwrapped KEKs are kept this long, this many: a KEK's version never changes,
# and destroying a tenant also deletes the rows that it could open.
_CACHE_SECONDS = 60.0
_CACHE_ENTRIES = 1024

_INSERT = """
INSERT INTO local_kek (name, version, root_id, wrapped) VALUES (%s, %s, %s, %s)
ON CONFLICT DO NOTHING
"""
# Version 1 alone: of a KEK that was rotated and trimmed, it must not come back.
_CREATE = """
INSERT INTO local_kek (name, version, root_id, wrapped)
SELECT new.name, new.version, new.root_id, new.wrapped
FROM (VALUES (%s, %s, %s, %s::bytea)) AS new (name, version, root_id, wrapped)
WHERE NOT EXISTS (SELECT FROM local_kek old WHERE old.name = new.name)
ON CONFLICT DO NOTHING
"""
_NEWEST = (
    "SELECT version, root_id, wrapped FROM local_kek WHERE name = %s ORDER BY version DESC LIMIT 1"
)
_VERSION = "SELECT version, root_id, wrapped FROM local_kek WHERE name = %s AND version = %s"
_LOCK = "SELECT version FROM local_kek WHERE name = %s ORDER BY version DESC LIMIT 1 FOR UPDATE"
_DELETE = "DELETE FROM local_kek WHERE name = %s"
_TRIM = "DELETE FROM local_kek WHERE name = %s AND version < %s"


class LocalBackend:
    """KEKs under a keyring (see the module)."""

    name = "local"
    shred: Shred = "none"

    def __init__(self, database: Database, keyring: Keyring, deployment: str) -> None:
        """Use a database for wrapped KEKs and a keyring for their root keys."""
        self._database = database
        self._keyring = keyring
        self._deployment = deployment
        self._cache: OrderedDict[tuple[str, int], tuple[float, AESGCM]] = OrderedDict()

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version."""
        version, cipher = await self._newest_cipher(kek)
        key = Secret.random(32)
        return DataKey(key, self._wrap(kek, version, cipher, key), version)

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear."""
        if len(wrapped) != _VERSION_BYTES + _WRAPPED:
            raise UnwrapError
        version = int.from_bytes(wrapped[:_VERSION_BYTES], "big")
        cipher = await self._cipher(kek, version)
        return _opened(cipher, wrapped[_VERSION_BYTES:], self._dek_binding(kek, version))

    async def rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        """Wrap data keys again under the KEK's newest version."""
        version, cipher = await self._newest_cipher(kek)
        return [await self._rewrap(kek, version, cipher, one) for one in wrapped]

    async def _rewrap(
        self, kek: str, version: int, cipher: AESGCM, wrapped: bytes
    ) -> Rewrapped | RewrapFailed:
        try:
            with await self.unwrap(kek, wrapped) as key:
                return Rewrapped(self._wrap(kek, version, cipher, key), version)
        except KekMissingError:
            return RewrapFailed("UNDECRYPTABLE")
        except UnwrapError:
            return RewrapFailed("ROW_TAMPERED")

    async def create(self, kek: str) -> bool:
        """Create a KEK; False where it exists."""
        async with self._database.transaction() as connection:
            cursor = await connection.execute(_CREATE, self._fresh(kek, 1))
            return cursor.rowcount == 1

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number."""
        async with self._database.transaction() as connection:
            version = await self._locked(connection, kek) + 1
            await connection.execute(_INSERT, self._fresh(kek, version))
        return version

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version."""
        row = await self._database.one(_NEWEST, (kek,))
        if row is None:
            raise KekMissingError(kek)
        return int(row[0])

    async def trim(self, kek: str, minimum: int) -> None:
        """Delete the rows below `minimum`; `shred` says what that is worth."""
        async with self._database.transaction() as connection:
            if await self._locked(connection, kek) < minimum:
                raise KekMissingError(kek)
            await connection.execute(_TRIM, (kek, minimum))
        self._forget(kek, minimum)

    async def destroy(self, kek: str) -> None:
        """Delete a KEK's rows; `shred` says what that is worth."""
        async with self._database.transaction() as connection:
            await connection.execute(_DELETE, (kek,))
        self._forget(kek, None)

    async def health(self) -> Health:
        """Answer like the database that the KEKs are in."""
        if await self._database.answers():
            return Health(True, "ok", "the keyring is loaded and the database answers")
        return Health(False, "unreachable", "the database that holds wrapped KEKs does not answer")

    def refusal(self) -> None:
        """Return nothing: keyvault's own database is asked, or the lease fails without it."""

    async def start(self) -> None:
        """Do nothing: the keyring is loaded already."""

    async def close(self) -> None:
        """Do nothing: the database is its owner's to close."""

    async def _locked(self, connection: Connection, kek: str) -> int:
        row = await (await connection.execute(_LOCK, (kek,))).fetchone()
        if row is None:
            raise KekMissingError(kek)
        return int(row[0])

    def _fresh(self, kek: str, version: int) -> tuple[str, int, str, bytes]:
        root = self._keyring.primary
        with Secret.random(32) as key:
            wrapped = _sealed(self._keyring.keys[root], key, self._kek_binding(kek, version))
        return kek, version, root, wrapped

    def _forget(self, kek: str, minimum: int | None) -> None:
        gone = [one for one in self._cache if one[0] == kek and (not minimum or one[1] < minimum)]
        for entry in gone:
            del self._cache[entry]

    def _wrap(self, kek: str, version: int, cipher: AESGCM, key: Secret) -> bytes:
        sealed = _sealed(cipher, key, self._dek_binding(kek, version))
        return version.to_bytes(_VERSION_BYTES, "big") + sealed

    async def _newest_cipher(self, kek: str) -> tuple[int, AESGCM]:
        row = await self._database.one(_NEWEST, (kek,))
        if row is None:
            raise KekMissingError(kek)
        return int(row[0]), self._open(kek, int(row[0]), row[1], row[2])

    async def _cipher(self, kek: str, version: int) -> AESGCM:
        cached = self._cache.get((kek, version))
        if cached is not None and cached[0] > time.monotonic():
            return cached[1]
        row = await self._database.one(_VERSION, (kek, version))
        if row is None:
            raise KekMissingError(kek)
        return self._open(kek, version, row[1], row[2])

    def _open(self, kek: str, version: int, root_id: str, wrapped: bytes) -> AESGCM:
        root = self._keyring.keys.get(root_id)
        if root is None:
            raise KekMissingError(kek)
        with _opened(root, wrapped, self._kek_binding(kek, version)) as key:
            cipher = AESGCM(key.reveal())
        self._cache[kek, version] = (time.monotonic() + _CACHE_SECONDS, cipher)
        while len(self._cache) > _CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return cipher

    def _kek_binding(self, kek: str, version: int) -> bytes:
        return fields(_KEK_LABEL, self._deployment, kek, version)

    def _dek_binding(self, kek: str, version: int) -> bytes:
        return fields(_DEK_LABEL, self._deployment, kek, version)


def _sealed(cipher: AESGCM, key: Secret, binding: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + cipher.encrypt(nonce, key.reveal(), binding)


def _opened(cipher: AESGCM, wrapped: bytes, binding: bytes) -> Secret:
    if len(wrapped) != _WRAPPED:
        raise UnwrapError
    key = Secret(bytearray(32))
    try:
        cipher.decrypt_into(wrapped[:_NONCE], wrapped[_NONCE:], binding, key.reveal())
    except InvalidTag:
        key.wipe()  # what was decrypted before the tag was looked at
    else:
        return key
    raise UnwrapError
