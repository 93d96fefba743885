"""Who signs for the audit log: heads of chains, and checkpoints.

The key may be one that this process holds, or one that never leaves its KEK backend.
"""

from __future__ import annotations

from typing import Protocol

from byokeep import dsse
from byokeep.common.v1 import options_pb2

from services.keyvault.system_keys import SigningKey


class Signer(Protocol):
    """An Ed25519 key of the audit log."""

    @property
    def key_id(self) -> str:
        """Id that clients pin: `alk_` and 16 hex digits."""

    @property
    def public_key(self) -> bytes:
        """The raw public key: 32 bytes."""

    async def sign(self, message: bytes) -> bytes:
        """Return the signature of a message (RFC 8032: 64 bytes)."""


class WrappedKeySigner:
    """Signs with a key that keyvault holds in memory: the wrapped one of its own keys."""

    def __init__(self, key: SigningKey) -> None:
        """Sign with a key."""
        self._key = key
        self.key_id = key.key_id
        self.public_key = key.private.public_key().public_bytes_raw()

    async def sign(self, message: bytes) -> bytes:
        """Return the signature of a message."""
        return self._key.private.sign(message)


async def sign_statement(
    signer: Signer, payload_type: str, payload: bytes
) -> options_pb2.SignedEnvelope:
    """Return a DSSE envelope over serialized bytes of a type."""
    return options_pb2.SignedEnvelope(
        payload_type=payload_type,
        payload=payload,
        key_id=signer.key_id,
        signature=await signer.sign(dsse.pre_authentication_encoding(payload_type, payload)),
    )
