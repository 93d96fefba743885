"""The reconcile pass: rows against chains, and chains against the anchored log.

A row that was restored whole has a valid MAC of its own past; only the chain knows
that it is past. The pass follows every chain, checks its links, keeps the last state
that it gives each key version, and freezes versions whose row says otherwise. A chain
whose end was cut off is caught by the log: every leaf must be the head of its chain
at that time, and the leaves are what is anchored outside the database.
"""

from __future__ import annotations

import datetime
import hmac
import logging
import time
from dataclasses import dataclass, field

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf.message import DecodeError

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import chain, merkle
from services.keyvault.anchor import STALE_SECONDS, Anchor, stale
from services.keyvault.background import each
from services.keyvault.database import Database, Row
from services.keyvault.domain import STATE_AFTER, State
from services.keyvault.store import audit as store

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 20.0
_MISMATCH = "RECONCILE_MISMATCH"

_ROWS = "SELECT key_id, version, state, state_sequence FROM key_version WHERE tenant = %s"
_HOLD = "SELECT held, state_sequence FROM tenant_hold WHERE tenant = %s"
_HOLDS = {
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_REVOKED: True,
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_RESUMED: False,
}
_TENANTS = "SELECT DISTINCT tenant FROM key_version"

_Version = tuple[str, int]


@dataclass(slots=True)
class _Followed:
    """How far a chain was followed, the states that it gives, and what is frozen."""

    sequence: int = 0
    hash: bytes = chain.GENESIS
    broken: bool = False
    states: dict[_Version, tuple[State, int]] = field(default_factory=dict)
    frozen: set[_Version] = field(default_factory=set)
    #: Whether an operator held the tenant's leases back, and by which event.
    hold: tuple[bool, int] | None = None
    hold_differs: bool = False

    def agrees(self, key_id: str, version: int, state: int, sequence: int) -> bool:
        """Say whether the chain gives a version that state, by that event."""
        return not self.broken and self.states.get((key_id, version)) == (state, sequence)

    def take(self, row: Row) -> bool:
        """Take in the next link; False where it does not continue the chain."""
        sequence, body, previous, digest = row
        if (
            sequence != self.sequence + 1
            or not hmac.compare_digest(previous, self.hash)
            or not hmac.compare_digest(digest, chain.link_hash(previous, body))
        ):
            return False
        try:
            event = audit_pb2.AuditEvent.FromString(body)
        except DecodeError:
            return False
        version = (event.key_id, event.key_version)
        if event.type in STATE_AFTER:
            self.states[version] = (STATE_AFTER[event.type], sequence)
        if event.type in _HOLDS:
            self.hold = (_HOLDS[event.type], sequence)
        # What was frozen stays so in the chain: no column that SQL could clear.
        if event.reason == _MISMATCH:
            self.frozen.add(version)
        self.sequence, self.hash = sequence, digest
        return True


class Reconcile:
    """Follows chains, freezes versions that differ, distrusts a log that contradicts."""

    def __init__(self, database: Database, anchor: Anchor, deployment: str) -> None:
        """Reconcile a database."""
        self._database = database
        self._anchor = anchor
        self._deployment = deployment
        self._followed: dict[str, _Followed] = {}
        self._leaves = 0
        self._passed = 0.0
        self.last: datetime.datetime | None = None

    def refusal(self, tenant: str, key_id: str, version: int) -> ByokeepError | None:
        """Return why this version may not be leased now."""
        followed = self._followed.get(chain.tenant_chain(tenant))
        if followed is not None and followed.hold_differs:
            return ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                _MISMATCH,
                "whether this tenant may have leases is stored otherwise than its audit chain"
                f" says; none is given: byokeep admin revoke-tenant {tenant}, then resume-tenant",
                tenant=tenant,
            )
        if followed is not None and (key_id, version) in followed.frozen:
            return ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                _MISMATCH,
                "this key's row and its audit chain disagree; it is frozen:"
                f" byokeep key rotate {key_id}",
                key=key_id,
            )
        if time.monotonic() - self._passed > STALE_SECONDS:
            return stale("reconciled")
        return None

    async def once(self) -> None:
        """Do one pass: the log, then every tenant."""
        await self._check_log()
        tenants = [row[0] for row in await self._database.all(_TENANTS)]
        await each("reconcile_tenant", tenants, self._tenant)
        self._passed = time.monotonic()
        self.last = datetime.datetime.now(datetime.UTC)

    def frozen(self) -> int:
        """Return how many keys are frozen."""
        return sum(len({key for key, _ in one.frozen}) for one in self._followed.values())

    async def _check_log(self) -> None:
        self._leaves = max(self._leaves, self._anchor.accepted)
        while rows := await store.leaf_heads(self._database, self._leaves):
            for index, name, sequence, blind, leaf, head in rows:
                expected = merkle.leaf_hash(fields(blind, name, sequence, head or b""))
                if head is None or not hmac.compare_digest(leaf, expected):
                    await self._anchor.distrust()
                    return
                self._leaves = index + 1

    async def _tenant(self, tenant: str) -> None:
        # The rows first, so that the chain is never older than they are.
        rows = await self._database.all(_ROWS, (tenant,))
        hold = await self._database.one(_HOLD, (tenant,))
        followed = await self._follow(chain.tenant_chain(tenant))
        if hold != followed.hold:
            # As below: it may have changed meanwhile, so both are read again.
            hold = await self._database.one(_HOLD, (tenant,))
            await self._follow(chain.tenant_chain(tenant))
        followed.hold_differs = hold != followed.hold
        for row in rows:
            await self._compare(tenant, followed, row)

    async def _follow(self, name: str) -> _Followed:
        followed = self._followed.setdefault(name, _Followed())
        async for row in store.links(self._database, name, followed.sequence):
            if not followed.take(row):
                followed.broken = True
                break
        return followed

    async def _compare(self, tenant: str, followed: _Followed, row: Row) -> None:
        key_id, version, state, sequence = row
        if (key_id, version) in followed.frozen or followed.agrees(*row):
            return
        # The row may have changed after its chain was read: follow once more.
        await self._follow(chain.tenant_chain(tenant))
        if not followed.agrees(key_id, version, state, sequence):
            followed.frozen.add((key_id, version))
            await self._record(tenant, key_id, version)

    async def _record(self, tenant: str, key_id: str, version: int) -> None:
        logs.event(log, "key_frozen", level=logging.CRITICAL, tenant=tenant, key=key_id)
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
            key_id=key_id,
            key_version=version,
            reason=_MISMATCH,
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            await chain.append(connection, head, self._deployment, [event])
