"""Rules without I/O: plans, model and key choice, how often a provider is asked about a key."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import provider_id, provider_value

from services.common.errors import ByokeepError
from services.common.models import Catalog, ModelRef, parse_model

_dice: Final = random.SystemRandom()
VALIDATION_HOURS: Final = 24
_VALIDATION_DELAYS: Final = (5.0, 30.0, 120.0, 600.0)


@dataclass(frozen=True, slots=True)
class Entitlements:
    """What a plan includes; `keys_per_provider` 0 is any number."""

    model_overrides: bool
    user_keys: bool
    keys_per_provider: int
    attempts_in_flight: int
    reviews_per_day: int


PLANS: Final[Mapping[str, Entitlements]] = {
    "STARTER": Entitlements(False, False, 1, 2, 200),
    "TEAM": Entitlements(True, True, 0, 16, 10_000),
    "ENTERPRISE": Entitlements(True, True, 0, 64, 100_000),
}


def plan_lacks(entitlement: str, sentence: str) -> ByokeepError:
    """Return the refusal of what a plan does not include."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION, "PLAN_LACKS", sentence, entitlement=entitlement
    )


def unexpected(field: str, expected: str) -> ByokeepError:
    """Return the refusal of a field that holds something else than what is expected."""
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field}: {expected} expected",
        field=field,
        rule="expected",
    )


def above(field: str, most: int, whose: str) -> ByokeepError:
    """Return the refusal of a ceiling that is above the one over it."""
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field}: can be at most {most:,}, for {whose} allows no more",
        field=field,
        rule="ceiling",
        limit=str(most),
    )


# --- which model, which key


def override_for(repository: str, overrides: Mapping[str, str]) -> str:
    """Return the model of the longest pattern that matches a repository, or an empty text."""
    matching = [one for one in overrides if fnmatch.fnmatchcase(repository, one)]
    return overrides[max(matching, key=lambda one: (len(one), one))] if matching else ""


def read_model(model: str, field: str) -> ModelRef:
    """Parse `provider/model`. Raises ByokeepError: MODEL_INVALID."""
    try:
        return parse_model(model)
    except ValueError as error:
        sentence = str(error)
    raise ByokeepError(grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID", sentence, field=field)


def choose_model(
    candidates: Sequence[str],
    keys: Sequence[custody_pb2.ProviderKey],
    catalog: Catalog,
    user: str = "",
) -> ModelRef:
    """Return the first model that somebody chose, else the default of the only usable provider.

    `candidates` stand in order of precedence: the review's own, the repository's override, the
    tenant's default; empty texts are skipped. `keys` are those that the review may run on: a user's
    own, where it is a user's review.
    """
    for model in candidates:
        if model:
            return read_model(model, "input.model")
    providers = sorted({provider_id(key.provider) for key in keys if usable(key)})
    if len(providers) == 1:
        return ModelRef(providers[0], catalog.default(providers[0]))
    if not providers:
        raise no_key("", keys, user)
    *most, last = providers
    raise ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_MODEL",
        f"there are keys for {', '.join(most)} and {last}, and no model is chosen:"
        " run 'byokeep model set PROVIDER/MODEL', or name one with --model",
        set="byokeep model set PROVIDER/MODEL",
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


#: A key in one of these has ended, for good.
ENDED: Final = (
    custody_pb2.KEY_VERSION_STATE_REVOKED,
    custody_pb2.KEY_VERSION_STATE_DESTROYED,
)


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


# --- validations


def validation_delay(attempts: int) -> float:
    """Return the seconds until a provider that could not be asked is asked again."""
    if attempts <= len(_VALIDATION_DELAYS):
        return _VALIDATION_DELAYS[attempts - 1] * _dice.uniform(0.9, 1.1)
    return 3600.0 * _dice.uniform(0.9, 1.1)


def action_of(verdict: str) -> str:
    """Return what keyvault is told after a verdict: PROMOTE, DESTROY, or nothing yet."""
    return {"INVALID": "DESTROY", "UNREACHABLE": ""}.get(verdict, "PROMOTE")
