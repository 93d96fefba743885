"""The reconcile pass: rows against chains, and chains against the anchored log.

A row that was restored whole has a valid MAC of its own past; only the chain knows
that it is past. keyvault follows the chains, holds the last state that they give each
version in memory, and freezes versions whose row says otherwise. A chain whose end
was cut off is caught by the log, whose leaves are anchored outside the database.
docs/decisions/0008-reconcile.md says what this costs and what it can't see.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import grpc
from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import chain
from services.keyvault.anchor import STALE_SECONDS, Anchor, stale
from services.keyvault.background import each
from services.keyvault.database import Connection, Database, Row, is_lost
from services.keyvault.following import MISMATCH, ContradictionError, Following
from services.keyvault.pages import Pages
from services.keyvault.store import reconcile as store

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 20.0
SAVE_SECONDS = 600.0
_HEADS = 20_000
#: In the place of a version: the tenant's hold.
_HOLD = ("", 0)
T = TypeVar("T")


class Reconcile:
    """Follows chains, freezes versions that differ, distrusts a log that contradicts."""

    def __init__(self, database: Database, anchor: Anchor, mac_key: bytes, deployment: str) -> None:
        """Reconcile a database."""
        self._database = database
        self._anchor = anchor
        self._deployment = deployment
        self._passing = asyncio.Lock()
        self._pages = Pages(database, self._agree)
        self.following = Following(database, mac_key, self._pages.touch)
        self._broken_keys: dict[str, int] = {}
        #: Tenants of which the row and the chain differ on whether they are held.
        self._holds_differ: set[str] = set()
        #: By tenant, what differed where it could not be found out which of both is right.
        self._unsettled: dict[str, set[store.Bound]] = {}
        #: Heads that their rows say are logged, and the log was not seen to have.
        self._claimed: dict[str, int] = {}
        self._position = anchor.position
        self._after = ""
        self._passed = -math.inf
        self._saved = time.monotonic()
        self.last: datetime.datetime | None = None

    def refusal(self, tenant: str, key_id: str, version: int) -> ByokeepError | None:
        """Return why this version may not be leased now."""
        states = self.following.states
        frozen = states.get(states.fingerprint(tenant, key_id, version))[2]
        if frozen or chain.tenant_chain(tenant) in self.following.broken:
            return ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                MISMATCH,
                "this key's row and its audit chain disagree; it is frozen:"
                f" byokeep key rotate {key_id}",
                key=key_id,
            )
        if tenant in self._holds_differ:
            return ByokeepError(
                grpc.StatusCode.DATA_LOSS,
                MISMATCH,
                "whether this tenant may have leases is stored otherwise than its audit chain"
                f" says; none is given: byokeep admin revoke-tenant {tenant}, then resume-tenant",
                tenant=tenant,
            )
        if tenant in self._unsettled or time.monotonic() - self._passed > STALE_SECONDS:
            return stale("reconciled")
        return None

    @property
    def rolled_back(self) -> bool:
        """Whether the database contradicts its anchor."""
        return self._anchor.rolled_back

    async def once(self) -> None:
        """Do one pass: the log with its chains, heads, then rows."""
        async with self._passing:
            if self._anchor.rolled_back:
                return
            contradiction = ""
            try:
                await self._pass()
            except ContradictionError as error:
                contradiction = str(error)
            except Exception as error:
                # A lost connection is forgiven for a minute; what is stored is not.
                if not is_lost(error):
                    self._passed = -math.inf
                raise
            if not contradiction:
                return
            logs.event(log, "contradiction", level=logging.CRITICAL, what=contradiction)
            self._forget()
            await self._anchor.distrust()

    async def head(self, name: str) -> chain.Head:
        """Return a chain's head as this process followed it, link by link: what may be signed.

        Raises:
            ByokeepError: TENANT_KEY_MISSING where there is no such chain; RECONCILE_MISMATCH where
                its links don't lead to the head that the database states.
        """

        async def that(connection: Connection, head: chain.Head, versions: int) -> chain.Head:
            return head

        return await self.at_head(name, that)

    async def at_head(
        self, name: str, act: Callable[[Connection, chain.Head, int], Awaitable[T]]
    ) -> T:
        """Act at a chain's followed head, under its lock; told how many key versions the chain has.

        Raises:
            ByokeepError: as `head`; nothing was done.
        """
        async with self._passing, self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            if await self.following.follow(name):
                await self._broken(connection, head)
            followed = self.following.chains[name]
            broken = name in self.following.broken
            if followed.logged < head.sequence:
                self._anchor.owe(name)
            if not broken and (followed.sequence, followed.hash) == (head.sequence, head.hash):
                versions = self.following.versions.get(name.removeprefix(chain.TENANTS), 0)
                return await act(connection, head, versions)
        raise ByokeepError(
            grpc.StatusCode.DATA_LOSS,
            MISMATCH,
            "this chain's links are broken; its head is not signed",
            chain=name,
        )

    async def save(self) -> None:
        """Keep what was followed, so that the next start need not follow it again."""
        async with self._passing:
            if self._anchor.rolled_back or self._passed == -math.inf:
                return
            async with self._database.transaction() as connection:
                await store.save(connection, self.following.snapshot())
            self._saved = time.monotonic()

    async def save_if_due(self) -> None:
        """Save, where that was not done for ten minutes."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            await self.save()

    def frozen(self) -> int:
        """Return how many keys are frozen: versions on their own, and all keys of a tenant whose
        chain is broken."""
        return self.following.states.frozen + sum(self._broken_keys.values())

    async def _pass(self) -> None:
        position = self._anchor.position
        if position.resumed != self.following.resumed:
            self._forget()
        await each("freeze_tenant", await self.following.log(position), self._freeze_tenant)
        await self._check_heads()
        await self._settle([one for open_ in self._unsettled.values() for one in open_])
        await self._check_holds()
        await self._pages.look()
        for name in self.following.broken - self._broken_keys.keys():
            tenant = name.removeprefix(chain.TENANTS)
            self._broken_keys[name] = await store.keys(self._database, tenant)
        self._passed = time.monotonic()
        self.last = datetime.datetime.now(datetime.UTC)

    def _forget(self) -> None:
        self.following.forget(self._anchor.position)
        self._pages.forget()
        self._broken_keys.clear()
        self._claimed.clear()

    async def _check_heads(self) -> None:
        """Look at some thousand heads: none may be before what was followed, and what is said to
        be in the log must be there by the next pass."""
        heads = await store.heads(self._database, self._after, _HEADS)
        claimed = {}
        for name, sequence, logged in heads:
            if self.following.behind(name, sequence):
                raise ContradictionError(f"the end of {name} was cut off")
            if logged >= sequence > self.following.logged(name):
                claimed[name] = sequence
        self._after = heads[-1][0] if len(heads) == _HEADS else ""
        if self._position is self._anchor.position:
            return  # nothing was anchored since: what was claimed then may still come
        for name, sequence in self._claimed.items():
            if self.following.logged(name) < sequence:
                logs.event(log, "head_kept_from_log", level=logging.CRITICAL, chain=name)
                self._anchor.owe(name)
        self._claimed, self._position = claimed, self._anchor.position

    async def _check_holds(self) -> None:
        """Hold what is stored of tenants' holds against their chains."""
        stored = await store.holds(self._database)
        tenants = stored.keys() | self.following.holds.keys()
        differ = {one for one in tenants if stored.get(one) != self.following.holds.get(one)}
        self._holds_differ &= differ
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
            await self.following.follow(name)
        if now == self.following.holds.get(tenant):
            self._holds_differ.discard(tenant)
        elif tenant not in self._holds_differ:
            self._holds_differ.add(tenant)
            logs.event(log, "hold_differs", level=logging.CRITICAL, tenant=tenant)

    async def _agree(self, rows: list[Row]) -> bool:
        """Hold rows against the chains; freeze those that differ, once that is sure."""
        # One by one: what settles a row may settle those after it.
        await self._settle((row[0], row[1], row[2]) for row in rows if not self._settled(row))
        return all(map(self._settled, rows))

    def _settled(self, row: Row) -> bool:
        tenant, key_id, version, state, sequence = row
        states = self.following.states
        return chain.tenant_chain(tenant) in self.following.broken or states.agrees(
            states.fingerprint(tenant, key_id, version), state, sequence
        )

    async def _confirm(self, tenant: str, key_id: str, version: int) -> None:
        """Follow the chain once more under its lock, when neither it nor the row can change."""
        name = chain.tenant_chain(tenant)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            now = await store.row(connection, tenant, key_id, version)
            broken = await self.following.follow(name)
            if broken:
                await self._broken(connection, head)
            elif now is not None and not self._settled((tenant, key_id, version, *now)):
                await self._freeze(connection, head, tenant, key_id, version)

    async def _freeze(
        self, connection: Connection, head: chain.Head, tenant: str, key_id: str, version: int
    ) -> None:
        states = self.following.states
        states.freeze(states.fingerprint(tenant, key_id, version))
        logs.event(log, "key_frozen", level=logging.CRITICAL, tenant=tenant, key=key_id)
        await self._record(connection, head, key_id, version)

    async def _freeze_tenant(self, name: str) -> None:
        async with self._database.transaction() as connection:
            await self._broken(connection, await chain.lock(connection, name))

    async def _broken(self, connection: Connection, head: chain.Head) -> None:
        logs.event(log, "chain_broken", level=logging.CRITICAL, chain=head.chain)
        await self._record(connection, head, "", 0)

    async def _record(
        self, connection: Connection, head: chain.Head, key_id: str, version: int
    ) -> None:
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
            key_id=key_id,
            key_version=version,
            reason=MISMATCH,
        )
        await chain.append(connection, head, self._deployment, [event])
