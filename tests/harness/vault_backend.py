"""The Vault backend by itself, without a keyvault around it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from services.keyvault.kek import KekUnavailableError
from services.keyvault.kek.vault.backend import VaultBackend

#: The KEK that fixture `wrapped` has a data key of.
KEK = "tenant/lifecycle"


@contextlib.asynccontextmanager
async def started(deployment, settings) -> AsyncIterator[VaultBackend]:
    """A backend that is logged in, within the block."""
    backend = VaultBackend(deployment.settings(**settings))
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def first_login(deployment, settings) -> str:
    """Return the state that the data identity's first login fails with; "" where it does not."""
    backend = VaultBackend(deployment.settings(**settings))
    try:
        await backend._watch.look()
        await backend.session("data").start()
    except KekUnavailableError as error:
        return error.state
    finally:
        await backend.close()
    return ""


async def until(condition, seconds: float = 60.0) -> None:
    """Wait for a condition to come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.05)


async def opened(backend: VaultBackend, wrapped: bytes) -> None:
    """Open a data key; raises what the backend raises."""
    with await backend.unwrap(KEK, wrapped):
        pass


async def until_opened(backend: VaultBackend, wrapped: bytes, seconds: float = 60.0) -> None:
    """Wait until a data key is opened, without anybody's help."""
    end = time.monotonic() + seconds
    while await refusal(backend, wrapped):
        assert time.monotonic() < end, "it is not opened"
        await asyncio.sleep(0.1)


async def until_refused(backend: VaultBackend, wrapped: bytes, state: str) -> None:
    """Wait until opening a data key is refused with a state."""
    end = time.monotonic() + 60
    while (said := await refusal(backend, wrapped)) != state:
        assert time.monotonic() < end, f"it is {said or 'opened'}, not {state}"
        await asyncio.sleep(0.1)


async def refusal(backend: VaultBackend, wrapped: bytes) -> str:
    """Return the state that opening a data key is refused with; "" where it is opened."""
    try:
        await opened(backend, wrapped)
    except KekUnavailableError as error:
        return error.state
    return ""
