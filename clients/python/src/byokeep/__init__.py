"""byokeep: custody of customers' own AI provider keys.

`byokeep.connect(...)` opens the typed gRPC stubs over mTLS; `byokeep.sealing`
seals a provider key so that only keyvault can open it. Importing this package
loads neither grpc nor httpx; `connect` does when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byokeep.client import Connection as Connection
    from byokeep.client import connect as connect

__all__ = ["Connection", "connect"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from byokeep import client

        return getattr(client, name)
    raise AttributeError(f"module 'byokeep' has no attribute {name!r}")
