"""Leases: a grant redeemed once, the key opened and sealed to one child, wiped here.

The order matters. Signature, holder and time first; then, in one transaction under
the tenant's lock, the key's state, the redemption and the audit event; only when
that is durable is the key decrypted.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping

import grpc
from byokeep import hpke
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2
from byokeep.leasing import lease_info
from byokeep.names import provider_id, provider_value
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common.errors import ByokeepError
from services.common.secret import Secret
from services.keyvault import chain, domain, kek
from services.keyvault.background import each
from services.keyvault.custody import Custody, Origin
from services.keyvault.database import Connection, Database
from services.keyvault.domain import Change, Key, State
from services.keyvault.envelope import (
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    check_header,
    decrypt,
)
from services.keyvault.grants import (
    GrantRefusedError,
    check_holder,
    check_time,
    refused,
    verify,
)
from services.keyvault.store import jobs as job_store
from services.keyvault.store import keys as key_store
from services.keyvault.store import leases as store
from services.keyvault.store.leases import Lease

LIFE = datetime.timedelta(minutes=15)
_STATES = {
    grant_pb2.LEASE_PURPOSE_VALIDATION: (State.PENDING, State.ACTIVE),
    grant_pb2.LEASE_PURPOSE_REVIEW: (State.ACTIVE,),
}


class Leasing:
    """Gives and ends leases (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        custody: Custody,
        grant_keys: Mapping[str, Ed25519PublicKey],
        deployment: str,
        in_flight: int,
        refusal: Callable[[str, str, int], ByokeepError | None],
        denied: Callable[[str, str, str], None],
    ) -> None:
        """`refusal` says why no lease may be given; `denied` is told why a grant was refused."""
        self._database = database
        self._backends = backends
        self._custody = custody
        self._grant_keys = grant_keys
        self._deployment = deployment
        self._in_flight = in_flight
        self._refusal = refusal
        self._denied = denied

    async def lease(
        self, request: lease_pb2.LeaseKeyRequest, holder: str
    ) -> lease_pb2.LeaseKeyResponse:
        """Redeem a grant and return the key, sealed to the child that it names.

        Raises:
            ByokeepError: GRANT_REFUSED, uniform; or why a valid grant can't be served.
        """
        try:
            grant = verify(request.grant, self._grant_keys, self._deployment)
            check_holder(grant, holder, request.recipient_public_key)
            lease, locked = await self._redeem(grant, holder)
        except GrantRefusedError as error:
            reason = str(error)
        else:
            sealed = await self._open(grant, lease, locked, request)
            answer = lease_pb2.LeaseKeyResponse(lease_id=lease.lease_id, sealed_key=sealed)
            answer.expire_time.FromDatetime(lease.expire_time)
            return answer
        self._denied(holder, "/byokeep.keyvault.v1.LeaseService/LeaseKey", f"grant: {reason}")
        raise refused()

    async def _redeem(self, grant: grant_pb2.Grant, holder: str) -> tuple[Lease, store.Locked]:
        async with self._database.pipelined() as connection:
            locked = await store.lock(connection, grant)
            if locked is None:
                raise GrantRefusedError("no such key version")
            head, key = locked.head, locked.key
            check_time(grant, head.now)
            frozen = self._refusal(grant.tenant, grant.key_id, grant.key_version)
            if frozen is not None:
                raise frozen
            self._check_key(grant, key)
            lease = Lease(
                new_id("lea"),
                grant.grant_id,
                grant.tenant,
                grant.key_id,
                grant.key_version,
                holder,
                grant.attempt_id,
                grant.review_id,
                grant.fence,
                grant.purpose,
                head.now + LIFE,
            )
            event = _event(
                lease,
                key.provider,
                key.owner,
                audit_pb2.AUDIT_EVENT_TYPE_LEASED,
                actor=grant.actor,
            )
            head, (link,) = chain.link(head, self._deployment, [event])
            answer = await store.redeem(connection, lease, head, link, self._in_flight)
        if await answer.fetchone() != (1,):
            if await store.grant_used(self._database, grant.grant_id):
                raise GrantRefusedError("redeemed before")
            raise _cap(self._in_flight)
        return lease, locked

    def _check_key(self, grant: grant_pb2.Grant, key: Key) -> None:
        version = key.versions[0]
        self._custody.check(key)
        unavailable = self._backends.refusal_of(version.kek_backend)
        if unavailable is not None:
            # Before the grant is spent on a backend that is known not to answer.
            raise unavailable
        if (provider_value(key.provider), key.owner) != (grant.provider, grant.owner):
            raise GrantRefusedError("key binding")
        if version.state in _STATES[grant.purpose]:
            return
        if version.state is State.NEEDS_REKEY:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "KEY_NEEDS_REKEY",
                f"the provider rejected this key; replace it: byokeep key rotate {key.key_id}",
                key=key.key_id,
                rotate=f"byokeep key rotate {key.key_id}",
            )
        raise domain.wrong_state(version.state, "it can't be leased for this purpose")

    async def _open(
        self,
        grant: grant_pb2.Grant,
        lease: Lease,
        locked: store.Locked,
        request: lease_pb2.LeaseKeyRequest,
    ) -> bytes:
        context = Context(
            self._deployment,
            grant.tenant,
            grant.owner,
            provider_id(grant.provider),
            grant.key_id,
            grant.key_version,
        )
        reason = "ROW_TAMPERED"
        unavailable: kek.KekUnavailableError | None = None
        try:
            check_header(locked.envelope)
            # The KEK's name comes from the grant's tenant, never from the row.
            backend = self._backends.named(locked.key.versions[0].kek_backend)
            name = kek.tenant_kek(grant.tenant)
            with kek.opened_for(lease.lease_id):
                opened = await backend.unwrap(name, locked.wrapped_dek)
            with opened as data_key:
                plaintext = decrypt(data_key.reveal(), locked.envelope, context)
            with Secret(plaintext) as key:
                return hpke.seal(
                    request.suite,
                    request.recipient_public_key,
                    key.reveal(),
                    lease_info(request.grant.payload, lease.lease_id),
                )
        except UnknownEnvelopeError:
            reason = "UNDECRYPTABLE"
        except (EnvelopeError, kek.UnwrapError):
            pass
        except hpke.SealError:
            reason = "INVALID_FIELD"
        except kek.KekMissingError:
            reason = "UNDECRYPTABLE"
        except kek.KekUnavailableError as error:
            unavailable = error
        if unavailable is not None:
            # The grant is spent; its lease must not count against the tenant for its life.
            failed = audit_pb2.AUDIT_EVENT_TYPE_RELEASED
            await self._close(
                lease.lease_id, lease_pb2.LEASE_OUTCOME_FAILED, failed, None, lease.holder
            )
            raise unavailable
        raise await self._unopened(grant, lease, reason)

    async def _unopened(self, grant: grant_pb2.Grant, lease: Lease, reason: str) -> ByokeepError:
        """End a lease whose key could not be sealed, on the record, and say why."""
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
            key_id=grant.key_id,
            key_version=grant.key_version,
            lease_id=lease.lease_id,
            grant_id=grant.grant_id,
            attempt_id=grant.attempt_id,
            caller=lease.holder,
            reason=reason,
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(grant.tenant))
            await chain.append(connection, head, self._deployment, [event])
            await store.close(connection, lease.lease_id, lease_pb2.LEASE_OUTCOME_FAILED)
            if reason != "INVALID_FIELD":
                failure = job_store.Failure(grant.key_id, grant.key_version, reason)
                await job_store.unopened(connection, grant.tenant, [failure], None)
        return _UNOPENED[reason](grant.key_id)

    async def release(
        self,
        lease_id: str,
        outcome: lease_pb2.LeaseOutcome.ValueType,
        report: lease_pb2.PlaintextReport,
        holder: str,
    ) -> None:
        """End a lease; a second release changes nothing. Only its holder may.

        KEY_REJECTED marks an ACTIVE version NEEDS_REKEY in the same transaction.

        Raises:
            ByokeepError: NOT_FOUND, also for another identity's lease.
        """
        await self._close(lease_id, outcome, audit_pb2.AUDIT_EVENT_TYPE_RELEASED, report, holder)

    async def expire(self) -> None:
        """End leases that were never released, on the record."""

        async def close(lease_id: str) -> None:
            await self._close(
                lease_id,
                lease_pb2.LEASE_OUTCOME_UNSPECIFIED,
                audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED,
                None,
                None,
            )

        await each("expiry", await store.overdue(self._database), close)

    async def _close(
        self,
        lease_id: str,
        outcome: lease_pb2.LeaseOutcome.ValueType,
        kind: audit_pb2.AuditEventType.ValueType,
        report: lease_pb2.PlaintextReport | None,
        holder: str | None,
    ) -> None:
        async with self._database.pipelined() as connection:
            locked = await store.lock_lease(connection, lease_id)
            if locked is None or (holder is not None and locked.lease.holder != holder):
                raise domain.not_found("lease")
            if locked.released:
                return
            lease = locked.lease
            event = _event(
                lease, locked.provider, locked.owner, kind, outcome=outcome, report=report
            )
            rejected = (
                outcome == lease_pb2.LEASE_OUTCOME_KEY_REJECTED
                and lease.purpose == grant_pb2.LEASE_PURPOSE_REVIEW
            )
            if rejected and locked.state is State.ACTIVE:
                await self._reject(connection, locked, event)
            else:
                head, (link,) = chain.link(locked.head, self._deployment, [event])
                await store.close_recorded(connection, lease, outcome, head, link)

    async def _reject(
        self, connection: Connection, locked: store.LockedLease, event: audit_pb2.AuditEvent
    ) -> None:
        lease = locked.lease
        key = await key_store.get(connection, lease.tenant, lease.key_id)
        if key is None:
            raise domain.not_found("provider key")
        self._custody.check(key)
        await store.close(connection, lease.lease_id, lease_pb2.LEASE_OUTCOME_KEY_REJECTED)
        changes = [Change(lease.version, audit_pb2.AUDIT_EVENT_TYPE_REJECTED)]
        origin = Origin(lease.holder, "")
        await self._custody.apply(connection, locked.head, key, changes, origin, before=(event,))


def _event(
    lease: Lease,
    provider: str,
    owner: str,
    kind: audit_pb2.AuditEventType.ValueType,
    *,
    actor: str = "",
    outcome: lease_pb2.LeaseOutcome.ValueType = lease_pb2.LEASE_OUTCOME_UNSPECIFIED,
    report: lease_pb2.PlaintextReport | None = None,
) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(
        type=kind,
        key_id=lease.key_id,
        key_version=lease.version,
        provider=provider_value(provider),
        owner=owner,
        lease_id=lease.lease_id,
        grant_id=lease.grant_id,
        review_id=lease.review_id,
        attempt_id=lease.attempt_id,
        fence=lease.fence,
        purpose=grant_pb2.LeasePurpose.ValueType(lease.purpose),
        actor=actor,
        caller=lease.holder,
        outcome=outcome,
        report=report,
    )


def _cap(limit: int) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "LEASE_CAP",
        f"{limit} leases of this tenant live at once; try again when one has ended",
        retry_after_seconds=1.0,
        cap="tenant_in_flight",
    )


def _tampered(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROW_TAMPERED",
        "the stored key fails its authentication; it is not used",
        key=key_id,
    )


def _undecryptable(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "UNDECRYPTABLE",
        f"the key-encryption key is gone, or the envelope is of another version: undecryptable;"
        f" re-key: byokeep key rotate {key_id}",
        key=key_id,
        rotate=f"byokeep key rotate {key_id}",
    )


def _recipient(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "recipient_public_key: not a public key of that suite",
        field="recipient_public_key",
        key=key_id,
    )


_UNOPENED = {
    "ROW_TAMPERED": _tampered,
    "UNDECRYPTABLE": _undecryptable,
    "INVALID_FIELD": _recipient,
}
