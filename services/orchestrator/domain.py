"""Rules without I/O: plans, model and key choice, what follows from how an attempt ended."""

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
from byokeep.orchestrator.v1.review_pb2 import FailureReason

from services.common.errors import ByokeepError
from services.common.models import Catalog, ModelRef, parse_model

_dice: Final = random.SystemRandom()


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
                f"{key_id} is PENDING: its provider has not said yet whether it accepts it;"
                f" 'byokeep key show {key_id}' says why, and it becomes ACTIVE by itself",
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


# --- what follows from how an attempt ended


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed; `ambiguous` where the answer to a started call was lost."""

    reason: str
    retryable: bool = False
    retry_after_seconds: float = 0.0
    ambiguous: bool = False


# Never repeated, whatever the runner says: it could not help, or could cost twice.
_FINAL: Final = frozenset(
    {
        "KEY_REJECTED",
        "KEY_RESTRICTED",
        "QUOTA_EXHAUSTED",
        "MODEL_NOT_FOUND",
        "BAD_REQUEST",
        "REFUSED",
        "AMBIGUOUS",
        "KEY_REVOKED",
        "DAILY_LIMIT",
    }
)
NEWER_VERSION_HELPS: Final = frozenset({"KEY_REJECTED", "KEY_REVOKED", "LEASE_REFUSED"})
MAX_TRIES: Final = 3
_MAX_TRIES_UNSENT: Final = 6
_MAX_RETRY_AFTER: Final = 600.0
VALIDATION_HOURS: Final = 24
_VALIDATION_DELAYS: Final = (5.0, 30.0, 120.0, 600.0)


def retry_delay(failure: Failure, tries: int) -> float | None:
    """Return the seconds until an attempt's successor starts, or None where none may."""
    if failure.ambiguous or failure.reason in _FINAL or not failure.retryable:
        return None
    # Nothing was sent: patience costs nobody anything.
    unsent = failure.reason in ("RUNNER_UNAVAILABLE", "KEYVAULT_UNAVAILABLE")
    if tries >= (_MAX_TRIES_UNSENT if unsent else MAX_TRIES):
        return None
    if failure.retry_after_seconds > _MAX_RETRY_AFTER:
        return None
    backoff = 2.0 ** (tries - 1) * _dice.uniform(0.8, 1.2)
    return max(backoff, failure.retry_after_seconds)


def unopened(error: ByokeepError) -> Failure:
    """Return what it means for an attempt that its content could not be opened."""
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Failure("KEYVAULT_UNAVAILABLE", retryable=True)
    if error.reason in ("CONTENT_EXPIRED", "ROW_TAMPERED"):
        return Failure("CONTENT_UNREADABLE")
    return Failure("INTERNAL")


def validation_delay(attempts: int) -> float:
    """Return the seconds until a provider that could not be asked is asked again."""
    if attempts <= len(_VALIDATION_DELAYS):
        return _VALIDATION_DELAYS[attempts - 1] * _dice.uniform(0.9, 1.1)
    return 3600.0 * _dice.uniform(0.9, 1.1)


_VERDICTS: Final = {
    "KEY_REJECTED": "INVALID",
    "KEY_RESTRICTED": "RESTRICTED",
    "QUOTA_EXHAUSTED": "QUOTA_EXHAUSTED",
}


def verdict_of(failure: Failure) -> str:
    """Return what a failed validation attempt says of the key."""
    return _VERDICTS.get(failure.reason, "UNREACHABLE")


def action_of(verdict: str) -> str:
    """Return what keyvault is told after a verdict: PROMOTE, DESTROY, or nothing yet."""
    return {"INVALID": "DESTROY", "UNREACHABLE": ""}.get(verdict, "PROMOTE")


_SENTENCES: Final[Mapping[str, str]] = {
    "KEY_REJECTED": "The provider rejected the key. Run 'byokeep key rotate {key}'.",
    "KEY_RESTRICTED": "The key lacks a scope that a review needs. Widen it at the provider, or"
    " run 'byokeep key rotate {key}'.",
    "QUOTA_EXHAUSTED": "The key's quota or credit is gone. Raise it at the provider, then run"
    " 'byokeep review retry {review}'.",
    "RATE_LIMITED": "The provider asked to slow down until the attempts were used up. Run"
    " 'byokeep review retry {review}' later.",
    "PROVIDER_UNAVAILABLE": "The provider answers with errors of its own. Run 'byokeep review"
    " retry {review}' later.",
    "MODEL_NOT_FOUND": "The provider does not know {model}, or the key can't use it. Choose"
    " another with 'byokeep model set' or --model.",
    "BAD_REQUEST": "The provider refused the request as malformed.",
    "BAD_RESPONSE": "The model's answer was cut, empty or not of the asked shape. Run 'byokeep"
    " review retry {review}', or choose another model.",
    "REFUSED": "The model refused to review this diff.",
    "NETWORK": "The provider could not be reached; nothing was sent. Run 'byokeep review retry"
    " {review}' later.",
    "AMBIGUOUS": "A call was sent and its answer lost; it may have been billed, so it was not"
    " repeated. Run 'byokeep review retry {review}' to make it again.",
    "LEASE_REFUSED": "keyvault refused the key for this attempt. 'byokeep doctor' says why where"
    " the tenant is held; else run 'byokeep key show {key}'.",
    "KEY_REVOKED": "The key was revoked or destroyed.",
    "CHILD_LOST": "The process that ran the review died. Run 'byokeep review retry {review}'.",
    "RUNNER_UNAVAILABLE": "No runner answered. Run 'byokeep review retry {review}' later.",
    "TIMEOUT": "The attempt took longer than it may. Run 'byokeep review retry {review}', or"
    " review a smaller diff.",
    "DAILY_LIMIT": "The tenant's ceiling of provider calls in 24 hours is reached; nothing more was"
    " sent. Run 'byokeep review retry {review}' later, or raise it with 'byokeep limit set'.",
    "INTERNAL": "Something unforeseen happened; the service's log has more.",
    "CONTENT_UNREADABLE": "What was submitted can't be opened any more. Submit it again.",
    "KEYVAULT_UNAVAILABLE": "keyvault did not answer. Run 'byokeep review retry {review}' later.",
}


def failure_sentence(reason: str, *, key: str, model: str, review: str) -> str:
    """Return what to do about a failure, in a sentence."""
    return _SENTENCES[reason].format(key=key, model=model, review=review)


def failure_name(value: FailureReason.ValueType) -> str:
    """Return a failure's short name, empty for none; INTERNAL for one that we don't know."""
    if not value:
        return ""
    known = value in FailureReason.values()
    return FailureReason.Name(value).removeprefix("FAILURE_REASON_") if known else "INTERNAL"
