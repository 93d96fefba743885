"""Rules of custody: states of a key's versions, and their MAC. Pure."""

from __future__ import annotations

import datetime
import hashlib
import hmac
from dataclasses import dataclass, replace
from enum import IntEnum

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, custody_pb2
from byokeep.names import PROVIDERS, provider_value

from services.common.errors import ByokeepError

GRACE = datetime.timedelta(hours=24)


class State(IntEnum):
    """KeyVersionState, with the numbers of the proto."""

    #: Of a row that keyvault did not write: no state has this number, and no MAC covers it.
    UNSPECIFIED = custody_pb2.KEY_VERSION_STATE_UNSPECIFIED
    PENDING = custody_pb2.KEY_VERSION_STATE_PENDING
    ACTIVE = custody_pb2.KEY_VERSION_STATE_ACTIVE
    SUPERSEDED = custody_pb2.KEY_VERSION_STATE_SUPERSEDED
    NEEDS_REKEY = custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY
    REVOKED = custody_pb2.KEY_VERSION_STATE_REVOKED
    DESTROYED = custody_pb2.KEY_VERSION_STATE_DESTROYED


#: What each kind of event says the version's state is afterwards.
STATE_AFTER = {
    audit_pb2.AUDIT_EVENT_TYPE_STAGED: State.PENDING,
    audit_pb2.AUDIT_EVENT_TYPE_PROMOTED: State.ACTIVE,
    audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK: State.ACTIVE,
    audit_pb2.AUDIT_EVENT_TYPE_SUPERSEDED: State.SUPERSEDED,
    audit_pb2.AUDIT_EVENT_TYPE_REJECTED: State.NEEDS_REKEY,
    audit_pb2.AUDIT_EVENT_TYPE_REVOKED: State.REVOKED,
    audit_pb2.AUDIT_EVENT_TYPE_DESTROYED: State.DESTROYED,
}


#: What an event about all of a key, or all of a tenant's keys, says of each version.
WHOLE_AFTER = {
    audit_pb2.AUDIT_EVENT_TYPE_REVOKED: State.REVOKED,
    audit_pb2.AUDIT_EVENT_TYPE_DESTROYED: State.DESTROYED,
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED: State.DESTROYED,
}

# What is revoked may only be destroyed, and what is destroyed stays so.
_LAST = {State.REVOKED: (State.REVOKED, State.DESTROYED), State.DESTROYED: (State.DESTROYED,)}

#: In the place of a version: an event is about all of a key, or, without one, of a tenant; versions
#: of which the rows said nothing when it was written too.
WHOLE_KEY = 0

#: The event that gives a key its last state.
ENDED_BY = {
    State.REVOKED: audit_pb2.AUDIT_EVENT_TYPE_REVOKED,
    State.DESTROYED: audit_pb2.AUDIT_EVENT_TYPE_DESTROYED,
}

#: Whether an event holds a tenant's leases back, or lets them go again.
HELD_AFTER = {
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED: True,
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED: False,
}


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a key, as stored."""

    version: int
    state: State
    state_sequence: int
    state_mac: bytes
    hint: str
    kek_backend: str
    kek_version: int
    create_time: datetime.datetime
    state_time: datetime.datetime


@dataclass(frozen=True, slots=True)
class Key:
    """A key with its versions, oldest first."""

    tenant: str
    key_id: str
    provider: str
    owner: str
    display_name: str
    revision: int
    create_time: datetime.datetime
    versions: tuple[Version, ...]

    def etag(self) -> str:
        """Return what tells this state of the key from any other."""
        return str(self.revision)

    def current(self) -> Version:
        """Return the version that counts: the active one, else the newest that is not destroyed,
        else the one that was destroyed last."""
        active = [one for one in self.versions if one.state is State.ACTIVE]
        kept = [one for one in self.versions if one.state is not State.DESTROYED]
        last = sorted(self.versions, key=lambda one: one.state_sequence)
        return (active or kept or last)[-1]

    def version(self, number: int) -> Version:
        """Return one version. Raises ByokeepError: NOT_FOUND."""
        for one in self.versions:
            if one.version == number:
                return one
        raise not_found("key version")


@dataclass(frozen=True, slots=True)
class Change:
    """One event, and the version whose state it changes."""

    version: int
    event: audit_pb2.AuditEventType.ValueType


def may_become(before: int, after: State) -> bool:
    """Say whether a version may have a state after another; 0 is none."""
    return before not in _LAST or after in _LAST[State(before)]


def state_mac(mac_key: bytes, deployment: str, key: Key, version: Version) -> bytes:
    """Return the MAC of a version's state: SQL alone can't make one.

    It covers the chain's sequence number of the event that set the state, so that
    the row and the chain can be held against each other.
    """
    message = fields(
        "byokeep/state/v1",
        deployment,
        key.tenant,
        key.key_id,
        key.provider,
        key.owner,
        version.version,
        int(version.state),
        version.state_sequence,
    )
    return hmac.digest(mac_key, message, hashlib.sha256)


def check_state(mac_key: bytes, deployment: str, key: Key, version: Version) -> None:
    """Refuse a state whose MAC does not verify. Raises ByokeepError: STATE_TAMPERED."""
    if not authentic(mac_key, deployment, key, version):
        raise tampered(key.key_id)


def authentic(mac_key: bytes, deployment: str, key: Key, version: Version) -> bool:
    """Say whether the MAC of a version's state verifies."""
    return hmac.compare_digest(version.state_mac, state_mac(mac_key, deployment, key, version))


def tampered(key_id: str) -> ByokeepError:
    """Return the error for a state that keyvault did not write."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "STATE_TAMPERED",
        "the stored state of this key fails its authentication; it is not used",
        key=key_id,
    )


def row_tampered(what: str, key_id: str) -> ByokeepError:
    """Return the error for a row that does not open: altered, or moved from another place."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROW_TAMPERED",
        f"the stored {what} fails its authentication; it is not used",
        key=key_id,
    )


def check_etag(key: Key, etag: str) -> None:
    """Refuse a change of a key that changed since it was read. Raises: ETAG_MISMATCH."""
    if etag and etag != key.etag():
        raise ByokeepError(
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
            "it changed since it was read; read it again",
            field="etag",
        )


def id_conflict() -> ByokeepError:
    """Return the refusal of a request id that came before with other content."""
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_CONFLICT",
        "this request id came before with other content; use a new one",
        field="request_id",
    )


def with_state(version: Version, state: State, sequence: int) -> Version:
    """Return a version in another state, set by the event with a sequence number."""
    return replace(version, state=state, state_sequence=sequence)


def promote(key: Key, number: int, *, destroy_previous: bool) -> list[Change]:
    """Decide a promotion: the PENDING version becomes ACTIVE. Raises ByokeepError."""
    if key.version(number).state is State.ACTIVE:
        return []
    require(key.version(number), State.PENDING)
    changes = []
    for one in key.versions:
        if one.state is State.ACTIVE:
            changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_SUPERSEDED))
            if destroy_previous:
                changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED))
        # What was replaced before, or rejected, has no way back any more.
        elif one.state in (State.SUPERSEDED, State.NEEDS_REKEY):
            changes.append(Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED))
    return [*changes, Change(number, audit_pb2.AUDIT_EVENT_TYPE_PROMOTED)]


def roll_back(key: Key, now: datetime.datetime) -> list[Change]:
    """Decide a rollback to the SUPERSEDED version. Raises ByokeepError."""
    previous = [one for one in key.versions if one.state is State.SUPERSEDED]
    if not previous or now - previous[-1].state_time > GRACE:
        raise wrong_state(key.current().state, "no superseded version is within its grace of 24 h")
    changes = [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if one.state in (State.PENDING, State.ACTIVE, State.NEEDS_REKEY)
    ]
    return [*changes, Change(previous[-1].version, audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK)]


def end(key: Key, after: State) -> list[Change]:
    """Decide that every version becomes REVOKED or DESTROYED that is neither that nor more."""
    return [
        Change(one.version, ENDED_BY[after])
        for one in key.versions
        if one.state not in (after, State.DESTROYED)
    ]


def destroy_version(key: Key, number: int) -> list[Change]:
    """Decide the destruction of one version that is not ACTIVE. Raises ByokeepError."""
    version = key.version(number)
    if version.state is State.ACTIVE:
        raise wrong_state(version.state, "the active version is destroyed only with its key")
    if version.state is State.DESTROYED:
        return []
    return [Change(number, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)]


def stage_over(key: Key) -> list[Change]:
    """Decide what a new version does to the ones before: an older PENDING one is destroyed."""
    state = key.current().state
    if state is State.DESTROYED:
        raise wrong_state(state, "it is gone for good, and its name is free for a new one")
    if state is State.REVOKED:
        raise wrong_state(state, "it is gone for good; destroying it frees its name for a new one")
    return [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if one.state is State.PENDING
    ]


def expired(key: Key, now: datetime.datetime) -> list[Change]:
    """Decide which superseded versions are past their grace."""
    return [
        Change(one.version, audit_pb2.AUDIT_EVENT_TYPE_DESTROYED)
        for one in key.versions
        if one.state is State.SUPERSEDED and now - one.state_time > GRACE
    ]


def provider_of(stored: str) -> options_pb2.Provider.ValueType:
    """Return a stored provider; UNSPECIFIED where it is hidden, or forged to what there is not."""
    return provider_value(stored) if stored in PROVIDERS else options_pb2.PROVIDER_UNSPECIFIED


def require(version: Version, state: State) -> None:
    """Refuse a version that is in another state. Raises ByokeepError: WRONG_STATE."""
    if version.state is not state:
        raise wrong_state(version.state, f"it must be {state.name}")


def wrong_state(state: State, sentence: str) -> ByokeepError:
    """Return the error for a version whose state does not allow what was asked."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_STATE",
        f"the key version is {state.name}: {sentence}",
        state=state.name,
    )


def not_found(resource: str) -> ByokeepError:
    """Return the error for what is not there, or not the caller's."""
    return ByokeepError(
        grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"no such {resource}", resource=resource
    )
