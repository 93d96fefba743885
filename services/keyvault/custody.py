"""Custody: staging a sealed key, and every change of a key's state.

Each change is one transaction under the lock of the tenant's chain: rows, MACs and
audit events together, or nothing.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, lease_pb2
from byokeep.names import provider_value
from byokeep.sealing import SealContext

from services.common.errors import ByokeepError
from services.keyvault import chain, domain, kek
from services.keyvault.background import each
from services.keyvault.database import Connection, Database, Row
from services.keyvault.domain import Change, Key, State, Version
from services.keyvault.envelope import Context
from services.keyvault.intake import IntakeKeys, Opened, refusal
from services.keyvault.rotation import queue_sweep
from services.keyvault.store import intake as intake_store
from services.keyvault.store import jobs as job_store
from services.keyvault.store import keys as store
from services.keyvault.store import leases as lease_store
from services.keyvault.wraps import Wraps

Decide = Callable[[Key, chain.Head], list[Change]]
#: A tenant may send in this many times what one caller may.
TENANT_FACTOR = 5
_GONE = (State.REVOKED, State.DESTROYED)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who caused a change: the caller's identity, and on whose behalf it says."""

    caller: str
    actor: str


@dataclass(frozen=True, slots=True)
class Order:
    """A sealed key to be staged."""

    tenant: str
    key_id: str
    provider: str
    owner: str
    display_name: str
    operation: str
    request_id: str
    sealed: custody_pb2.SealedKey

    def digest(self) -> bytes:
        """Return what a retry must repeat: everything, down to the ciphertext's bytes."""
        head = "\n".join(
            (self.key_id, self.provider, self.owner, self.display_name, self.operation)
        )
        return hashlib.sha256(
            head.encode() + b"\n" + self.sealed.SerializeToString(deterministic=True)
        ).digest()


class Custody:
    """Keeps keys (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        intake: IntakeKeys,
        mac_key: bytes,
        wraps: Wraps,
        deployment: str,
        intake_per_hour: int,
        shred_after_seconds: int,
    ) -> None:
        """Keep keys in a database, under tenants' KEKs."""
        self._database = database
        self._backends = backends
        self._intake = intake
        self._mac_key = mac_key
        self._wraps = wraps
        self._deployment = deployment
        self._intake_per_hour = intake_per_hour
        self._shred_after = datetime.timedelta(seconds=shred_after_seconds)

    async def stage(self, order: Order, origin: Origin) -> tuple[Key, int]:
        """Open a sealed key and store it as a new PENDING version; return key and version.

        Raises:
            ByokeepError: limits, refusals of the seal, conflicts.
        """
        earlier = await self._begin(order, origin)
        if earlier is not None:
            return await self.get(order.tenant, order.key_id), earlier
        try:
            number = await self._stage(order, origin) or await self._stage(order, origin)
            if number is None:
                raise _raced()
        except ByokeepError as error:
            # The same request, sent twice at once: the other one made the key that is in the way.
            number = await self._done(order)
            if not number:
                raise error from None
        return await self.get(order.tenant, order.key_id), number

    async def _stage(self, order: Order, origin: Origin) -> int | None:
        """Store a new version; None where its KEK's version was trimmed in the meantime."""
        number = await self._next_version(order)
        context = Context(
            self._deployment, order.tenant, order.owner, order.provider, order.key_id, number
        )
        backend = self._backends.primary
        try:
            data_key = await backend.generate_data_key(kek.tenant_kek(order.tenant))
        except kek.KekMissingError:
            raise chain.tenant_key_missing(order.tenant) from None
        with data_key.plaintext as clear:
            opened = await self._open(order, clear.reveal(), context)
        wrap = backend.name, data_key.kek_version, data_key.wrapped
        mac = self._wraps.mac(order.tenant, order.key_id, number, *wrap)
        secret = store.StoredSecret(opened.hint, *wrap, mac, opened.envelope)
        async with self._database.transaction() as connection:
            stored = await self._store(connection, order, origin, number, secret)
        return number if stored else None

    async def _open(self, order: Order, data_key: bytearray, context: Context) -> Opened:
        try:
            return await self._intake.open(order.sealed, _seal_context(order), data_key, context)
        except ByokeepError as error:
            if rule := error.metadata.get("rule"):
                await intake_store.refused(self._database, order.tenant, order.request_id, rule)
            raise

    async def _done(self, order: Order) -> int:
        request = await intake_store.request(self._database, order.tenant, order.request_id)
        if request is None or request.digest != order.digest():
            return 0
        return request.version or 0

    async def change(self, tenant: str, key_id: str, origin: Origin, decide: Decide) -> Key:
        """Apply what `decide` says to a key, as one transaction; return the key.

        Raises:
            ByokeepError: NOT_FOUND, STATE_TAMPERED, and what `decide` raises.
        """
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            key = await self._checked(connection, tenant, key_id)
            await self.apply(connection, head, key, decide(key, head), origin)
        return await self.get(tenant, key_id)

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
            events.append(self._event(key, change, origin))
            version = domain.with_state(
                version, domain.STATE_AFTER[change.event], head.sequence + len(events)
            )
            versions[change.version] = replace(
                version,
                state_mac=domain.state_mac(self._mac_key, self._deployment, key, version),
            )
        await chain.append(connection, head, self._deployment, events)
        touched = [versions[number] for number in dict.fromkeys(one.version for one in changes)]
        for version in touched:
            await store.set_state(connection, key, version)
        gone = [one.version for one in touched if one.state in _GONE]
        if gone:
            await lease_store.revoke(
                connection, key.tenant, key.key_id, gone, lease_pb2.LEASE_OUTCOME_CANCELLED
            )
        if touched:
            destroyed = all(one.state is State.DESTROYED for one in versions.values())
            await store.touch(connection, key, destroyed=destroyed)
            if any(one.state is State.DESTROYED for one in touched):
                await queue_sweep(connection, key.tenant, self._shred_after)

    async def get(self, tenant: str, key_id: str) -> Key:
        """Return a key. Raises ByokeepError: NOT_FOUND, STATE_TAMPERED."""
        async with self._database.transaction() as connection:
            return await self._checked(connection, tenant, key_id)

    async def page(self, tenant: str, after: str, limit: int, *, destroyed: bool) -> list[Key]:
        """Return a page of keys, by id. Never touches the KEK backend."""
        return await store.page(self._database, tenant, after, limit, destroyed=destroyed)

    def check(self, key: Key) -> None:
        """Check the MAC of every version's state. Raises ByokeepError: STATE_TAMPERED."""
        for version in key.versions:
            domain.check_state(self._mac_key, self._deployment, key, version)

    async def sweep(self) -> None:
        """Destroy superseded versions whose grace is over."""
        origin = Origin("keyvault", "grace is over")

        async def destroy(row: Row) -> None:
            await self.change(
                row[0], row[1], origin, lambda key, head: domain.expired(key, head.now)
            )

        await each("grace", await store.past_grace(self._database), destroy)

    async def _begin(self, order: Order, origin: Origin) -> int | None:
        earlier = await intake_store.begin(
            self._database,
            order.tenant,
            order.request_id,
            order.digest(),
            origin.actor,
            order.key_id,
        )
        if earlier.digest != order.digest():
            raise ByokeepError(
                grpc.StatusCode.ABORTED,
                "REQUEST_ID_CONFLICT",
                "this request id came before with other content; use a new one",
                field="request_id",
            )
        if earlier.refusal is not None:
            raise refusal(earlier.refusal)
        if earlier.version is not None:
            return earlier.version
        # Whoever the actor is said to be: a tenant's own cap holds, so that a rogue
        # orchestrator can't make keyvault a checker of stolen keys by naming new actors.
        of_actor, of_tenant = await intake_store.recent(self._database, order.tenant, origin.actor)
        if of_actor > self._intake_per_hour or of_tenant > TENANT_FACTOR * self._intake_per_hour:
            raise _limit(self._intake_per_hour)
        return None

    async def _next_version(self, order: Order) -> int:
        async with self._database.transaction() as connection:
            key = await store.get(connection, order.tenant, order.key_id)
            if order.operation == "rotate":
                if key is None:
                    raise domain.not_found("provider key")
                self._check_rotation(order, key)
                return key.versions[-1].version + 1
            same = await store.same_name(
                connection, order.tenant, order.provider, order.owner, order.display_name
            )
        if key is not None or same is not None:
            raise _exists(same or order.key_id)
        return 1

    def _check_rotation(self, order: Order, key: Key) -> None:
        self.check(key)
        if (key.provider, key.owner) != (order.provider, order.owner):
            raise domain.not_found("provider key")
        domain.stage_over(key)

    async def _store(
        self,
        connection: Connection,
        order: Order,
        origin: Origin,
        number: int,
        secret: store.StoredSecret,
    ) -> bool:
        head = await chain.lock(connection, chain.tenant_chain(order.tenant))
        oldest = await job_store.minimum(connection, order.tenant, secret.kek_backend)
        if secret.kek_version < oldest:
            if oldest == job_store.WHOLE:
                raise chain.tenant_key_missing(order.tenant)
            return False
        changes: list[Change] = []
        if order.operation == "rotate":
            key = await self._checked(connection, order.tenant, order.key_id)
            self._check_rotation(order, key)
            if key.versions[-1].version + 1 != number:
                raise _raced()
            changes = domain.stage_over(key)
        else:
            key = Key(
                order.tenant,
                order.key_id,
                order.provider,
                order.owner,
                order.display_name,
                1,
                head.now,
                (),
            )
            if not await store.insert_key(connection, key):
                raise _exists(order.key_id)
        staged = Change(number, audit_pb2.AUDIT_EVENT_TYPE_STAGED)
        version = Version(
            number,
            State.PENDING,
            head.sequence + 1,
            b"",
            secret.hint,
            secret.kek_backend,
            secret.kek_version,
            head.now,
            head.now,
        )
        mac = domain.state_mac(self._mac_key, self._deployment, key, version)
        await store.insert_version(connection, key, replace(version, state_mac=mac), secret)
        event = self._event(key, staged, origin)
        if changes:
            await self.apply(connection, head, key, changes, origin, before=(event,))
        else:
            await chain.append(connection, head, self._deployment, [event])
        await intake_store.done(connection, order.tenant, order.request_id, number)
        return True

    async def _checked(self, connection: Connection, tenant: str, key_id: str) -> Key:
        key = await store.get(connection, tenant, key_id)
        if key is None:
            raise domain.not_found("provider key")
        self.check(key)
        return key

    def _event(self, key: Key, change: Change, origin: Origin) -> audit_pb2.AuditEvent:
        shred = ""
        if change.event == audit_pb2.AUDIT_EVENT_TYPE_DESTROYED:
            shred = self._backends.shred_of(key.version(change.version).kek_backend)
        return audit_pb2.AuditEvent(
            type=change.event,
            key_id=key.key_id,
            key_version=change.version,
            provider=provider_value(key.provider),
            owner=key.owner,
            caller=origin.caller,
            actor=origin.actor,
            shred=shred,
        )


def _seal_context(order: Order) -> SealContext:
    return SealContext(
        order.tenant,
        order.owner,
        order.provider,
        order.key_id,
        order.operation,
        order.request_id,
    )


def _exists(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ALREADY_EXISTS,
        "KEY_EXISTS",
        f"a key of that provider, owner and name exists ({key_id}); to replace its value:"
        f" byokeep key rotate {key_id}; if it is revoked, byokeep key destroy {key_id} frees"
        " its name",
        key=key_id,
        rotate=f"byokeep key rotate {key_id}",
    )


def _limit(limit: int) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "INTAKE_LIMIT",
        f"more than {limit} keys were sent in by this caller for this tenant within an hour",
        retry_after_seconds=3600.0,
        limit=str(limit),
        window="1h",
    )


def _raced() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
        "another version was staged, or the tenant's key-encryption key rotated, at the same time;"
        " try again",
        field="name",
    )
