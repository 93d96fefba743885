"""What a provider said of a key, followed while it is asked."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.output import message_dict, short, when
from byokeep.cli.base.session import Session
from byokeep.cli.base.text import clean, count
from byokeep.cli.keys.ref import key_id, key_state, provider_of
from byokeep.orchestrator.v1 import key_pb2

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.key_pb2 import Key

_GOOD = {
    "VALID": "the provider accepts it",
    "RESTRICTED": "the provider accepts it, but may not list models: which it can use is unknown",
    "QUOTA_EXHAUSTED": "the provider accepts it, but its quota or credit is gone",
}
_UNREACHABLE = {
    "NAME_RESOLUTION": "the provider's name does not resolve",
    "CONNECT": "no connection to the provider",
    "TLS": "the TLS handshake with the provider failed",
    "TIMEOUT": "the provider did not answer in time",
}


def verdict_of(key: Key) -> str:
    """Return the short name of the verdict; empty where there is none yet."""
    return short(key_pb2.ValidationVerdict, key.validation.verdict)


def unreachable_part(key: Key) -> str:
    """Return what was unreachable, in words; empty where that is not known."""
    return _UNREACHABLE.get(short(key_pb2.UnreachableCause, key.validation.unreachable_cause), "")


def serving_verdict(key: Key) -> str:
    """Return the verdict on the version that serves; empty where only another one has been
    asked for. Without an ACTIVE version, the verdict on the newest."""
    active = key.provider_key.active_version
    return "" if active and active != key.validation.version else verdict_of(key)


def follow(session: Session, key: Key, wait: float) -> None:
    """Show a key's validation as it goes on, and end as its verdict says; at once where nobody
    waits for it.

    Raises:
        CliError: the provider rejected it, could not be asked, or was not asked in time.
    """
    out = session.out
    hint = clean(key.provider_key.versions[-1].hint) if key.provider_key.versions else ""
    what = f"{provider_of(key)} {clean(key.provider_key.display_name)} {hint}".rstrip()
    if not out.as_json:
        out.print(f"sealed and stored: {key_id(key)} ({what})")
    if not wait:
        if out.as_json:
            out.json_line(message_dict(key))
        out.note(f"its provider will be asked; what it says: byokeep key show {key_id(key)}")
        return
    _conclude(session, *_watch(session, key, wait))


def follow_check(session: Session, key: Key, wait: float) -> None:
    """Show a check of a key as it goes on, and end as the provider says.

    Raises:
        CliError: the provider rejects it, could not be asked, or was not asked in time.
    """
    out, reference = session.out, key_id(key)
    if not wait:
        if out.as_json:
            out.json_line(message_dict(key))
        out.note(f"its provider is being asked; what it says: byokeep key show {reference}")
        return
    key, done = _watch(session, key, wait)
    verdict = verdict_of(key)
    if verdict == "INVALID":
        raise CliError(
            f"the provider rejects this key; {reference} is {key_state(key)}",
            f"byokeep key rotate {reference}",
            Exit.KEY,
            "KEY_REJECTED",
        )
    if not done or key.check.failure:
        cause = short(key_pb2.UnreachableCause, key.check.unreachable_cause)
        raise CliError(
            f"{_UNREACHABLE.get(cause, 'the provider could not be asked now')};"
            f" {reference} is {key_state(key)} as before",
            f"byokeep key check {reference}",
            Exit.UNAVAILABLE,
            "KEY_UNCHECKED",
        )
    if not out.as_json:
        known = len(key.validation.models)
        models = f"; it can use {count(known, 'model')}: byokeep model list" if known else ""
        out.print(f"{verdict}: {_GOOD.get(verdict, '')}; {reference} is {key_state(key)}{models}")


def _watch(session: Session, key: Key, wait: float) -> tuple[Key, bool]:
    """Return a key as it is once its provider was asked, and whether it was in time."""
    from byokeep.errors import WatchTimeoutError

    out, done = session.out, False
    with (
        out.progress(f"asking {provider_of(key)} whether it works …"),
        contextlib.suppress(WatchTimeoutError),
    ):
        for answer in session.connection.watch_key(key.provider_key.name, wait):
            key, done = answer.key, answer.done
            if out.as_json:
                out.json_line(message_dict(key))
    return key, done


def _conclude(session: Session, key: Key, done: bool) -> None:
    verdict, reference = verdict_of(key), key_id(key)
    if verdict in _GOOD and done:
        if session.out.as_json:
            return
        session.out.print(f"{verdict}: {_GOOD[verdict]}; {reference} is {key_state(key)}")
        if verdict == "QUOTA_EXHAUSTED":
            session.out.warn("reviews will fail until the provider's quota is raised or paid for")
        return
    if verdict == "INVALID":
        serves = "; the version before still serves" if key_state(key) == "ACTIVE" else ""
        raise CliError(
            f"the provider rejects this key; it was destroyed here{serves}",
            "check it at the provider, then run the command again with the right one",
            Exit.KEY,
            "KEY_REJECTED",
        )
    again = when(key.validation.retry_time)
    raise CliError(
        (unreachable_part(key) or "the provider could not be asked yet")
        + "; the key is stored and stays PENDING"
        + (f", next try at {again}" if again else ""),
        f"byokeep key show {reference}; byokeep doctor says whether the tenant gets leases",
        Exit.UNAVAILABLE,
        "KEY_UNVALIDATED",
    )
