"""Key-encryption keys (KEKs): one small protocol, and its backends.

A KEK is named by what it is for, and the name is derived by the caller from the
tenant it acts for, never read from the row that is to be opened:
`tenant/{tenant}`, `intake/{intake key}`, `system`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from services.common.secret import Secret

Shred = Literal["immediate", "delayed", "none"]
SYSTEM = "system"


def tenant_kek(tenant: str) -> str:
    """Return the name of a tenant's KEK."""
    return f"tenant/{tenant}"


def intake_kek(intake_key_id: str) -> str:
    """Return the name of the epoch KEK that wraps one intake key."""
    return f"intake/{intake_key_id}"


class KekMissingError(Exception):
    """The named KEK does not exist, or that version of it is gone."""


class UnwrapError(Exception):
    """The wrapped data key is not one of this KEK: damaged, or another's."""


class KekUnavailableError(Exception):
    """The backend does not answer. Never a reason to fall back to another key."""


@dataclass(frozen=True, slots=True)
class DataKey:
    """A fresh 256-bit data key (DEK), in clear and wrapped. Use as a block: it is wiped."""

    plaintext: Secret
    wrapped: bytes
    kek_version: int


class Backend(Protocol):
    """Where KEKs live. Every method may raise KekUnavailableError."""

    name: str
    #: What destroying a KEK is worth: "immediate", "delayed" (a waiting period) or "none".
    shred: Shred

    async def create(self, kek: str) -> bool:
        """Create a KEK; False where it exists."""

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version. Raises KekMissingError."""

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear. Raises KekMissingError, UnwrapError."""

    async def destroy(self, kek: str) -> None:
        """Destroy a KEK with all its versions; nothing where there is none."""

    async def healthy(self) -> bool:
        """Say whether the backend would answer now."""
