"""Staging: a sealed key that came in is opened, checked and stored as a PENDING version.

What is opened is opened in a one-shot process (see intake), and comes back encrypted
under the version's data key: this process never has a plaintext.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import grpc
from byokeep.keyvault.v1 import audit_pb2, custody_pb2
from byokeep.sealing import SealContext

from services.common.errors import ByokeepError
from services.keyvault import chain, domain, kek
from services.keyvault.custody import Custody, Origin
from services.keyvault.database import Connection, Database
from services.keyvault.domain import Change, Key, State, Version
from services.keyvault.envelope import Context
from services.keyvault.intake import IntakeKeys, Opened, refusal
from services.keyvault.store import intake as intake_store
from services.keyvault.store import jobs as job_store
from services.keyvault.store import keys as store
from services.keyvault.wraps import Wraps

#: A tenant may send in this many times what one caller may.
TENANT_FACTOR = 5


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
    etag: str

    def digest(self) -> bytes:
        """Return what a retry must repeat: everything, down to the ciphertext's bytes."""
        head = "\n".join(
            (
                self.key_id,
                self.provider,
                self.owner,
                self.display_name,
                self.operation,
                self.etag,
            )
        )
        return hashlib.sha256(
            head.encode() + b"\n" + self.sealed.SerializeToString(deterministic=True)
        ).digest()


class Staging:
    """Stages keys (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        intake: IntakeKeys,
        custody: Custody,
        wraps: Wraps,
        deployment: str,
        intake_per_hour: int,
    ) -> None:
        """Stage into a custody's database, under tenants' KEKs."""
        self._database = database
        self._backends = backends
        self._intake = intake
        self._custody = custody
        self._wraps = wraps
        self._deployment = deployment
        self._intake_per_hour = intake_per_hour

    async def stage(self, order: Order, origin: Origin) -> tuple[Key, int]:
        """Open a sealed key and store it as a new PENDING version; return key and version.

        Raises:
            ByokeepError: limits, refusals of the seal, conflicts.
        """
        earlier = await self._begin(order, origin)
        if earlier is not None:
            return await self._custody.get(order.tenant, order.key_id), earlier
        try:
            # Where its KEK's version was trimmed meanwhile: once more, under the newest one.
            number = await self._stage(order, origin) or await self._stage(order, origin)
            if number is None:
                raise _raced()
        except ByokeepError as error:
            # The same request, sent twice at once: the other one made the key that is in the way.
            number = await self._done(order)
            if not number:
                raise error from None
        return await self._custody.get(order.tenant, order.key_id), number

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
        digest = hashlib.sha256(opened.envelope).digest()
        mac = self._wraps.mac(order.tenant, (order.key_id, number), *wrap, digest)
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
            raise domain.id_conflict()
        if earlier.refusal is not None:
            raise refusal(earlier.refusal, order.provider)
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
            key = await self._custody.stored(connection, order.tenant, order.key_id)
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
        self._custody.check(key)
        if (key.provider, key.owner) != (order.provider, order.owner):
            raise domain.not_found("provider key")
        domain.check_etag(key, order.etag)
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
            key = await self._custody.checked(connection, order.tenant, order.key_id)
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
        version = self._custody.authenticated(key, version)
        await store.insert_version(connection, key, version, secret)
        event = self._custody.event(key, staged, origin)
        await self._custody.apply(connection, head, key, changes, origin, before=(event,))
        await intake_store.done(connection, order.tenant, order.request_id, number)
        return True


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
        f"a key of that provider, owner and name exists ({key_id}): rotate it to replace its"
        " value; if it is revoked, destroying it frees its name; a second key takes another name",
        key=key_id,
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
