"""Keys of keyvault itself: state MAC, intake signing, audit log.

Each is stored in an envelope under a data key that the KEK `system` wraps, and
held in memory while keyvault runs: none of them can open a provider key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from byokeep.ids import public_key_id
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.secret import Secret
from services.keyvault import chain, kek
from services.keyvault.database import Database
from services.keyvault.envelope import Context, decrypt, encrypt

STATE_MAC, INTAKE_SIGNING, AUDIT_LOG = "state_mac", "intake_signing", "audit_log"
_PREFIX = {INTAKE_SIGNING: "isk", AUDIT_LOG: "alk"}

_ALL = """
SELECT kind, key_id, kek_backend, wrapped_dek, envelope FROM system_key ORDER BY create_time
"""
_INSERT = """
INSERT INTO system_key (kind, key_id, kek_backend, kek_version, wrapped_dek, envelope)
VALUES (%s, %s, %s, %s, %s, %s)
"""
_MOVE = """
UPDATE system_key SET kek_backend = %s, kek_version = %s, wrapped_dek = %s, envelope = %s
WHERE kind = %s AND key_id = %s AND wrapped_dek = %s
"""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key and its id."""

    key_id: str
    private: Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class SystemKeys:
    """The newest key of each kind."""

    state_mac: bytes
    intake_signing: SigningKey
    audit_log: SigningKey

    def __repr__(self) -> str:
        """Show ids only."""
        return f"<SystemKeys {self.intake_signing.key_id} {self.audit_log.key_id}>"


async def create(database: Database, backends: kek.Backends, deployment: str) -> None:
    """Make what is missing: the KEK, the system chain, one key of each kind."""
    backend = backends.primary
    await backend.create(kek.SYSTEM)
    async with database.transaction() as connection:
        await chain.create(connection, chain.SYSTEM)
        # The chain's row is the lock: two first starts at once make one set of keys.
        await chain.lock(connection, chain.SYSTEM)
        have = {row[0] for row in await (await connection.execute(_ALL)).fetchall()}
        for kind in (STATE_MAC, INTAKE_SIGNING, AUDIT_LOG):
            if kind in have:
                continue
            secret, key_id = _fresh(kind)
            data_key = await backend.generate_data_key(kek.SYSTEM)
            with data_key.plaintext as clear:
                sealed = encrypt(clear.reveal(), secret, _context(deployment, kind, key_id))
            await connection.execute(
                _INSERT,
                (kind, key_id, backend.name, data_key.kek_version, data_key.wrapped, sealed),
            )


async def move(database: Database, backends: kek.Backends, deployment: str) -> None:
    """Move keys that another backend holds to the primary one, each with a fresh data key."""
    backend = backends.primary
    for kind, key_id, holder, wrapped, sealed in await database.all(_ALL):
        if holder == backend.name:
            continue
        context = _context(deployment, kind, key_id)
        with await backends.named(holder).unwrap(kek.SYSTEM, wrapped) as old:
            secret = Secret(decrypt(old.reveal(), sealed, context))
        with secret:
            fresh = await backend.generate_data_key(kek.SYSTEM)
            with fresh.plaintext as clear:
                moved = encrypt(clear.reveal(), secret.reveal(), context)
        async with database.transaction() as connection:
            await connection.execute(
                _MOVE,
                (backend.name, fresh.kek_version, fresh.wrapped, moved, kind, key_id, wrapped),
            )


async def load(database: Database, backends: kek.Backends, deployment: str) -> SystemKeys:
    """Open the newest key of each kind."""
    found = {
        kind: (key_id, raw) for kind, key_id, raw in await _open(database, backends, deployment)
    }
    return SystemKeys(
        state_mac=found[STATE_MAC][1],
        intake_signing=_signing(*found[INTAKE_SIGNING]),
        audit_log=_signing(*found[AUDIT_LOG]),
    )


async def public_keys(
    database: Database, backends: kek.Backends, deployment: str
) -> Mapping[str, dict[str, bytes]]:
    """Return the public keys that clients pin, by kind and id; from the private ones, so that
    nobody can put another there by SQL."""
    found: dict[str, dict[str, bytes]] = {INTAKE_SIGNING: {}, AUDIT_LOG: {}}
    for kind, key_id, raw in await _open(database, backends, deployment):
        if kind in found:
            private = Ed25519PrivateKey.from_private_bytes(raw)
            found[kind][key_id] = private.public_key().public_bytes_raw()
    return found


async def _open(
    database: Database, backends: kek.Backends, deployment: str
) -> list[tuple[str, str, bytes]]:
    opened = []
    for kind, key_id, backend, wrapped, sealed in await database.all(_ALL):
        with await backends.named(backend).unwrap(kek.SYSTEM, wrapped) as data_key:
            raw = decrypt(data_key.reveal(), sealed, _context(deployment, kind, key_id))
        opened.append((kind, key_id, bytes(raw)))
    return opened


def _fresh(kind: str) -> tuple[bytes, str]:
    if kind == STATE_MAC:
        return os.urandom(32), "1"
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    return private.private_bytes_raw(), public_key_id(_PREFIX[kind], public)


def _signing(key_id: str, raw: bytes) -> SigningKey:
    return SigningKey(key_id, Ed25519PrivateKey.from_private_bytes(raw))


def _context(deployment: str, kind: str, key_id: str) -> Context:
    # No tenant has an empty name, so no provider key's context can equal this.
    return Context(deployment, "", kind, "system", key_id, 1)
