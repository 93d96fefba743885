"""Rules of custody: what a tenant, its keys and their versions may become. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import grpc
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, state_pb2

from services.common.errors import ByokeepError

GRACE: Final = datetime.timedelta(hours=24)
#: A tenant has at most so many keys that are not destroyed.
MOST_KEYS: Final = 10_000
#: In the place of a KEK's version: the KEK as a whole.
WHOLE: Final = 2**31 - 1
#: In the place of a key's version: the key as a whole.
WHOLE_KEY: Final = 0
#: A lease that nobody released is over so long after its end.
OVERDUE_SECONDS: Final = 5
#: A version that did not open is tried again after so long.
RETRY_SECONDS: Final = 86_400
NEVER: Final = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC)


class State(IntEnum):
    """KeyVersionState, with the numbers of the proto."""

    PENDING = custody_pb2.KEY_VERSION_STATE_PENDING
    ACTIVE = custody_pb2.KEY_VERSION_STATE_ACTIVE
    SUPERSEDED = custody_pb2.KEY_VERSION_STATE_SUPERSEDED
    NEEDS_REKEY = custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY
    REVOKED = custody_pb2.KEY_VERSION_STATE_REVOKED
    DESTROYED = custody_pb2.KEY_VERSION_STATE_DESTROYED


#: What each kind of event says the version's state is afterwards.
STATE_AFTER: Final = {
    audit_pb2.AUDIT_EVENT_TYPE_STAGED: State.PENDING,
    audit_pb2.AUDIT_EVENT_TYPE_PROMOTED: State.ACTIVE,
    audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK: State.ACTIVE,
    audit_pb2.AUDIT_EVENT_TYPE_SUPERSEDED: State.SUPERSEDED,
    audit_pb2.AUDIT_EVENT_TYPE_REJECTED: State.NEEDS_REKEY,
    audit_pb2.AUDIT_EVENT_TYPE_REVOKED: State.REVOKED,
    audit_pb2.AUDIT_EVENT_TYPE_DESTROYED: State.DESTROYED,
}
#: The event that gives a version its last state.
ENDED_BY: Final = {
    State.REVOKED: audit_pb2.AUDIT_EVENT_TYPE_REVOKED,
    State.DESTROYED: audit_pb2.AUDIT_EVENT_TYPE_DESTROYED,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One event, and the version whose state it changes."""

    version: int
    event: audit_pb2.AuditEventType.ValueType


# What is read of a key.


def state_of(version: state_pb2.VersionState) -> State:
    """Return a version's state."""
    return State(version.state)


def version_of(key: state_pb2.KeyState, number: int) -> state_pb2.VersionState:
    """Return one version. Raises ByokeepError: NOT_FOUND."""
    for one in key.versions:
        if one.version == number:
            return one
    raise not_found("key version")


def current(key: state_pb2.KeyState) -> state_pb2.VersionState:
    """Return the version that counts: the active one, else the newest that is not destroyed, else
    the one that was destroyed last."""
    active = [one for one in key.versions if state_of(one) is State.ACTIVE]
    kept = [one for one in key.versions if state_of(one) is not State.DESTROYED]
    last = sorted(key.versions, key=lambda one: one.state_sequence)
    return (active or kept or last)[-1]


def etag(key: state_pb2.KeyState) -> str:
    """Return what tells this state of the key from any other."""
    return str(key.revision)


def check_etag(key: state_pb2.KeyState, wanted: str) -> None:
    """Refuse to change a key that changed since it was read. Raises ByokeepError: ETAG_MISMATCH."""
    if wanted and wanted != etag(key):
        raise ByokeepError(
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
            "it changed since it was read; read it again",
            field="etag",
        )


def lives(key: state_pb2.KeyState) -> bool:
    """Say whether a key has a version that is not destroyed."""
    return any(state_of(one) is not State.DESTROYED for one in key.versions)


# What a key may become.


def promote(key: state_pb2.KeyState, number: int, *, destroy_previous: bool) -> list[Change]:
    """Decide a promotion: the PENDING version becomes ACTIVE. Raises ByokeepError."""
    state = state_of(version_of(key, number))
    if state is State.ACTIVE:
        return []
    if state is not State.PENDING:
        raise wrong_state(state, "it must be PENDING")
    changes = []
    for one in key.versions:
        if state_of(one) is State.ACTIVE:
            changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_SUPERSEDED))
            if destroy_previous:
                changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED))
        # What was replaced before, or rejected, has no way back any more.
        elif state_of(one) in (State.SUPERSEDED, State.NEEDS_REKEY):
            changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED))
    return [*changes, Change(number, audit_pb2.AUDIT_EVENT_TYPE_PROMOTED)]


def roll_back(key: state_pb2.KeyState, now: datetime.datetime) -> list[Change]:
    """Decide a rollback to the SUPERSEDED version. Raises ByokeepError."""
    previous = [one for one in key.versions if state_of(one) is State.SUPERSEDED]
    if not previous or _grace_end(previous[-1]) < now.timestamp():
        sentence = "no superseded version is within its grace of 24 h"
        raise wrong_state(state_of(current(key)), sentence)
    changes = [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if state_of(one) in (State.PENDING, State.ACTIVE, State.NEEDS_REKEY)
    ]
    return [*changes, Change(previous[-1].version, audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK)]


def end(key: state_pb2.KeyState, after: State) -> list[Change]:
    """Decide that every version becomes REVOKED or DESTROYED that is neither that nor more."""
    return [
        Change(one.version, ENDED_BY[after])
        for one in key.versions
        if state_of(one) not in (after, State.DESTROYED)
    ]


def destroy_version(key: state_pb2.KeyState, number: int) -> list[Change]:
    """Decide the destruction of one version that is not ACTIVE. Raises ByokeepError."""
    state = state_of(version_of(key, number))
    if state is State.ACTIVE:
        raise wrong_state(state, "the active version is destroyed only with its key")
    if state is State.DESTROYED:
        return []
    return [Change(number, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)]


def stage_over(key: state_pb2.KeyState) -> list[Change]:
    """Decide what a new version does to the ones before: an older PENDING one is destroyed."""
    state = state_of(current(key))
    if state is State.DESTROYED:
        raise wrong_state(state, "it is gone for good, and its name is free for a new one")
    if state is State.REVOKED:
        raise wrong_state(state, "it is gone for good; destroying it frees its name for a new one")
    return [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if state_of(one) is State.PENDING
    ]


def expired(key: state_pb2.KeyState, now: datetime.datetime) -> list[Change]:
    """Decide which superseded versions are past their grace."""
    return [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if state_of(one) is State.SUPERSEDED and _grace_end(one) < now.timestamp()
    ]


def _grace_end(version: state_pb2.VersionState) -> int:
    return version.state_time + int(GRACE.total_seconds())


# What a tenant is, and what is to be done about it.


def kek_of(state: state_pb2.TenantState, backend: str) -> state_pb2.KekState:
    """Return the tenant's KEK in a backend; one of version 0 where it never had one there."""
    found = [one for one in state.keks if one.backend == backend]
    return found[0] if found else state_pb2.KekState(backend=backend)


def edit_kek(state: state_pb2.TenantState, backend: str) -> state_pb2.KekState:
    """Return the tenant's KEK in a backend, to be changed; it is added where there is none."""
    found = [one for one in state.keks if one.backend == backend]
    return found[0] if found else state.keks.add(backend=backend)


def may_store(state: state_pb2.TenantState, backend: str, kek_version: int) -> bool:
    """Say whether a data key that a KEK's version wraps may be stored: not where that version is
    destroyed soon, or was."""
    kek = kek_of(state, backend)
    return kek_version >= max(kek.trimming, kek.trimmed)


def summary(number: int, part: state_pb2.PartState, digest: bytes) -> state_pb2.PartSummary:
    """Return what stands in a part."""
    made = state_pb2.PartSummary(part=number, digest=digest)
    holdings: dict[str, state_pb2.Holding] = {}
    for key in part.keys:
        made.keys += lives(key)
        for one in key.versions:
            state = state_of(one)
            holding = holdings.get(one.kek_backend)
            if holding is None:
                holding = holdings[one.kek_backend] = made.holdings.add(backend=one.kek_backend)
            if state is State.DESTROYED:
                holding.destroyed = max(holding.destroyed, one.kek_version)
                continue
            holding.living += 1
            holding.unopened += one.unopened_time > 0
            holding.oldest = min(holding.oldest or WHOLE, one.kek_version)
            holding.newest = max(holding.newest, one.kek_version)
            if state is State.SUPERSEDED:
                made.grace_end = min(made.grace_end or _grace_end(one), _grace_end(one))
    return made


def holdings(state: state_pb2.TenantState) -> Iterator[state_pb2.Holding]:
    """Yield what wraps the versions of each part."""
    for part in state.parts:
        yield from part.holdings


def at_target(state: state_pb2.TenantState, version: state_pb2.VersionState) -> bool:
    """Say whether a living version is wrapped as the tenant's are to be."""
    return version.kek_backend == state.target_backend and (
        version.kek_version >= state.target_version
    )


def left_of(state: state_pb2.TenantState, part: state_pb2.PartSummary) -> int:
    """Return how many living versions of a part are in backends of which some are to be wrapped
    again."""
    return sum(
        one.living
        for one in part.holdings
        if one.backend != state.target_backend or one.oldest < state.target_version
    )


def left(state: state_pb2.TenantState) -> bool:
    """Say whether living versions are to be wrapped again."""
    return bool(state.target_backend) and any(left_of(state, part) for part in state.parts)


def blocked(state: state_pb2.TenantState) -> bool:
    """Say whether some version did not open when it was last tried."""
    return any(one.unopened for one in holdings(state))


def owed(state: state_pb2.TenantState) -> dict[str, int]:
    """Return, by backend, the newest KEK version under which destroyed data keys can be opened."""
    found: dict[str, int] = {}
    for one in holdings(state):
        if one.destroyed and one.destroyed >= kek_of(state, one.backend).trimmed:
            found[one.backend] = max(found.get(one.backend, 0), one.destroyed)
    return found


def untrimmed(state: state_pb2.TenantState) -> list[state_pb2.KekState]:
    """Return the tenant's KEKs of which something is to be destroyed."""
    if not state.shredded and not state.trim:
        return []
    return [kek for kek in state.keks if kek.trimmed < minimum(state, kek)]


def minimum(state: state_pb2.TenantState, kek: state_pb2.KekState) -> int:
    """Return below which version a KEK is to be destroyed once nothing is left there."""
    if state.shredded or kek.backend != state.target_backend:
        return WHOLE
    return state.target_version


def due(
    state: state_pb2.TenantState,
    usage: state_pb2.TenantUsage,
    now: datetime.datetime,
    shred_after: float,
) -> datetime.datetime:
    """Return when something is to be done about a tenant; `shred_after` is in seconds."""
    times = (
        [min(one.expire_millis for one in usage.leases) / 1_000 + OVERDUE_SECONDS]
        if usage.leases
        else []
    )
    times += [part.grace_end + 1 for part in state.parts if part.grace_end]
    if not state.shredded and owed(state):
        times.append(state.owed_since + shred_after)
    if untrimmed(state) or (left(state) and not state.shredded):
        times.append(now.timestamp() + (RETRY_SECONDS if blocked(state) else 0))
    return datetime.datetime.fromtimestamp(min(times), datetime.UTC) if times else NEVER


# What is said where something is not so.


def not_found(resource: str) -> ByokeepError:
    """Return the error for what is not there, or not the caller's."""
    return ByokeepError(
        grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"no such {resource}", resource=resource
    )


def wrong_state(state: State, sentence: str) -> ByokeepError:
    """Return the error for a version whose state does not allow what was asked."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_STATE",
        f"the key version is {state.name}: {sentence}",
        state=state.name,
    )


def id_conflict() -> ByokeepError:
    """Return the refusal of a request id that came before with other content."""
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_CONFLICT",
        "this request id came before with other content; use a new one",
        field="request_id",
    )


def tampered(tenant: str) -> ByokeepError:
    """Return the error for a tenant of which something is stored that keyvault did not write."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "STATE_TAMPERED",
        "what is stored of this tenant fails its authentication, or is not all there; nothing of"
        " it is used while that lasts",
        tenant=tenant,
    )


def rolled_back(tenant: str) -> ByokeepError:
    """Return the error for a tenant of which an older state was put back, or another past."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROLLED_BACK",
        "what is stored of this tenant is older than what keyvault knows of it, or of another past;"
        " nothing of it is used while that lasts",
        tenant=tenant,
    )


def row_tampered(what: str, key_id: str) -> ByokeepError:
    """Return the error for a row that does not open: altered, or moved from another place."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROW_TAMPERED",
        f"the stored {what} fails its authentication; it is not used",
        key=key_id,
    )


def tenant_key_missing(tenant: str) -> ByokeepError:
    """Return the error for a tenant that has no row, or no key-encryption key (any more)."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "TENANT_KEY_MISSING",
        f"tenant {tenant} has no key-encryption key; an operator creates it; a tenant that was"
        " deleted needs a new name",
        tenant=tenant,
    )


def stale(what: str) -> ByokeepError:
    """Return the error for a log that could not be looked at, or written, in time."""
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        "AUDIT_UNAVAILABLE",
        f"keyvault's audit log could not be {what}; nothing was released; try again, with the same"
        " request id",
        retry_after_seconds=2.0,
    )


def find(keys: Iterable[state_pb2.KeyState], key_id: str) -> state_pb2.KeyState | None:
    """Return the key of an id."""
    return next((key for key in keys if key.key_id == key_id), None)
