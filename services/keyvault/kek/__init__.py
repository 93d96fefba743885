"""Key-encryption keys (KEKs): one small protocol, its backends, and those in use.

A KEK is named by what it is for, and the name is derived by the caller from the
tenant it acts for, never read from the row that is to be opened:
`tenant/{tenant}`, `intake/{hour}`, `content/{day}`, `system`. Which backend holds it does
stand in the row, so that two live side by side during a migration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol

import grpc

from services.common.errors import ByokeepError
from services.common.secret import Secret

Shred = Literal["immediate", "delayed", "none"]
SYSTEM = "system"
#: What a data key is opened for, such as a lease id: a backend with an audit log of its own
#: has it written there, so that both logs can be held against each other.
purpose: ContextVar[str] = ContextVar("kek_purpose", default="")


@contextmanager
def opened_for(what: str) -> Iterator[None]:
    """Say what data keys are opened for within the block."""
    token = purpose.set(what)
    try:
        yield
    finally:
        purpose.reset(token)


def tenant_kek(tenant: str) -> str:
    """Return the name of a tenant's KEK."""
    return f"tenant/{tenant}"


def intake_kek(epoch: str) -> str:
    """Return the name of the KEK that wraps the intake keys of an epoch."""
    return f"intake/{epoch}"


def content_kek(epoch: str) -> str:
    """Return the name of the KEK that wraps the content keys of an epoch."""
    return f"content/{epoch}"


class KekMissingError(Exception):
    """The named KEK does not exist, or that version of it is gone."""


class UnwrapError(Exception):
    """The wrapped data key is not one of this KEK: damaged, or another's."""


class KekUnavailableError(ByokeepError):
    """The backend does not answer, or not now. Never a reason to fall back to another key."""

    def __init__(self, backend: str, state: str, sentence: str) -> None:
        """`state` is one word, as in Health; `sentence` says what an operator can do."""
        super().__init__(
            grpc.StatusCode.UNAVAILABLE,
            "KEK_UNAVAILABLE",
            f"{sentence}; nothing was released; try again",
            dependency=backend,
            state=state,
        )
        self.state = state
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class DataKey:
    """A fresh 256-bit data key (DEK), in clear and wrapped. Use `plaintext` as a block."""

    plaintext: Secret
    wrapped: bytes
    kek_version: int


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """A data key wrapped again, under the KEK's newest version."""

    wrapped: bytes
    kek_version: int


@dataclass(frozen=True, slots=True)
class RewrapFailed:
    """Why one data key can't be wrapped again: an ErrorReason name."""

    reason: Literal["UNDECRYPTABLE", "ROW_TAMPERED"]


@dataclass(frozen=True, slots=True)
class Health:
    """How a backend is: `state` is one word ("ok", "sealed", "standby", "uninitialized",
    "unreachable", "slow", "denied", …), `detail` a sentence for an operator."""

    ok: bool
    state: str
    detail: str


class Backend(Protocol):
    """Where KEKs live. Every method may raise KekUnavailableError.

    Where a backend tells the data identity and the admin identity apart (vault does), a
    process has those of its role; a method of another one raises RuntimeError.
    """

    name: str
    #: What destroying a KEK is worth: "immediate", "delayed" (a waiting period) or "none".
    shred: Shred

    # Data identity.

    async def generate_data_key(self, kek: str) -> DataKey:
        """Return a fresh data key under the KEK's newest version. Raises KekMissingError."""

    async def unwrap(self, kek: str, wrapped: bytes) -> Secret:
        """Return a data key in clear. Raises KekMissingError, UnwrapError."""

    async def rewrap(self, kek: str, wrapped: Sequence[bytes]) -> list[Rewrapped | RewrapFailed]:
        """Wrap data keys again under the KEK's newest version, in the same order.

        One that fails does not stop the others. Raises KekMissingError where there is no KEK.
        """

    # Admin identity.

    async def create(self, kek: str) -> bool:
        """Create a KEK; False where it exists."""

    async def rotate(self, kek: str) -> int:
        """Make a new version of a KEK and return its number. Raises KekMissingError."""

    async def newest(self, kek: str) -> int:
        """Return the number of the newest version. Raises KekMissingError."""

    async def trim(self, kek: str, minimum: int) -> None:
        """Destroy every version below `minimum`, as far as `shred` says; may be repeated."""

    async def destroy(self, kek: str) -> None:
        """Destroy a KEK with all its versions; nothing where there is none."""

    # Either.

    async def health(self) -> Health:
        """Say how the backend is, now."""

    def refusal(self) -> KekUnavailableError | None:
        """Return why no call is worth trying now, where that is known without one."""

    async def start(self) -> None:
        """Log in, and keep the login alive beside. Raises ConfigError, KekUnavailableError."""

    async def close(self) -> None:
        """End what `start` began."""


class Backends:
    """The backends in use: one that all new rows are written with, and others still read."""

    def __init__(self, primary: Backend, *others: Backend) -> None:
        """Use a primary backend, and others that rows may still name."""
        self.primary = primary
        self._by_name = {one.name: one for one in (*others, primary)}

    def named(self, name: str) -> Backend:
        """Return the backend that a row names. Raises KekMissingError where it isn't in use."""
        backend = self._by_name.get(name)
        if backend is None:
            raise KekMissingError(f"backend {name} is not configured")
        return backend

    def shred_of(self, name: str) -> Shred:
        """Return what a backend's shredding is worth; nothing, where it isn't in use."""
        backend = self._by_name.get(name)
        return backend.shred if backend is not None else "none"

    def refusal_of(self, name: str) -> KekUnavailableError | None:
        """Return why no call to a backend is worth trying now; None also where it isn't in use."""
        backend = self._by_name.get(name)
        return backend.refusal() if backend is not None else None

    async def have(self, kek: str) -> bool:
        """Say whether some backend has a KEK of a name. Raises KekUnavailableError."""
        for backend in self:
            with suppress(KekMissingError):
                await backend.newest(kek)
                return True
        return False

    def __iter__(self) -> Iterator[Backend]:
        """Yield every backend."""
        return iter(self._by_name.values())

    async def start(self) -> None:
        """Start every backend."""
        for backend in self:
            await backend.start()

    async def close(self) -> None:
        """Close every backend."""
        for backend in self:
            await backend.close()
