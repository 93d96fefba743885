"""Custody: every change of a key's state.

Each change is one transaction under the lock of the tenant's chain: rows, MACs,
audit events and the request's id together, or nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, lease_pb2
from byokeep.names import provider_value

from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain, domain, kek
from services.keyvault.database import Connection, Database, Row, aside
from services.keyvault.differences import mismatch
from services.keyvault.domain import WHOLE_KEY, Change, Key, State, Version
from services.keyvault.reconcile import Reconcile
from services.keyvault.rotation import queue_sweep
from services.keyvault.store import changes as change_store
from services.keyvault.store import keys as store
from services.keyvault.store import leases as lease_store

Decide = Callable[[Key, chain.Head], list[Change]]
_GONE = (State.REVOKED, State.DESTROYED)


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


class Custody:
    """Keeps keys (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        reconcile: Reconcile,
        mac_key: bytes,
        deployment: str,
        shred_after_seconds: int,
    ) -> None:
        """Keep keys in a database."""
        self._database = database
        self._backends = backends
        self._reconcile = reconcile
        self._mac_key = mac_key
        self._deployment = deployment
        self._shred_after = datetime.timedelta(seconds=shred_after_seconds)

    async def change(
        self,
        tenant: str,
        key_id: str,
        origin: Origin,
        decide: Decide,
        request: Request | None = None,
        *,
        trusting: bool = True,
    ) -> Key:
        """Apply what `decide` says to a key, as one transaction; return the key.

        A request that was carried out before changes nothing more. A change that does not trust
        lets no forged version keep it from being made, and is made however often it is asked.

        Raises:
            ByokeepError: NOT_FOUND, STATE_TAMPERED, REQUEST_ID_CONFLICT, ETAG_MISMATCH, what
                `decide` raises, and RECONCILE_MISMATCH where a version would be made ACTIVE whose
                row is older than its chain, or of whose tenant the chain was altered.
        """

        async def act(connection: Connection) -> None:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            key = await self._there(connection, tenant, key_id)
            if trusting:
                self.check(key)
            else:
                key = self._feared(key)
            if request is None or await self._first_time(connection, key, request) or not trusting:
                await self.apply(connection, head, key, decide(key, head), origin)

        await self._found(tenant, act)
        return await self.get(tenant, key_id)

    async def revoke(
        self, tenant: str, key_id: str, origin: Origin, request: Request | None = None
    ) -> Key:
        """Revoke a key, as `destroy` destroys one. Raises ByokeepError: as `destroy`."""

        async def act(connection: Connection) -> None:
            await self._end(connection, tenant, key_id, origin, request, State.REVOKED)

        await self._found(tenant, act)
        return await self.get(tenant, key_id)

    async def destroy(
        self, tenant: str, key_id: str, origin: Origin, request: Request | None = None
    ) -> Key:
        """Destroy a key, one whose rows were forged or hidden too: else a forger could keep it
        alive. Its chain says that all of it is destroyed, whatever rows come back.

        Raises:
            ByokeepError: NOT_FOUND (once it is done, where only its chain knew of the key),
                REQUEST_ID_CONFLICT, ETAG_MISMATCH.
        """

        async def act(connection: Connection) -> None:
            ended = await self._end(connection, tenant, key_id, origin, request, State.DESTROYED)
            if await store.erase(connection, tenant, key_id) or ended:
                await queue_sweep(connection, tenant, self._shred_after)

        await self._found(tenant, act)
        return await self.get(tenant, key_id)

    async def _end(
        self,
        connection: Connection,
        tenant: str,
        key_id: str,
        origin: Origin,
        request: Request | None,
        after: State,
    ) -> bool:
        """Give every version of a key its last state, also those of which no row tells now, and end
        their leases; False where all of that was so before. Raises ByokeepError: NOT_FOUND."""
        head = await chain.lock(connection, chain.tenant_chain(tenant))
        key = await self.stored(connection, tenant, key_id)
        first = True
        if key is not None and request is not None:
            first = await self._first_time(connection, key, request)
        key = None if key is None else self._feared(key)
        changes = [] if key is None else domain.end(key, after)
        if key is None and not self._reconcile.told(tenant, key_id, 1).known:
            raise domain.not_found("provider key")
        whole = self._reconcile.told(tenant, key_id, WHOLE_KEY).whole
        # What was asked for before has its event, also where that was not followed yet.
        ended = bool(changes) or (first and whole not in (after, State.DESTROYED))
        if ended:
            event = _whole(key_id, after, origin)
            if key is None:
                await chain.append(connection, head, self._deployment, [event])
            else:
                await self.apply(connection, head, key, changes, origin, (event,))
        await end_leases(connection, tenant, key_id)
        return ended

    async def _found(self, tenant: str, act: Callable[[Connection], Awaitable[None]]) -> None:
        """Act in a transaction; where nothing is found, once more after the chain was followed to
        its head: it may tell of what was hidden."""
        try:
            async with self._database.transaction() as connection:
                return await act(connection)
        except ByokeepError as error:
            if error.reason != "NOT_FOUND":
                raise
        await self._reconcile.follow(chain.tenant_chain(tenant))
        async with self._database.transaction() as connection:
            await act(connection)

    async def destroy_version(
        self, tenant: str, key_id: str, version: int, origin: Origin, request: Request
    ) -> Key:
        """Destroy one version that is not ACTIVE, also where its row was forged.

        Raises:
            ByokeepError: NOT_FOUND, WRONG_STATE, REQUEST_ID_CONFLICT; STATE_TAMPERED, once it is
                done, where another version's row was forged.
        """

        def decide(key: Key, _: chain.Head) -> list[Change]:
            return domain.destroy_version(key, version)

        return await self.change(tenant, key_id, origin, decide, request, trusting=False)

    async def apply(
        self,
        connection: Connection,
        head: chain.Head,
        key: Key,
        changes: list[Change],
        origin: Origin,
        before: tuple[audit_pb2.AuditEvent, ...] = (),
    ) -> None:
        """Write changes, their events (after those `before`), and what follows for leases."""
        events = list(before)
        versions = {one.version: one for one in key.versions}
        for change in changes:
            version = versions[change.version]
            if domain.STATE_AFTER[change.event] is State.ACTIVE:
                self._reconcile.check_chain(key.tenant)
                told = self._reconcile.told(key.tenant, key.key_id, change.version)
                gone = told.frozen or told.over(version.state_sequence) is not None
                if gone or told.outdated(version.state, version.state_sequence):
                    raise mismatch(key.key_id)
            events.append(self.event(key, change, origin))
            version = domain.with_state(
                version, domain.STATE_AFTER[change.event], head.sequence + len(events)
            )
            versions[change.version] = self.authenticated(key, version)
        await chain.append(connection, head, self._deployment, events)
        touched = [versions[number] for number in dict.fromkeys(one.version for one in changes)]
        for version in touched:
            if (
                not await store.set_state(connection, key, version)
                and version.state is State.ACTIVE
            ):
                raise mismatch(key.key_id)  # its row is hidden
        ended = [one.version for one in touched if one.state in _GONE]
        if ended:
            await end_leases(connection, key.tenant, key.key_id, ended)
        if touched:
            destroyed = all(one.state is State.DESTROYED for one in versions.values())
            await store.touch(connection, key, destroyed=destroyed)
            if any(one.state is State.DESTROYED for one in touched):
                await queue_sweep(connection, key.tenant, self._shred_after)

    async def get(self, tenant: str, key_id: str) -> Key:
        """Return a key, as its rows tell. Raises ByokeepError: NOT_FOUND, STATE_TAMPERED."""
        async with self._database.transaction() as connection:
            key = await store.get(connection, tenant, key_id)
        if key is None:
            raise domain.not_found("provider key")
        self.check(key)
        return key

    async def page(self, tenant: str, after: str, limit: int, *, destroyed: bool) -> list[Key]:
        """Return a page of keys, by id. Never touches the KEK backend."""
        return await store.page(self._database, tenant, after, limit, destroyed=destroyed)

    def authenticated(self, key: Key, version: Version) -> Version:
        """Return a version with the MAC of its state."""
        mac = domain.state_mac(self._mac_key, self._deployment, key, version)
        return replace(version, state_mac=mac)

    def check(self, key: Key) -> None:
        """Check the MAC of every version's state. Raises ByokeepError: STATE_TAMPERED."""
        for version in key.versions:
            domain.check_state(self._mac_key, self._deployment, key, version)

    async def sweep(self) -> None:
        """Destroy superseded versions whose grace is over.

        Nobody asked for it: so only what the chain, followed to its end, calls superseded too.
        """
        origin = Origin("keyvault", "grace is over")

        async def destroy(row: Row) -> None:
            async def act(connection: Connection, head: chain.Head, versions: int) -> None:
                # A forged version keeps no other from being destroyed.
                key = self._feared(await self._there(connection, row[0], row[1]))
                over = [
                    change
                    for change in domain.expired(key, head.now)
                    if not self._outdated(key, key.version(change.version))
                ]
                await self.apply(connection, head, key, over, origin)

            await self._reconcile.at_head(chain.tenant_chain(row[0]), act)

        await each("grace", await store.past_grace(self._database), destroy)

    async def forget(self) -> None:
        """Forget the requests that nobody retries any more."""
        await change_store.forget(self._database)

    async def checked(self, connection: Connection, tenant: str, key_id: str) -> Key:
        """Return a key that is to be changed (see `stored`). Raises ByokeepError: NOT_FOUND,
        STATE_TAMPERED."""
        key = await self._there(connection, tenant, key_id)
        self.check(key)
        return key

    async def _there(self, connection: Connection, tenant: str, key_id: str) -> Key:
        key = await self.stored(connection, tenant, key_id)
        if key is None:
            raise domain.not_found("provider key")
        return key

    async def stored(self, connection: Connection, tenant: str, key_id: str) -> Key | None:
        """Return a key that is to be changed: as its rows tell, with the versions of which only its
        chain tells. A row that was hidden keeps no version from what is done to its key, nor does
        it free its number."""
        key = await store.get(connection, tenant, key_id)
        if key is None:
            return None
        versions, number = {one.version: one for one in key.versions}, 1
        while number in versions or self._reconcile.told(tenant, key_id, number).known:
            if number not in versions:
                versions[number] = self._hidden(key, number)
            number += 1
        return replace(key, versions=tuple(versions[one] for one in sorted(versions)))

    def _hidden(self, key: Key, number: int) -> Version:
        told, time = self._reconcile.told(key.tenant, key.key_id, number), key.create_time
        backend, state = self._backends.primary.name, told.over(told.sequence) or State(told.state)
        hidden = Version(number, state, told.sequence, b"", "", backend, 0, time, time)
        return self.authenticated(key, hidden)

    async def _first_time(self, connection: Connection, key: Key, request: Request) -> bool:
        name = (key.tenant, key.key_id, request.method, request.request_id)
        noted = await change_store.get(connection, name)
        # A note that SQL planted would keep a change from being made.
        if noted is None or not hmac.compare_digest(noted.mac, self._note_mac(name, noted.digest)):
            # Not of a retry: it has the etag of before its own change.
            domain.check_etag(key, request.etag)
            note = change_store.Note(request.digest, self._note_mac(name, request.digest))
            await change_store.put(connection, name, note)
            return True
        if noted.digest != request.digest:
            raise domain.id_conflict()
        return False

    def _note_mac(self, name: change_store.Name, digest: bytes) -> bytes:
        message = fields("byokeep/change/v1", self._deployment, *name, digest)
        return hmac.digest(self._mac_key, message, hashlib.sha256)

    def _feared(self, key: Key) -> Key:
        """Return a key of which no forged row can say that it is over already."""
        versions = (
            one if self._authentic(key, one) else replace(one, state=State.UNSPECIFIED)
            for one in key.versions
        )
        return replace(key, versions=tuple(versions))

    def _outdated(self, key: Key, version: Version) -> bool:
        told = self._reconcile.told(key.tenant, key.key_id, version.version)
        return told.outdated(version.state, version.state_sequence)

    def _authentic(self, key: Key, version: Version) -> bool:
        return domain.authentic(self._mac_key, self._deployment, key, version)

    def event(self, key: Key, change: Change, origin: Origin) -> audit_pb2.AuditEvent:
        """Return the event of a change, not yet linked."""
        shred = ""
        if change.event == audit_pb2.AUDIT_EVENT_TYPE_DESTROYED:
            shred = self._backends.shred_of(key.version(change.version).kek_backend)
        event = audit_pb2.AuditEvent(
            type=change.event,
            key_id=key.key_id,
            # A forged row may have a number that no version has.
            key_version=max(change.version, 0),
            caller=origin.caller,
            actor=origin.actor,
            shred=shred,
        )
        if all(self._authentic(key, one) for one in key.versions):
            event.provider, event.owner = provider_value(key.provider), key.owner
        return event


async def end_leases(
    connection: Connection,
    tenant: str,
    key_id: str | None = None,
    versions: list[int] | None = None,
) -> int:
    """End the leases of a tenant, of one of its keys, or of versions of that; return how many did.
    Forged rows of leases keep no key from being revoked, and no tenant from being held."""
    ended = 0
    async with aside(connection, "leases_not_ended"):
        ended = await lease_store.revoke(
            connection, tenant, key_id, versions, lease_pb2.LEASE_OUTCOME_CANCELLED
        )
    return ended


def _whole(key_id: str, after: State, origin: Origin) -> audit_pb2.AuditEvent:
    """Return the event that all of a key is revoked or destroyed."""
    return audit_pb2.AuditEvent(
        type=domain.ENDED_BY[after],
        key_id=key_id,
        key_version=WHOLE_KEY,
        caller=origin.caller,
        actor=origin.actor,
    )
