"""Which key a review runs on, and how often a provider is asked about one."""

from __future__ import annotations

import enum
import fnmatch
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import last_of, provider_id, provider_value

from services.common.errors import ByokeepError
from services.orchestrator.policy.refusals import unexpected
from services.orchestrator.policy.states import Action, Verdict

_dice: Final = random.SystemRandom()
VALIDATION_HOURS: Final = 24
_VALIDATION_DELAYS: Final = (5.0, 30.0, 120.0, 600.0)
# Most keys that a refusal names.
_SHOWN: Final = 10
#: A key in one of these has ended, for good.
ENDED: Final = (
    custody_pb2.KEY_VERSION_STATE_REVOKED,
    custody_pb2.KEY_VERSION_STATE_DESTROYED,
)


#: Owner of managed keys: the operator of the deployment. No user has this name.
OPERATOR: Final = "+operator"


class KeySource(enum.Enum):
    """Whose key a review runs on; the values are names of the proto's KeySource."""

    USER = "USER"
    REPOSITORY = "REPOSITORY"
    TEAM = "TEAM"
    #: No part of an order: a tenant's reviews run on managed keys alone, or on its own alone.
    MANAGED = "MANAGED"


@dataclass(frozen=True, slots=True)
class RepositoryKey:
    """The key of the repositories that a pattern matches, of one provider."""

    pattern: str
    provider: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a review may run on, source by source in the order of the tenant's policy.

    The first source that has a key of the model's provider decides; where none of its keys is
    usable, the review is refused: never on to another. `user` is the owner that a refusal names;
    `named` is how the submitter called the key, if at all.
    """

    sources: Sequence[tuple[KeySource, Sequence[custody_pb2.ProviderKey]]]
    user: str = ""
    named: str = ""

    def called(self, name: str) -> Keys:
        """Return those of a name or id alone. Raises ByokeepError: NOT_FOUND."""
        found = [
            (source, [key for key in keys if name in (key.display_name, last_of(key.name))])
            for source, keys in self.sources
        ]
        if not any(keys for _, keys in found):
            there = {_called(key) for _, keys in self.sources for key in keys}
            raise ByokeepError(
                grpc.StatusCode.NOT_FOUND,
                "NOT_FOUND",
                "there is no key of that name or id that the review may run on; it may run on"
                f" {', '.join(sorted(there)[:_SHOWN]) or 'none'}",
                resource="providerKey",
                field="input.key",
            )
        return Keys(found, self.user, name)

    def providers(self) -> list[str]:
        """Return the providers whose default model may be taken: those of usable keys of the first
        source that has any; of a key that was named, its own in any case."""
        for _, keys in self.sources:
            found = {provider_id(key.provider) for key in keys if self.named or usable(key)}
            if found:
                return sorted(found)
        return []

    def has(self, provider: str) -> bool:
        """Whether there is a key of a provider, usable or not."""
        return any(key.provider == provider_value(provider) for key in self.all())

    def all(self) -> list[custody_pb2.ProviderKey]:
        """Return all of them."""
        return [key for _, keys in self.sources for key in keys]

    def choose(self, provider: str) -> custody_pb2.ProviderKey:
        """Return the oldest usable key of the source that decides.

        Raises ByokeepError: NO_ACTIVE_KEY, KEY_NEEDS_REKEY, INVALID_FIELD.
        """
        if self.named and not self.has(provider):
            raise unexpected("input.key", f"a key of the model's provider, {provider},")
        for source, keys in self.sources:
            ours = [key for key in keys if key.provider == provider_value(provider)]
            if ours:
                found = min(filter(usable, ours), key=lambda key: key.name, default=None)
                if found is not None:
                    return found
                exact = self.named or source is KeySource.REPOSITORY
                exact = exact and source is not KeySource.MANAGED
                raise _ended(source, ours) if exact else self.refusal(provider, ours)
        raise self.refusal(provider, [])

    def refusal(self, provider: str, keys: Sequence[custody_pb2.ProviderKey]) -> ByokeepError:
        """Return the refusal where none of these is usable; `provider` may be empty."""
        if any(source is KeySource.MANAGED for source, _ in self.sources):
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_ACTIVE_KEY",
                f"no managed {provider or 'provider'} key is ACTIVE, and the tenant's reviews run"
                " on no others: the operator of the deployment brings one",
                provider=provider,
                state="MANAGED",
            )
        return no_key(provider, keys, self.user)


def keys_for(
    keys: Sequence[custody_pb2.ProviderKey],
    *,
    user: str,
    repository: str,
    managed: bool = False,
    order: Sequence[str] = (),
    of_repositories: Sequence[RepositoryKey] = (),
) -> Keys:
    """Return the keys that a review may run on.

    Args:
        keys: the tenant's that are not destroyed.
        user: who submits it; empty: the tenant.
        repository: its repository.
        managed: whether the tenant's reviews run on managed keys, and so on no others.
        order: names of KeySource as the tenant's settings have them; empty: a user's review runs on
            the user's own keys, all others on the repository's, else the team's.
        of_repositories: the keys of the tenant's repositories.
    """
    if managed:
        return Keys([(KeySource.MANAGED, of_custody(keys, managed=True))])
    own = [key for key in keys if user and key.owner == user]
    team = [key for key in keys if not key.owner]
    found = {
        KeySource.USER: own,
        KeySource.REPOSITORY: _of_repository(repository, team, of_repositories),
        KeySource.TEAM: team,
    }
    if order:
        return Keys([(KeySource(name), found[KeySource(name)]) for name in order])
    if user:
        return Keys([(KeySource.USER, own)], user)
    sources = (KeySource.REPOSITORY, KeySource.TEAM)
    return Keys([(source, found[source]) for source in sources])


def of_custody(
    keys: Sequence[custody_pb2.ProviderKey], *, managed: bool
) -> list[custody_pb2.ProviderKey]:
    """Return the managed keys, or all others."""
    return [key for key in keys if (key.owner == OPERATOR) is managed]


def _of_repository(
    repository: str,
    team: Sequence[custody_pb2.ProviderKey],
    of_repositories: Sequence[RepositoryKey],
) -> list[custody_pb2.ProviderKey]:
    """Return the repository's keys, one of a provider: that of the longest pattern. One that is
    destroyed is told by its tombstone: another does not take its place in silence."""
    chosen: dict[str, RepositoryKey] = {}
    for row in sorted(of_repositories, key=lambda row: (len(row.pattern), row.pattern)):
        if fnmatch.fnmatchcase(repository, row.pattern):
            chosen[row.provider] = row
    there = {last_of(key.name): key for key in team}
    return [there.get(row.key_id) or _tombstone(row) for row in chosen.values()]


def _tombstone(row: RepositoryKey) -> custody_pb2.ProviderKey:
    return custody_pb2.ProviderKey(
        name=f"providerKeys/{row.key_id}",
        provider=provider_value(row.provider),
        state=custody_pb2.KEY_VERSION_STATE_DESTROYED,
    )


def _ended(source: KeySource, keys: Sequence[custody_pb2.ProviderKey]) -> ByokeepError:
    """Return the refusal of a key that alone could be meant."""
    key = keys[0]
    if key.state not in ENDED:
        return no_key(provider_id(key.provider), keys)
    state = custody_pb2.KeyVersionState.Name(key.state).removeprefix("KEY_VERSION_STATE_")
    remedy = "name another"
    if source is KeySource.REPOSITORY:
        remedy = "give the repository another, or none"
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_ACTIVE_KEY",
        f"{last_of(key.name)} is {state}, for good; {remedy}",
        provider=provider_id(key.provider),
        key=last_of(key.name),
        state=state,
    )


def hint_of(key: custody_pb2.ProviderKey, version: int) -> str:
    """Return the redacted hint of a version; empty where it is not there."""
    return next((one.hint for one in key.versions if one.version == version), "")


def _called(key: custody_pb2.ProviderKey) -> str:
    return f"{key.display_name or last_of(key.name)} ({provider_id(key.provider)})"


def usable(key: custody_pb2.ProviderKey) -> bool:
    """Whether reviews may run on a key; not on one whose row in keyvault names no provider."""
    active = key.active_version > 0 and key.state == custody_pb2.KEY_VERSION_STATE_ACTIVE
    return active and key.provider != options_pb2.PROVIDER_UNSPECIFIED


def no_key(provider: str, keys: Sequence[custody_pb2.ProviderKey], user: str = "") -> ByokeepError:
    """Return the refusal where no key is usable; `provider` and `user` may be empty."""
    for key in keys:
        states = {version.state for version in key.versions} | {key.state}
        if custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY in states:
            key_id = last_of(key.name)
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "KEY_NEEDS_REKEY",
                f"the provider rejected {key_id}: add a new version of it",
                key=key_id,
            )
    # Of several, the one that was added last.
    for key in sorted(keys, key=lambda key: key.name, reverse=True):
        if key.state == custody_pb2.KEY_VERSION_STATE_PENDING:
            key_id = last_of(key.name)
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_ACTIVE_KEY",
                f"{key_id} is PENDING until its provider says that it accepts it",
                provider=provider,
                key=key_id,
                state="PENDING",
            )
    error = ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_ACTIVE_KEY",
        f"no active {provider or 'provider'} key"
        + (f" of user {user}, whose reviews run on the user's own keys" if user else "")
        + ": add one",
        provider=provider,
    )
    if user:
        error.metadata["user"] = user
    return error


def validation_delay(attempts: int) -> float:
    """Return the seconds until a provider that could not be asked is asked again."""
    if attempts <= len(_VALIDATION_DELAYS):
        return _VALIDATION_DELAYS[attempts - 1] * _dice.uniform(0.9, 1.1)
    return 3600.0 * _dice.uniform(0.9, 1.1)


def action_of(verdict: Verdict) -> Action:
    """Return what keyvault is told after a verdict."""
    others = {Verdict.INVALID: Action.DESTROY, Verdict.UNREACHABLE: Action.NONE}
    return others.get(verdict, Action.PROMOTE)
