"""byokeep: custody of customers' own AI provider keys.

`byokeep.connect(...)` opens the typed gRPC stubs over mTLS, `byokeep.aio.connect(...)` the same
for asyncio; `byokeep.sealing` seals a provider key so that only keyvault can open it. Importing
this package loads neither grpc nor httpx; what needs them does when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byokeep.client import Connection as Connection
    from byokeep.client import connect as connect
    from byokeep.errors import CallError as CallError
    from byokeep.errors import KeyNotUsableError as KeyNotUsableError
    from byokeep.errors import ReviewFailedError as ReviewFailedError
    from byokeep.errors import WatchTimeoutError as WatchTimeoutError

_HOMES = {
    "Connection": "byokeep.client",
    "connect": "byokeep.client",
    "CallError": "byokeep.errors",
    "KeyNotUsableError": "byokeep.errors",
    "ReviewFailedError": "byokeep.errors",
    "WatchTimeoutError": "byokeep.errors",
}

__all__ = [
    "CallError",
    "Connection",
    "Error",
    "KeyNotUsableError",
    "ReviewFailedError",
    "WatchTimeoutError",
    "connect",
]


class Error(Exception):
    """Base of every error that the client raises: one `except` for all of them."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'byokeep' has no attribute {name!r}")
