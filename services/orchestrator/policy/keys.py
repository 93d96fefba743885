"""Which key a review runs on, and how often a provider is asked about one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import provider_value

from services.common.errors import ByokeepError

_dice: Final = random.SystemRandom()
VALIDATION_HOURS: Final = 24
_VALIDATION_DELAYS: Final = (5.0, 30.0, 120.0, 600.0)
#: A key in one of these has ended, for good.
ENDED: Final = (
    custody_pb2.KEY_VERSION_STATE_REVOKED,
    custody_pb2.KEY_VERSION_STATE_DESTROYED,
)


def choose_key(
    provider: str, keys: Sequence[custody_pb2.ProviderKey], user: str = ""
) -> custody_pb2.ProviderKey:
    """Return the oldest usable key of a provider. Raises NO_ACTIVE_KEY or KEY_NEEDS_REKEY."""
    ours = [key for key in keys if key.provider == provider_value(provider)]
    found = min(filter(usable, ours), key=lambda key: key.name, default=None)
    if found is None:
        raise no_key(provider, ours, user)
    return found


def usable(key: custody_pb2.ProviderKey) -> bool:
    """Whether reviews may run on a key; not on one whose row in keyvault names no provider."""
    active = key.active_version > 0 and key.state == custody_pb2.KEY_VERSION_STATE_ACTIVE
    return active and key.provider != options_pb2.PROVIDER_UNSPECIFIED


def no_key(provider: str, keys: Sequence[custody_pb2.ProviderKey], user: str = "") -> ByokeepError:
    """Return the refusal where no key is usable; `provider` and `user` may be empty."""
    for key in keys:
        states = {version.state for version in key.versions} | {key.state}
        if custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY in states:
            key_id = key.name.rsplit("/", 1)[1]
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "KEY_NEEDS_REKEY",
                f"the provider rejected this key; run 'byokeep key rotate {key_id}'",
                key=key_id,
                rotate=f"byokeep key rotate {key_id}",
            )
    # Of several, the one that was added last.
    for key in sorted(keys, key=lambda key: key.name, reverse=True):
        if key.state == custody_pb2.KEY_VERSION_STATE_PENDING:
            key_id = key.name.rsplit("/", 1)[1]
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_ACTIVE_KEY",
                f"{key_id} is PENDING until its provider says that it accepts it;"
                f" 'byokeep key show {key_id}' says how far that is",
                provider=provider,
                key=key_id,
                state="PENDING",
            )
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_ACTIVE_KEY",
        f"no active {provider or 'provider'} key"
        + (f" of user {user}, whose reviews run on the user's own keys" if user else "")
        + f"; run 'byokeep key add {provider or 'PROVIDER'}{f' --user {user}' if user else ''}'",
        provider=provider,
    )


def validation_delay(attempts: int) -> float:
    """Return the seconds until a provider that could not be asked is asked again."""
    if attempts <= len(_VALIDATION_DELAYS):
        return _VALIDATION_DELAYS[attempts - 1] * _dice.uniform(0.9, 1.1)
    return 3600.0 * _dice.uniform(0.9, 1.1)


def action_of(verdict: str) -> str:
    """Return what keyvault is told after a verdict: PROMOTE, DESTROY, or nothing yet."""
    return {"INVALID": "DESTROY", "UNREACHABLE": ""}.get(verdict, "PROMOTE")
