"""The reconcile pass: rows against chains.

A row that was restored whole has a valid MAC of its own past; only the chain knows
that it is past. The pass follows every chain, checks its links, keeps the last state
that it gives each key version, and freezes rows that say otherwise.
"""

from __future__ import annotations

import asyncio
import datetime
import hmac
import logging
from dataclasses import dataclass, field

from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import chain
from services.keyvault.database import Database, Row
from services.keyvault.domain import STATE_AFTER, State
from services.keyvault.store import audit as store

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 20.0

_ROWS = "SELECT key_id, version, state, state_sequence, frozen FROM key_version WHERE tenant = %s"
_TENANTS = "SELECT DISTINCT tenant FROM key_version"
_FREEZE = "UPDATE key_version SET frozen = %s WHERE tenant = %s AND key_id = %s AND version = %s"
_FROZEN = "SELECT count(DISTINCT (tenant, key_id)) FROM key_version WHERE frozen IS NOT NULL"

_Version = tuple[str, int]


@dataclass(slots=True)
class _Followed:
    """How far a chain was followed, and the states that it gives."""

    sequence: int = 0
    hash: bytes = chain.GENESIS
    broken: bool = False
    states: dict[_Version, tuple[State, int]] = field(default_factory=dict)

    def agrees(self, key_id: str, version: int, state: int, sequence: int) -> bool:
        """Say whether the chain gives a version that state, by that event."""
        return not self.broken and self.states.get((key_id, version)) == (state, sequence)


class Reconcile:
    """Follows chains and freezes rows that differ."""

    def __init__(self, database: Database, deployment: str) -> None:
        """Reconcile a database."""
        self._database = database
        self._deployment = deployment
        self._followed: dict[str, _Followed] = {}
        self.last: datetime.datetime | None = None

    async def run(self) -> None:
        """Pass again and again, until cancelled."""
        while True:
            try:
                await self.once()
            except ByokeepError as error:
                logs.failure(log, "reconcile_failed", error)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def once(self) -> None:
        """Do one pass over every tenant."""
        for (tenant,) in await self._database.all(_TENANTS):
            rows = await self._database.all(_ROWS, (tenant,))
            followed = await self._follow(chain.tenant_chain(tenant))
            for row in rows:
                await self._compare(tenant, followed, row)
        self.last = datetime.datetime.now(datetime.UTC)

    async def frozen(self) -> int:
        """Return how many keys are frozen."""
        row = await self._database.one(_FROZEN)
        return int(row[0]) if row else 0

    async def _follow(self, name: str) -> _Followed:
        followed = self._followed.setdefault(name, _Followed())
        async for sequence, body, previous, digest in store.links(
            self._database, name, followed.sequence
        ):
            whole = (
                sequence == followed.sequence + 1
                and hmac.compare_digest(previous, followed.hash)
                and hmac.compare_digest(digest, chain.link_hash(previous, body))
            )
            if not whole:
                followed.broken = True
                break
            event = audit_pb2.AuditEvent.FromString(body)
            state = STATE_AFTER.get(event.type)
            if state is not None:
                followed.states[event.key_id, event.key_version] = (state, sequence)
            followed.sequence, followed.hash = sequence, digest
        return followed

    async def _compare(self, tenant: str, followed: _Followed, row: Row) -> None:
        key_id, version, state, sequence, frozen = row
        if frozen is not None or followed.agrees(key_id, version, state, sequence):
            return
        # The row may have changed after its chain was read: follow once more.
        await self._follow(chain.tenant_chain(tenant))
        if not followed.agrees(key_id, version, state, sequence):
            await self._freeze(tenant, key_id, version)

    async def _freeze(self, tenant: str, key_id: str, version: int) -> None:
        logs.event(log, "key_frozen", level=logging.CRITICAL, tenant=tenant, key=key_id)
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
            key_id=key_id,
            key_version=version,
            reason="RECONCILE_MISMATCH",
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(tenant))
            await chain.append(connection, head, self._deployment, [event])
            await connection.execute(_FREEZE, ("RECONCILE_MISMATCH", tenant, key_id, version))
