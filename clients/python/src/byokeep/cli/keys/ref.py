"""Finding the key that is meant: an id, a unique prefix of one, a name, or a provider."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from byokeep import names
from byokeep.cli.base import checked
from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import short
from byokeep.cli.base.session import Session, pages
from byokeep.cli.base.text import clean
from byokeep.common.v1.options_pb2 import Provider
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.key_pb2 import Key

_ID = re.compile(r"key_[0-9a-z]{26}")
_DESTROYED = {custody_pb2.KEY_VERSION_STATE_DESTROYED}
#: Owner of managed keys, which the operator of the deployment brings for a tenant.
OPERATOR = "+operator"
#: States that a key has no way back from.
ENDED = {custody_pb2.KEY_VERSION_STATE_REVOKED, *_DESTROYED}


def find_key(session: Session, reference: str, *, ending: bool = False) -> Key:
    """Return the key that a reference means. Raises CliError where it is none, or several: a key
    that has ended does not count beside a living one, unless one is to be ended, for then the same
    line, given again, would end another."""
    connection = session.connection
    reference = checked.last_part(reference, connection.tenant, "providerKeys")
    if _ID.fullmatch(reference):
        name = names.key_name(connection.tenant, reference)
        return connection.keys.GetKey(key_pb2.GetKeyRequest(name=name)).key
    keys = list_keys(session, show_destroyed=True)
    for matches in _tiers(reference):
        found = [key for key in keys if matches(key)]
        gone = _DESTROYED if ending else ENDED
        found = [key for key in found if key.provider_key.state not in gone] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise CliError(
                f"{len(found)} keys match: {_candidates(found)}",
                "give the id, or enough of its beginning",
                reason="KEY_AMBIGUOUS",
            )
    left = [key for key in keys if key.provider_key.state not in _DESTROYED]
    if not left:
        provider = reference if reference in names.PROVIDERS else "PROVIDER"
        raise CliError(
            f"tenant {connection.tenant} has no key", f"byokeep key add {provider}", reason="NO_KEY"
        )
    raise CliError(
        f"no key of tenant {connection.tenant} matches; the tenant has: {_candidates(left)}",
        "byokeep key list",
        reason="NO_KEY",
    )


def key_to_end(session: Session, reference: str) -> str:
    """Return the name of a key that is to be revoked or destroyed. A whole id is not looked up:
    what can't be shown must be ended all the same, and a change of the key in the meantime is no
    reason not to (so no etag goes with it)."""
    connection = session.connection
    known = checked.last_part(reference, connection.tenant, "providerKeys")
    if _ID.fullmatch(known):
        return names.key_name(connection.tenant, known)
    return find_key(session, reference, ending=True).provider_key.name


def called(session: Session, name: str) -> str:
    """Return how a key is called in a question: its id, and what it is where that can be shown."""
    label = ""
    with contextlib.suppress(grpc.RpcError):
        label = f" ({label_of(find_key(session, name))})"
    return names.last_of(name) + label


def list_keys(session: Session, *, show_destroyed: bool = False) -> list[Key]:
    """Return all keys of the tenant."""
    connection = session.connection
    request = key_pb2.ListKeysRequest(
        parent=connection.parent, page_size=500, show_destroyed=show_destroyed
    )
    return list(pages(connection.keys.ListKeys, request, "keys"))


def key_id(key: Key) -> str:
    """Return a key's id."""
    return names.last_of(key.provider_key.name)


def provider_of(key: Key) -> str:
    """Return `openai`, `anthropic` or `gemini`; `unknown` where keyvault's row names none."""
    provider = key.provider_key.provider
    return names.provider_id(provider) if provider in Provider.values()[1:] else "unknown"


def label_of(key: Key) -> str:
    """Return provider, name and owner: `openai default of ann`, `openai vendor, managed`."""
    kept = key.provider_key
    owner = f" of {clean(kept.owner)}" if kept.owner else ""
    owner = ", managed" if kept.owner == OPERATOR else owner
    return f"{provider_of(key)} {clean(kept.display_name)}{owner}"


def key_state(key: Key) -> str:
    """Return the short name of a key's state; `UNKNOWN` where keyvault's row has none."""
    return short(custody_pb2.KeyVersionState, key.provider_key.state) or "UNKNOWN"


def _tiers(reference: str) -> Sequence[Callable[[Key], bool]]:
    return (
        lambda key: bool(reference) and key_id(key).startswith(reference),
        lambda key: bool(reference) and key_id(key).removeprefix("key_").startswith(reference),
        lambda key: key.provider_key.display_name == reference,
        lambda key: provider_of(key) == reference,
    )


def _candidates(keys: Sequence[Key]) -> str:
    shown = [f"{key_id(key)} ({label_of(key)})" for key in keys]
    return ", ".join(shown[:10]) + (" …" if len(shown) > 10 else "")
