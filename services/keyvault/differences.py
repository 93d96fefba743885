"""Where a row and its chain differ: which is right, and what that stops.

A difference is settled under the chain's lock, when neither can move. A version whose row
is not what the chain says is frozen, on the record; where it can't be found out, its
tenant has no lease until it can.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import grpc
from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain
from services.keyvault.anchor import stale
from services.keyvault.database import Connection, Database, Row
from services.keyvault.domain import Key, State, wrong_state
from services.keyvault.following import MISMATCH, Following
from services.keyvault.store import reconcile as store
from services.keyvault.store.holds import Hold

log = logging.getLogger(__name__)
#: In the place of a version: the tenant's hold.
_HOLD = ("", 0)


class Differences:
    """Settles differences, and refuses what they stop (see the module)."""

    def __init__(self, database: Database, following: Following, deployment: str) -> None:
        """Hold a database's rows against what was followed."""
        self._database = database
        self._following = following
        self._deployment = deployment
        #: Tenants of which the row and the chain differ on whether they are held.
        self.holds_differ: set[str] = set()
        #: By tenant, what differed where it could not be found out which of both is right.
        self._unsettled: dict[str, set[store.Bound]] = {}

    def refusal(self, key: Key, hold: Hold | None, head: int) -> ByokeepError | None:
        """Return why a key's one version may not be leased, with its row, its tenant's hold and the
        number of the chain's head as read under the chain's lock: rows that are put back for a
        moment only, no pass may ever see."""
        tenant, key_id, (version,) = key.tenant, key.key_id, key.versions
        if chain.tenant_chain(tenant) in self._following.broken:
            return chain_broken(tenant)
        told = self._following.told(tenant, key_id, version.version)
        over = told.over(version.state_sequence)
        if over is not None and not told.frozen:
            return wrong_state(over, "it can't be leased for this purpose")
        # What a row says and is not newer than what was followed, the chain told too.
        new = range(self._following.sequence(chain.tenant_chain(tenant)) + 1, head + 1)
        own = version.state, version.state_sequence
        invented = own[1] not in new and own != (told.state, told.sequence)
        if told.frozen or invented or told.outdated(*own):
            return mismatch(key_id)
        held = (False, 0) if hold is None else hold[:2]
        invented = held[1] not in new and held != self._following.holds.get(tenant, (False, 0))
        if tenant in self.holds_differ or invented:
            return ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                MISMATCH,
                "whether this tenant may have leases is stored otherwise than its audit chain"
                " says; none is given until an operator revokes the tenant's leases and resumes",
                tenant=tenant,
            )
        return stale("reconciled") if tenant in self._unsettled else None

    async def again(self) -> None:
        """Try to settle what could not be settled before."""
        await self._settle([one for open_ in self._unsettled.values() for one in open_])

    async def holds(self) -> None:
        """Hold what is stored of tenants' holds against their chains."""
        stored = await store.holds(self._database)
        tenants = stored.keys() | self._following.holds.keys()
        differ = {one for one in tenants if stored.get(one) != self._following.holds.get(one)}
        self.holds_differ &= differ
        await self._settle([(tenant, *_HOLD) for tenant in differ])

    async def _settle(self, differing: Iterable[store.Bound]) -> None:
        """Find out what is right, under the chains' locks. Where that fails, whatever it is that
        fails, the tenant has no lease until it succeeds."""

        async def settle(one: store.Bound) -> None:
            tenant = one[0]
            open_ = self._unsettled.get(tenant, set())
            try:
                await (self._confirm_hold(tenant) if one[1:] == _HOLD else self._confirm(*one))
            except Exception:
                self._unsettled[tenant] = open_ | {one}
                raise
            if open_ == {one}:
                del self._unsettled[tenant]
            open_.discard(one)

        await each("settle", differing, settle)

    async def _confirm_hold(self, tenant: str) -> None:
        """Follow the chain under its lock, when neither it nor the row can change."""
        name = chain.tenant_chain(tenant)
        async with self._database.transaction() as connection:
            await chain.lock(connection, name)
            now = await store.hold(connection, tenant)
            await self._following.follow(name)
        if now == self._following.holds.get(tenant):
            self.holds_differ.discard(tenant)
        elif tenant not in self.holds_differ:
            self.holds_differ.add(tenant)
            logs.event(log, "hold_differs", level=logging.CRITICAL, tenant=tenant)

    async def agree(self, rows: list[Row]) -> bool:
        """Hold rows against the chains; freeze those that differ, once that is sure."""
        # One by one: what settles a row may settle those after it.
        await self._settle((row[0], row[1], row[2]) for row in rows if not self._settled(row))
        return all(map(self._settled, rows))

    def _settled(self, row: Row) -> bool:
        tenant, key_id, version, state, sequence = row
        if chain.tenant_chain(tenant) in self._following.broken:
            return True
        told = self._following.told(tenant, key_id, version)
        over = told.over(sequence)
        alive = over is not None and state not in (over, State.DESTROYED)
        differs = alive or told.outdated(state, sequence)
        return told.frozen or (not differs and (told.state, told.sequence) == (state, sequence))

    async def _confirm(self, tenant: str, key_id: str, version: int) -> None:
        """Follow the chain once more under its lock, when neither it nor the row can change."""
        name = chain.tenant_chain(tenant)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            now = await store.row(connection, tenant, key_id, version)
            await self._following.follow(name)
            differs = now is not None and not self._settled((tenant, key_id, version, *now))
            if differs:
                await self._freeze(connection, head, tenant, key_id, version)
        if differs:
            # Only now: what could not be put on the record is looked at again.
            states = self._following.states
            states.freeze(states.fingerprint(tenant, key_id, version))

    async def _freeze(
        self, connection: Connection, head: chain.Head, tenant: str, key_id: str, version: int
    ) -> None:
        logs.event(log, "key_frozen", level=logging.CRITICAL, tenant=tenant, key=key_id)
        await self._record(
            connection, head, audit_pb2.AuditEvent(key_id=key_id, key_version=max(version, 0))
        )

    async def freeze_revived(self, version: store.Bound) -> None:
        """Put on the record that a version is frozen, of which the chain tells what can't be."""
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.tenant_chain(version[0]))
            await self._freeze(connection, head, *version)
        self._following.revived.discard(version)

    async def freeze_tenant(self, name: str) -> None:
        """Put on the record that a chain is broken: in the system chain, for it can't speak for
        itself any more. Every replica follows that one, and every restart."""
        logs.event(log, "chain_broken", level=logging.CRITICAL, chain=name)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            await self._record(connection, head, audit_pb2.AuditEvent(detail=name))
        self._following.found.discard(name)

    async def _record(
        self, connection: Connection, head: chain.Head, event: audit_pb2.AuditEvent
    ) -> None:
        event.type = audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED
        event.reason = MISMATCH
        await chain.append(connection, head, self._deployment, [event])


def chain_broken(tenant: str) -> ByokeepError:
    """Return the error for a tenant whose chain contradicts itself or the log."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        MISMATCH,
        "this tenant's audit chain was altered: none of its keys is leased or activated again;"
        " an operator looks into it, and the tenant needs a new name",
        chain=chain.tenant_chain(tenant),
    )


def mismatch(key_id: str) -> ByokeepError:
    """Return the error for a key whose row and chain disagree."""
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        MISMATCH,
        "this key's row and its audit chain disagree; it is frozen until it is rotated",
        key=key_id,
    )
