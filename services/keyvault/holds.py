"""Holds: all of a tenant's leases end now, and none is given until an operator resumes.

A hold is reversible, so it touches no key version: what a tenant had is what it has when
it is resumed. It is stored with a MAC over the event that set it, as states of versions
are, and the reconcile pass holds row and chain against each other.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, lease_pb2

from services.common.errors import ByokeepError
from services.keyvault import chain, domain
from services.keyvault.custody import end_leases
from services.keyvault.database import Connection, Database
from services.keyvault.store import holds as store
from services.keyvault.store import leases as lease_store

_KINDS = {held: kind for kind, held in domain.HELD_AFTER.items()}


@dataclass(frozen=True, slots=True)
class Word:
    """An operator's word: the caller's identity, and why."""

    caller: str
    reason: str


class Holds:
    """Ends leases on an operator's word (see the module)."""

    def __init__(self, database: Database, mac_key: bytes, deployment: str) -> None:
        """Use keyvault's state MAC key."""
        self._database = database
        self._mac_key = mac_key
        self._deployment = deployment

    def check(self, tenant: str, hold: store.Hold | None) -> None:
        """Refuse a lease of a tenant that is held.

        Raises:
            ByokeepError: TENANT_NOT_ACTIVE; STATE_TAMPERED where the MAC does not verify.
        """
        if hold is None:
            return
        held = self._said(tenant, hold)
        if held is None:
            raise ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                "STATE_TAMPERED",
                "what is stored of a hold of this tenant's leases fails its authentication;"
                " no lease is given",
                tenant=tenant,
            )
        if held:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "TENANT_NOT_ACTIVE",
                "an operator revoked this tenant's leases; none is given until one resumes it",
                tenant=tenant,
            )

    async def revoke_tenant(self, tenant: str, word: Word) -> int:
        """End every lease of a tenant and give none until it is resumed; return how many ended.

        Said as often as it is asked: a row that says so already may be put back for a moment.

        Raises:
            ByokeepError: TENANT_KEY_MISSING.
        """
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            ended = await end_leases(connection, tenant)
            await self._say(connection, head, tenant, word, held=True, count=ended)
        return ended

    async def resume_tenant(self, tenant: str, word: Word) -> bool:
        """Give leases to a tenant again; False where it was not held.

        Raises ByokeepError: TENANT_KEY_MISSING.
        """
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            if self._said(tenant, await store.get(connection, tenant)) is False:
                return False
            await self._say(connection, head, tenant, word, held=False, count=0)
        return True

    async def revoke_lease(self, lease_id: str, word: Word) -> bool:
        """End one lease; False where it had ended before. Raises ByokeepError: NOT_FOUND."""
        async with self._database.transaction() as connection:
            locked = (await lease_store.lock_leases(connection, [lease_id])).get(lease_id)
            if locked is None:
                raise domain.not_found("lease")
            lease = locked.lease
            ended = await lease_store.revoke(
                connection, lease.tenant, None, None, lease_pb2.LEASE_OUTCOME_CANCELLED, lease_id
            )
            event = audit_pb2.AuditEvent(
                type=audit_pb2.AUDIT_EVENT_TYPE_LEASE_REVOKED,
                key_id=lease.key_id,
                key_version=lease.version,
                lease_id=lease_id,
                grant_id=lease.grant_id,
                review_id=lease.review_id,
                attempt_id=lease.attempt_id,
                fence=lease.fence,
                caller=word.caller,
                detail=word.reason,
            )
            await chain.append(connection, locked.head, self._deployment, [event] * bool(ended))
        return bool(ended)

    async def _say(
        self,
        connection: Connection,
        head: chain.Head,
        tenant: str,
        word: Word,
        *,
        held: bool,
        count: int,
    ) -> None:
        """Store what is said, with its event."""
        event = audit_pb2.AuditEvent(
            type=_KINDS[held], caller=word.caller, detail=word.reason, count=count
        )
        head = await chain.append(connection, head, self._deployment, [event])
        mac = self._mac(tenant, head.sequence, held=held)
        await store.put(connection, tenant, (held, head.sequence, mac))

    def _said(self, tenant: str, current: store.Hold | None) -> bool | None:
        """Return what was said before; None where somebody else wrote it."""
        if current is None:
            return False
        held, sequence, mac = current
        sound = hmac.compare_digest(mac, self._mac(tenant, sequence, held=held))
        return held if sound else None

    def _mac(self, tenant: str, sequence: int, *, held: bool) -> bytes:
        message = fields("byokeep/hold/v1", self._deployment, tenant, int(held), sequence)
        return hmac.digest(self._mac_key, message, hashlib.sha256)
