"""Staging: a sealed key that came in is opened, checked and stored as a PENDING version.

What is opened is opened in a one-shot process (see intake), and comes back encrypted under the
version's data key: this process never has a plaintext.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, state_pb2
from byokeep.names import provider_value
from byokeep.sealing import SealContext

from services.common.errors import ByokeepError
from services.keyvault import kek, lifecycle
from services.keyvault.custody import Key, Origin, Request, apply, done_before, remember
from services.keyvault.database import Database
from services.keyvault.envelope import Context
from services.keyvault.event import Head
from services.keyvault.intake import IntakeKeys, Opened, refusal
from services.keyvault.ledger import ALL, Ledger, Tenant, part_of, secret_digest
from services.keyvault.lifecycle import MOST_KEYS, State
from services.keyvault.log import Log
from services.keyvault.sql import intake as sql

#: A tenant may send in this many times what one caller may.
TENANT_FACTOR: Final = 5


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

    def request(self) -> Request:
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
        content = head.encode() + b"\n" + self.sealed.SerializeToString(deterministic=True)
        digest = hashlib.sha256(content).digest()
        return Request("StageKey", self.request_id, digest, self.etag)


@dataclass(frozen=True, slots=True)
class _Secret:
    """What a version needs to be opened, besides its context."""

    hint: str
    kek_backend: str
    kek_version: int
    wrapped: bytes
    envelope: bytes


class _RacedError(ByokeepError):
    """Another version was staged, or the KEK trimmed, at the same time."""

    def __init__(self) -> None:
        super().__init__(
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
            "another version was staged, or the tenant's key-encryption key rotated, at the same"
            " time; try again",
            field="name",
        )


class Staging:
    """Stages keys (see the module)."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        log: Log,
        backends: kek.Backends,
        intake: IntakeKeys,
        deployment: str,
        intake_per_hour: int,
    ) -> None:
        """Stage into a ledger's tenants, under their KEKs."""
        self._database = database
        self._ledger = ledger
        self._log = log
        self._backends = backends
        self._intake = intake
        self._deployment = deployment
        self._intake_per_hour = intake_per_hour

    async def stage(self, order: Order, origin: Origin) -> tuple[Key, int]:
        """Open a sealed key and store it as a new PENDING version; return key and version, once
        they can't be forgotten any more.

        Raises:
            ByokeepError: limits, refusals of the seal, conflicts, KEY_LIMIT, STATE_TAMPERED,
                ROLLED_BACK, AUDIT_UNAVAILABLE.
        """
        tenant = await self._ledger.read(order.tenant, ALL)
        done = _done(tenant, order)
        head = tenant.head
        if done is None:
            await self._count(order, origin)
            # Another version, or a trim of its KEK, may have come between: once more then.
            try:
                done, head = await self._stage(order, origin, tenant)
            except _RacedError:
                tenant = await self._ledger.read(order.tenant, ALL)
                done, head = await self._stage(order, origin, tenant)
        await self._log.anchored(order.tenant, head)
        return done

    async def _stage(
        self, order: Order, origin: Origin, tenant: Tenant
    ) -> tuple[tuple[Key, int], Head]:
        number = _next_version(tenant, order)
        secret = await self._secret(order, number)

        def decide(found: Tenant) -> tuple[Key, int]:
            # The same request, sent twice at once: the other one was faster.
            done = _done(found, order)
            if done is not None:
                return done
            if not lifecycle.may_store(found.state, secret.kek_backend, secret.kek_version):
                if found.state.shredded:
                    raise lifecycle.tenant_key_missing(order.tenant)
                raise _RacedError
            if _next_version(found, order) != number:
                raise _RacedError
            return _add(found, order, origin, number, secret, self._backends), number

        return await self._ledger.change(order.tenant, decide, ALL)

    async def _secret(self, order: Order, number: int) -> _Secret:
        """Open a seal and encrypt what is in it, for a version of a number."""
        context = Context(
            self._deployment, order.tenant, order.owner, order.provider, order.key_id, number
        )
        backend = self._backends.primary
        try:
            data_key = await backend.generate_data_key(kek.tenant_kek(order.tenant))
        except kek.KekMissingError:
            raise lifecycle.tenant_key_missing(order.tenant) from None
        with data_key.plaintext as clear:
            opened = await self._open(order, clear.reveal(), context)
        return _Secret(
            opened.hint, backend.name, data_key.kek_version, data_key.wrapped, opened.envelope
        )

    async def _open(self, order: Order, data_key: bytearray, context: Context) -> Opened:
        try:
            return await self._intake.open(order.sealed, _seal_context(order), data_key, context)
        except ByokeepError as error:
            if rule := error.metadata.get("rule"):
                await sql.refused(self._database, order.tenant, order.request_id, rule)
            raise

    async def _count(self, order: Order, origin: Origin) -> None:
        """Count a seal before it is opened. Raises ByokeepError: INTAKE_LIMIT, or as it was refused
        before."""
        digest = order.request().digest
        earlier = await sql.begin(
            self._database, order.tenant, order.request_id, digest, origin.actor, order.key_id
        )
        if earlier.digest != digest:
            raise lifecycle.id_conflict()
        if earlier.refusal is not None:
            raise refusal(earlier.refusal, order.provider)
        # Whoever the actor is said to be: a tenant's own cap holds, so that a rogue
        # orchestrator can't make keyvault a checker of stolen keys by naming new actors.
        of_actor, of_tenant = await sql.recent(self._database, order.tenant, origin.actor)
        if of_actor > self._intake_per_hour or of_tenant > TENANT_FACTOR * self._intake_per_hour:
            raise _limit(self._intake_per_hour)


def _done(tenant: Tenant, order: Order) -> tuple[Key, int] | None:
    """Return what a request became that was carried out before. Raises ByokeepError:
    REQUEST_ID_CONFLICT."""
    key = tenant.key(order.key_id)
    past = done_before(key.requests, order.request()) if key is not None else None
    return (key, past.version) if key is not None and past is not None else None


def _next_version(tenant: Tenant, order: Order) -> int:
    """Return the number of the version that an order becomes. Raises ByokeepError why it can't."""
    if tenant.state.shredded:
        raise lifecycle.tenant_key_missing(order.tenant)
    key = tenant.key(order.key_id)
    if order.operation == "rotate":
        if key is None or (key.provider, key.owner) != (order.provider, order.owner):
            raise lifecycle.not_found("provider key")
        lifecycle.check_etag(key, order.etag)
        lifecycle.stage_over(key)
        return key.versions[-1].version + 1
    name = (order.provider, order.owner, order.display_name)
    living = [one for one in tenant.every_key() if lifecycle.lives(one)]
    same = [one for one in living if (one.provider, one.owner, one.display_name) == name]
    if key is not None or same:
        raise _exists(same[0].key_id if same else order.key_id)
    if len(living) >= MOST_KEYS:
        raise ByokeepError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "KEY_LIMIT",
            f"the tenant has {MOST_KEYS} keys, the most that one may have; destroy those that are"
            " not needed",
            limit=str(MOST_KEYS),
        )
    return 1


def _add(
    tenant: Tenant,
    order: Order,
    origin: Origin,
    number: int,
    secret: _Secret,
    backends: kek.Backends,
) -> Key:
    """Add a version to a tenant that is being changed."""
    now = int(tenant.now.timestamp())
    part = tenant.parts[part_of(order.key_id)].edit()
    key = lifecycle.find(part.keys, order.key_id)
    if key is None:
        key = part.keys.add(
            key_id=order.key_id,
            provider=order.provider,
            owner=order.owner,
            display_name=order.display_name,
            create_time=now,
        )
        part.keys.sort(key=lambda one: one.key_id)
        key = tenant.edit_key(order.key_id)
    tenant.events.append(
        audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_STAGED,
            key_id=order.key_id,
            key_version=number,
            provider=provider_value(order.provider),
            owner=order.owner,
            caller=origin.caller,
            actor=origin.actor,
        )
    )
    over = lifecycle.stage_over(key) if key.versions else []
    key.versions.append(
        state_pb2.VersionState(
            version=number,
            state=State.PENDING.value,
            create_time=now,
            state_time=now,
            state_sequence=tenant.head.sequence + len(tenant.events),
            hint=secret.hint,
            kek_backend=secret.kek_backend,
            kek_version=secret.kek_version,
            secret_digest=secret_digest(secret.wrapped, secret.envelope),
        )
    )
    apply(tenant, order.key_id, over, origin, backends)
    tenant.put[order.tenant, order.key_id, number] = secret.wrapped, secret.envelope
    own = lifecycle.edit_kek(tenant.edit(), secret.kek_backend)
    own.version = max(own.version, secret.kek_version)
    remember(key.requests, order.request().past(number))
    return key


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
