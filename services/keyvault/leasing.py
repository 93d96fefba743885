"""Leases: a grant redeemed once, the key opened and sealed to one child, wiped here.

The order matters. Signature and holder first; then `redemption`: time, state, caps, the
lease and its audit event; only when those are durable is the key decrypted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc
from byokeep import hpke
from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2
from byokeep.leasing import lease_info
from byokeep.names import provider_id
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common import tracing
from services.common.errors import ByokeepError
from services.common.secret import Secret
from services.keyvault import chain, domain, kek
from services.keyvault.database import Database
from services.keyvault.envelope import (
    Context,
    EnvelopeError,
    UnknownEnvelopeError,
    check_header,
    decrypt,
)
from services.keyvault.grants import GrantRefusedError, check_holder, refused, verify
from services.keyvault.redemption import LIFE, Redeemed, Redemption, lease_event
from services.keyvault.store import jobs as job_store
from services.keyvault.store import leases as store

_METHOD = "/byokeep.keyvault.v1.LeaseService/LeaseKey"


class Leasing:
    """Gives leases (see the module)."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        redemption: Redemption,
        grant_keys: Mapping[str, Ed25519PublicKey],
        deployment: str,
        denied: Callable[[str, str, str], None],
    ) -> None:
        """`denied` is told why a grant was refused, or a valid one not served."""
        self._database = database
        self._backends = backends
        self._redemption = redemption
        self._grant_keys = grant_keys
        self._deployment = deployment
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
            redeemed = await self._redemption.redeem(grant, holder)
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

    async def _open(
        self, grant: grant_pb2.Grant, redeemed: Redeemed, request: lease_pb2.LeaseKeyRequest
    ) -> bytes:
        """Return the sealed key; end the lease, on the record, where there is none."""
        kind = audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
        failure: ByokeepError
        try:
            return await self._seal(grant, redeemed, request)
        except kek.KekUnavailableError as error:
            # Nothing is wrong with the row; the grant is spent, and its lease must not count.
            failure, kind = error, audit_pb2.AUDIT_EVENT_TYPE_RELEASED
        except (UnknownEnvelopeError, kek.KekMissingError):
            failure = _undecryptable(grant.key_id)
        except (EnvelopeError, kek.UnwrapError):
            failure = domain.row_tampered("key", grant.key_id)
        except hpke.SealError:
            failure = _not_a_recipient(grant.key_id)
        await self._end(redeemed, kind, failure.reason)
        raise failure

    async def _seal(
        self, grant: grant_pb2.Grant, redeemed: Redeemed, request: lease_pb2.LeaseKeyRequest
    ) -> bytes:
        """Open the key, and seal it to the child while it is open."""
        lease_id, locked = redeemed.lease.lease_id, redeemed.locked
        if not (locked.envelope and locked.wrapped_dek):
            raise EnvelopeError("nothing is stored")
        check_header(locked.envelope)
        # The KEK's name, and what the envelope must be bound to, come from the grant, never
        # from the row.
        backend = self._backends.named(locked.key.versions[0].kek_backend)
        with kek.opened_for(lease_id), tracing.span("unwrap", backend=backend.name):
            opened = await backend.unwrap(kek.tenant_kek(grant.tenant), locked.wrapped_dek)
        context = Context(
            self._deployment,
            grant.tenant,
            grant.owner,
            provider_id(grant.provider),
            grant.key_id,
            grant.key_version,
        )
        with opened as data_key:
            plaintext = decrypt(data_key.reveal(), locked.envelope, context)
        with Secret(plaintext) as key:
            return hpke.seal(
                request.suite,
                request.recipient_public_key,
                key.reveal(),
                lease_info(request.grant.payload, lease_id),
            )

    async def _end(
        self, redeemed: Redeemed, kind: audit_pb2.AuditEventType.ValueType, reason: str
    ) -> None:
        """End a lease whose key could not be sealed, on the record."""
        lease, key = redeemed.lease, redeemed.locked.key
        event = lease_event(lease, key.provider, key.owner, kind)
        event.reason, event.outcome = reason, lease_pb2.LEASE_OUTCOME_FAILED
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(lease.tenant))
            await chain.append(connection, head, self._deployment, [event])
            await store.close(connection, lease.lease_id, lease_pb2.LEASE_OUTCOME_FAILED)
            if reason in ("ROW_TAMPERED", "UNDECRYPTABLE"):
                failure = job_store.Failure(lease.key_id, lease.version, reason)
                await job_store.unopened(connection, lease.tenant, [failure], None)


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
