"""Who signs for the audit log: heads of chains, and checkpoints.

The key may be one that this process holds, or one that never leaves its KEK backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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

    def __init__(self, current: Callable[[], SigningKey]) -> None:
        """Sign with the key that is current at the time: it may be rotated meanwhile."""
        self._current = current

    @property
    def key_id(self) -> str:
        """Id of the current key."""
        return self._current().key_id

    @property
    def public_key(self) -> bytes:
        """The current key's raw public key."""
        return self._current().private.public_key().public_bytes_raw()

    async def sign(self, message: bytes) -> bytes:
        """Return the signature of a message."""
        return self._current().private.sign(message)
