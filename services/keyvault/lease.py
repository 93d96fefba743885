"""Leases: a grant redeemed once, the key opened and sealed to one child, wiped here.

The order matters. Signature and holder first (pure). Then, in one transaction for all that wait:
single use, time, hold, binding, state, caps, the lease and its audit event. Only when those are
durable, and this process is not out of date, is the key decrypted.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep import hpke
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2, state_pb2
from byokeep.leasing import lease_info
from byokeep.names import provider_id, provider_value
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common import tracing
from services.common.errors import ByokeepError
from services.common.secret import Secret
from services.keyvault import kek, lifecycle, limits
from services.keyvault.envelope import (
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    decrypt,
)
from services.keyvault.event import content_digest
from services.keyvault.grants import (
    SKEW_SECONDS,
    GrantRefusedError,
    check_holder,
    check_time,
    refused,
    verify,
)
from services.keyvault.group import GroupCommit
from services.keyvault.ledger import Ledger, Tenant, part_of
from services.keyvault.lifecycle import State, stale
from services.keyvault.limits import Caps
from services.keyvault.log import STALE_SECONDS, Log
from services.keyvault.release import ended_early

LIFE: Final = datetime.timedelta(minutes=15)
#: Longer than any grant lives.
_REDEEMED_SECONDS: Final = 70.0
_METHOD: Final = "/byokeep.keyvault.v1.LeaseService/LeaseKey"
_STATES: Final = {
    grant_pb2.LEASE_PURPOSE_VALIDATION: (State.PENDING, State.ACTIVE),
    grant_pb2.LEASE_PURPOSE_REVIEW: (State.ACTIVE,),
}


@dataclass(frozen=True, slots=True)
class _Order:
    """A verified grant, and who redeems it."""

    grant: grant_pb2.Grant
    holder: str

    @property
    def secret(self) -> tuple[str, str, int]:
        return self.grant.tenant, self.grant.key_id, self.grant.key_version


@dataclass(frozen=True, slots=True)
class _Redeemed:
    """A lease that is on the record, and what it opens: (wrapped data key, envelope), by the KEK
    that the tenant's state names."""

    lease: state_pb2.LiveLease
    secret: tuple[bytes, bytes]
    backend: str
    committed: float
    ends: int


class Leasing:
    """Gives leases (see the module)."""

    def __init__(
        self,
        ledger: Ledger,
        log: Log,
        backends: kek.Backends,
        grant_keys: Mapping[str, Ed25519PublicKey],
        deployment: str,
        caps: tuple[Caps, Caps],
        denied: Callable[[str, str, str], None],
    ) -> None:
        """`caps` are a tenant's and a key's. `denied` is told why a grant was refused, or a valid
        one not served."""
        self._ledger = ledger
        self._log = log
        self._backends = backends
        self._grant_keys = grant_keys
        self._deployment = deployment
        self._caps = caps
        self._denied = denied
        #: What this process redeemed itself, whichever branch of a tenant's chain counts later.
        self._redeemed: dict[bytes, float] = {}
        self._group: GroupCommit[_Order, _Redeemed] = GroupCommit(
            self._redeem, lambda order: order.grant.tenant
        )

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
            redeemed = await self._group.do(_Order(grant, holder))
        except GrantRefusedError as error:
            self._denied(holder, _METHOD, f"grant: {error}")
            raise refused() from None
        except ByokeepError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                what = error.metadata.get("cap") or error.metadata.get("state", "")
                self._denied(holder, _METHOD, f"{error.reason}: {what} tenants/{grant.tenant}")
            raise
        answer = lease_pb2.LeaseKeyResponse(
            lease_id=redeemed.lease.lease_id,
            sealed_key=await self._open(grant, redeemed, request),
        )
        answer.life.FromTimedelta(LIFE)
        return answer

    async def _redeem(self, orders: Sequence[_Order]) -> list[_Redeemed | Exception]:
        """Redeem grants in one transaction; each is decided on what those before it left."""
        refusal = self._log.refusal()
        if refusal is not None:
            return [refusal for _ in orders]
        parts: dict[str, set[int]] = {}
        for order in orders:
            parts.setdefault(order.grant.tenant, set()).add(part_of(order.grant.key_id))
        ends = {name: self._ledger.ends[name] for name in parts}
        outcomes = await self._ledger.group(
            parts,
            {order.secret for order in orders},
            lambda found: [self._outcome(order, found[order.grant.tenant]) for order in orders],
        )
        now, answers = time.monotonic(), list[_Redeemed | Exception]()
        for order, outcome in zip(orders, outcomes, strict=True):
            if isinstance(outcome, Exception):
                answers.append(outcome)
                continue
            answers.append(_Redeemed(*outcome, now, ends[order.grant.tenant]))
            self._redeemed[limits.grant_digest(order.grant)] = now
        while self._redeemed and now - next(iter(self._redeemed.values())) > _REDEEMED_SECONDS:
            del self._redeemed[next(iter(self._redeemed))]
        return answers

    def _outcome(
        self, order: _Order, tenant: Tenant | ByokeepError
    ) -> tuple[state_pb2.LiveLease, tuple[bytes, bytes], str] | Exception:
        if isinstance(tenant, ByokeepError):
            missing = tenant.reason == "TENANT_KEY_MISSING"
            return GrantRefusedError("no such key version") if missing else tenant
        try:
            version, secret = self._may_lease(tenant, order.grant)
        except (GrantRefusedError, ByokeepError) as error:
            if isinstance(error, ByokeepError) and error.reason == "ROW_TAMPERED":
                event = _event(order, audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED)
                event.reason = error.reason
                tenant.events.append(event)
            return error
        return self._record(order, tenant), secret, version.kek_backend

    def _may_lease(
        self, tenant: Tenant, grant: grant_pb2.Grant
    ) -> tuple[state_pb2.VersionState, tuple[bytes, bytes]]:
        """Return the version that a grant names, and its ciphertext. Raises why it can't be leased
        now."""
        key = tenant.key(grant.key_id)
        if key is None or not any(one.version == grant.key_version for one in key.versions):
            raise GrantRefusedError("no such key version")
        if limits.used(tenant.usage, grant) or limits.grant_digest(grant) in self._redeemed:
            raise GrantRefusedError("redeemed before")
        check_time(grant, tenant.now)
        if tenant.state.held or self._log.held(tenant.name):
            raise _held(tenant.name)
        version = lifecycle.version_of(key, grant.key_version)
        unavailable = self._backends.refusal_of(version.kek_backend)
        if unavailable is not None:
            # Before the grant is spent on a backend that is known not to answer.
            raise unavailable
        if (provider_value(key.provider), key.owner) != (grant.provider, grant.owner):
            raise GrantRefusedError("key binding")
        _check_state(grant, version)
        self._check_caps(tenant, grant.key_id)
        name = tenant.name, grant.key_id, grant.key_version
        secret = tenant.secret(name, version.secret_digest)
        if secret is None:
            raise lifecycle.row_tampered("key", grant.key_id)
        return version, secret

    def _check_caps(self, tenant: Tenant, key_id: str) -> None:
        now = tenant.now.timestamp() * 1_000
        leases = tenant.usage.leases
        live = [one.key_id for one in leases if not one.ended and one.expire_millis > now]
        usage = tenant.edit_usage()
        limits.roll(usage.meter, tenant.now)
        limits.check("tenant", self._caps[0], len(live), usage.meter, tenant.now)
        meter = _meter(tenant, key_id)
        limits.roll(meter, tenant.now)
        limits.check("key", self._caps[1], live.count(key_id), meter, tenant.now)

    def _record(self, order: _Order, tenant: Tenant) -> state_pb2.LiveLease:
        """Give a lease: its event, and what it uses."""
        grant, usage = order.grant, tenant.edit_usage()
        event = _event(order, audit_pb2.AUDIT_EVENT_TYPE_LEASED)
        event.lease_id = new_id("lea")
        lease = usage.leases.add(
            lease_id=event.lease_id,
            key_id=grant.key_id,
            version=grant.key_version,
            holder=order.holder,
            expire_millis=int((tenant.now + LIFE).timestamp() * 1_000),
            sequence=tenant.next_sequence,
            event_digest=content_digest(event),
        )
        tenant.events.append(event)
        tenant.leased.append(lease)
        limits.redeem(usage, grant, tenant.now, SKEW_SECONDS)
        limits.count(usage.meter, tenant.now)
        limits.count(_meter(tenant, grant.key_id), tenant.now)
        return lease

    async def _open(
        self, grant: grant_pb2.Grant, redeemed: _Redeemed, request: lease_pb2.LeaseKeyRequest
    ) -> bytes:
        """Return the sealed key; end the lease, on the record, where there is none."""
        kind = audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
        failure: ByokeepError
        try:
            self._check_fresh(grant.tenant, redeemed)
            return await self._seal(grant, redeemed, request)
        except (UnknownEnvelopeError, kek.KekMissingError):
            failure = _undecryptable(grant.key_id)
        except (EnvelopeError, kek.UnwrapError):
            failure = lifecycle.row_tampered("key", grant.key_id)
        except hpke.SealError:
            failure, kind = _not_a_recipient(grant.key_id), audit_pb2.AUDIT_EVENT_TYPE_RELEASED
        except ByokeepError as error:
            # Nothing is wrong with the row; the grant is spent, and its lease must not count.
            failure, kind = error, audit_pb2.AUDIT_EVENT_TYPE_RELEASED
        await self._ledger.change(
            grant.tenant,
            lambda tenant: ended_early(tenant, redeemed.lease, kind, failure.reason),
            {part_of(grant.key_id)},
        )
        raise failure

    def _check_fresh(self, tenant: str, redeemed: _Redeemed) -> None:
        """Refuse to open a key where this process may have been stopped since it was leased, or
        knows of an end since. Raises ByokeepError: AUDIT_UNAVAILABLE."""
        late = time.monotonic() - redeemed.committed > STALE_SECONDS
        if late or self._log.age > STALE_SECONDS or self._ledger.ends[tenant] != redeemed.ends:
            raise stale("looked at in time")

    async def _seal(
        self, grant: grant_pb2.Grant, redeemed: _Redeemed, request: lease_pb2.LeaseKeyRequest
    ) -> bytes:
        """Open the key, and seal it to the child while it is open."""
        wrapped, envelope = redeemed.secret
        lease_id = redeemed.lease.lease_id
        # The KEK's name, and what the envelope must be bound to, come from the grant, never from
        # what is stored.
        backend = self._backends.named(redeemed.backend)
        with kek.opened_for(lease_id), tracing.span("unwrap", backend=backend.name):
            opened = await backend.unwrap(kek.tenant_kek(grant.tenant), wrapped)
        context = Context(
            self._deployment,
            grant.tenant,
            grant.owner,
            provider_id(grant.provider),
            grant.key_id,
            grant.key_version,
        )
        with opened as data_key:
            plaintext = decrypt(data_key.reveal(), envelope, context)
        with Secret(plaintext) as key:
            return hpke.seal(
                request.suite,
                request.recipient_public_key,
                key.reveal(),
                lease_info(request.grant.payload, lease_id),
            )


def _event(order: _Order, kind: audit_pb2.AuditEventType.ValueType) -> audit_pb2.AuditEvent:
    grant = order.grant
    return audit_pb2.AuditEvent(
        type=kind,
        key_id=grant.key_id,
        key_version=grant.key_version,
        provider=grant.provider,
        owner=grant.owner,
        grant_id=grant.grant_id,
        review_id=grant.review_id,
        attempt_id=grant.attempt_id,
        fence=grant.fence,
        purpose=grant.purpose,
        caller=order.holder,
        actor=grant.actor,
    )


def _meter(tenant: Tenant, key_id: str) -> state_pb2.Meter:
    keys = tenant.parts[part_of(key_id)].edit_usage().keys
    own = next((one for one in keys if one.key_id == key_id), None) or keys.add(key_id=key_id)
    return own.meter


def _check_state(grant: grant_pb2.Grant, version: state_pb2.VersionState) -> None:
    state = State(version.state)
    if state in _STATES[grant.purpose]:
        return
    if state is State.NEEDS_REKEY:
        raise ByokeepError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "KEY_NEEDS_REKEY",
            "the provider rejected this key: it needs a new version",
            key=grant.key_id,
        )
    raise lifecycle.wrong_state(state, "it can't be leased for this purpose")


def _held(tenant: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "TENANT_NOT_ACTIVE",
        "an operator revoked this tenant's leases; none is given until one resumes it",
        tenant=tenant,
    )


def _undecryptable(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "UNDECRYPTABLE",
        "the key-encryption key is gone, or the envelope is of another version: undecryptable;"
        " a new version is needed",
        key=key_id,
    )


def _not_a_recipient(key_id: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "recipient_public_key: not a public key of that suite",
        field="recipient_public_key",
        key=key_id,
    )
