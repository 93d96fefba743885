"""Custody: every change of a key's state, as one change of its tenant; and what is read of keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Final

from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, state_pb2
from byokeep.names import provider_value

from services.common.errors import ByokeepError
from services.keyvault import kek, lifecycle
from services.keyvault.event import SYSTEM, Head
from services.keyvault.ledger import ALL, Ledger, Tenant, end_leases, part_of
from services.keyvault.lifecycle import Change, State, stale
from services.keyvault.log import Log

_REMEMBERED: Final = 16
#: The deployment's own row names at most so many ends of damaged tenants' keys.
_MOST_OWED: Final = 10_000
_GONE: Final = (State.REVOKED, State.DESTROYED)
#: Why nothing of a tenant's row may be believed.
DAMAGED: Final = ("STATE_TAMPERED", "ROLLED_BACK")
Key = state_pb2.KeyState
Decide = Callable[[Key, Tenant], list[Change]]


@dataclass(frozen=True, slots=True)
class Origin:
    """Who caused a change: the caller's identity, and on whose behalf it says."""

    caller: str
    actor: str


@dataclass(frozen=True, slots=True)
class Request:
    """A change that was asked for: which method, its id, a digest of its content, the etag read
    ("": any)."""

    method: str
    request_id: str
    digest: bytes
    etag: str

    def past(self, version: int = 0) -> state_pb2.PastRequest:
        """Return what is kept of it once it is done."""
        name = hashlib.sha256(fields(self.method, self.request_id)).digest()
        return state_pb2.PastRequest(id=name[:16], content=self.digest[:16], version=version)


class Custody:
    """Changes and reads keys (see the module)."""

    def __init__(self, ledger: Ledger, log: Log, backends: kek.Backends) -> None:
        """Keep keys in a ledger."""
        self._ledger = ledger
        self._log = log
        self._backends = backends

    async def change(
        self, tenant: str, key_id: str, origin: Origin, decide: Decide, request: Request
    ) -> Key:
        """Apply what `decide` says to a key; return the key, once that can't be forgotten any more.
        A request that was carried out before changes nothing more.

        Raises:
            ByokeepError: NOT_FOUND, STATE_TAMPERED, ROLLED_BACK, REQUEST_ID_CONFLICT,
                ETAG_MISMATCH, AUDIT_UNAVAILABLE, or what `decide` raises.
        """

        def act(found: Tenant) -> Key:
            key = _there(found, key_id)
            if done_before(key.requests, request) is None:
                lifecycle.check_etag(key, request.etag)
                if changes := decide(key, found):
                    apply(found, key_id, changes, origin, self._backends)
                    remember(found.edit_key(key_id).requests, request.past())
            return _there(found, key_id)

        key, head = await self._changed(tenant, key_id, act)
        await self._log.anchored(tenant, head)
        return key

    async def end(
        self, tenant: str, key_id: str, origin: Origin, request: Request, after: State
    ) -> Key:
        """Revoke or destroy a key with all its versions. It is said as often as it is asked, also
        where it was so before.

        Raises:
            ByokeepError: as `change`. Where the tenant's row is damaged, the end is kept in the
                deployment's own row and carried out once the tenant's is whole: no lease before.
        """

        def act(found: Tenant) -> Key:
            key = _there(found, key_id)
            if done_before(key.requests, request) is None:
                lifecycle.check_etag(key, request.etag)
                remember(found.edit_key(key_id).requests, request.past())
            finish(found, key_id, origin, self._backends, after)
            return _there(found, key_id)

        try:
            key, head = await self._changed(tenant, key_id, act)
        except ByokeepError as error:
            if error.reason in DAMAGED:
                await self._owe(tenant, key_id, origin, after)
            raise
        await self._log.anchored(tenant, head)
        return key

    async def get(self, tenant: str, key_id: str) -> Key:
        """Return a key. Raises ByokeepError: NOT_FOUND, STATE_TAMPERED, ROLLED_BACK."""
        try:
            return _there(await self._ledger.read(tenant, {part_of(key_id)}), key_id)
        except ByokeepError as error:
            raise _no_key(error) from None

    async def page(self, tenant: str, after: str, limit: int, *, destroyed: bool) -> list[Key]:
        """Return up to `limit` keys whose id is above `after`, by id."""
        try:
            found = await self._ledger.read(tenant, ALL)
        except ByokeepError as error:
            if error.reason == "TENANT_KEY_MISSING":
                return []
            raise
        keys = (key for key in found.every_key() if key.key_id > after)
        return [key for key in keys if destroyed or lifecycle.lives(key)][:limit]

    async def _changed(
        self, tenant: str, key_id: str, act: Callable[[Tenant], Key]
    ) -> tuple[Key, Head]:
        try:
            return await self._ledger.change(tenant, act, {part_of(key_id)})
        except ByokeepError as error:
            raise _no_key(error) from None

    async def _owe(self, tenant: str, key_id: str, origin: Origin, after: State) -> None:
        owed = state_pb2.OwedEnd(tenant=tenant, key_id=key_id, state=after.value)

        def note(system: Tenant) -> None:
            if owed not in system.state.owed:
                if len(system.state.owed) >= _MOST_OWED:
                    raise stale("extended")
                system.edit().owed.append(owed)
            event = _whole(key_id, after, origin)
            event.detail = tenant
            system.events.append(event)

        _, head = await self._ledger.change(SYSTEM, note)
        await self._log.anchored(SYSTEM, head)


def apply(
    tenant: Tenant, key_id: str, changes: list[Change], origin: Origin, backends: kek.Backends
) -> None:
    """Apply changes to a key of a tenant that is being changed: states, events, and what follows
    for leases and ciphertext."""
    key = tenant.edit_key(key_id)
    key.revision += 1
    for change in changes:
        version = lifecycle.version_of(key, change.version)
        event = audit_pb2.AuditEvent(
            type=change.event,
            key_id=key_id,
            key_version=change.version,
            provider=provider_value(key.provider),
            owner=key.owner,
            caller=origin.caller,
            actor=origin.actor,
        )
        version.state = lifecycle.STATE_AFTER[change.event].value
        version.state_time = int(tenant.now.timestamp())
        version.state_sequence = tenant.next_sequence
        if lifecycle.state_of(version) is State.DESTROYED:
            event.shred = backends.shred_of(version.kek_backend)
            if not tenant.state.owed_since:
                tenant.edit().owed_since = int(tenant.now.timestamp())
            version.secret_digest = b""
            version.unopened_time, version.unopened_reason = 0, ""
            tenant.dropped.add((tenant.name, key_id, change.version))
        tenant.events.append(event)
    gone = {one.version for one in changes if lifecycle.STATE_AFTER[one.event] in _GONE}
    if gone:
        end_leases(tenant, key_id, gone)


def finish(
    tenant: Tenant, key_id: str, origin: Origin, backends: kek.Backends, after: State
) -> None:
    """Revoke or destroy all of a key of a tenant that is being changed, and end its leases."""
    tenant.events.append(_whole(key_id, after, origin))
    key = _there(tenant, key_id)
    if changes := lifecycle.end(key, after):
        apply(tenant, key_id, changes, origin, backends)
    end_leases(tenant, key_id)
    if after is State.DESTROYED:
        # Also what somebody put back.
        tenant.dropped |= {(tenant.name, key_id, one.version) for one in key.versions}


def done_before(
    requests: Sequence[state_pb2.PastRequest], request: Request
) -> state_pb2.PastRequest | None:
    """Return what is kept of a request that was carried out before. Raises ByokeepError:
    REQUEST_ID_CONFLICT where it was of other content."""
    past = request.past()
    for one in requests:
        if one.id == past.id:
            if one.content != past.content:
                raise lifecycle.id_conflict()
            return one
    return None


def remember(requests: MutableSequence[state_pb2.PastRequest], past: state_pb2.PastRequest) -> None:
    """Keep a request with those before it; the oldest is forgotten."""
    requests.append(past)
    del requests[:-_REMEMBERED]


def _whole(key_id: str, after: State, origin: Origin) -> audit_pb2.AuditEvent:
    """Return the event that all of a key is revoked or destroyed."""
    return audit_pb2.AuditEvent(
        type=lifecycle.ENDED_BY[after],
        key_id=key_id,
        key_version=lifecycle.WHOLE_KEY,
        caller=origin.caller,
        actor=origin.actor,
    )


def _there(tenant: Tenant, key_id: str) -> Key:
    key = tenant.key(key_id)
    if key is None:
        raise lifecycle.not_found("provider key")
    return key


def _no_key(error: ByokeepError) -> ByokeepError:
    """A tenant that there is not has no such key."""
    return lifecycle.not_found("provider key") if error.reason == "TENANT_KEY_MISSING" else error
