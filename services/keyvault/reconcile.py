"""The reconcile pass: rows against chains, and chains against the anchored log.

A row that was restored whole has a valid MAC of its own past; only the chain knows
that it is past. keyvault follows the chains, holds the last state that they give each
version in memory, and freezes versions whose row says otherwise. A chain whose end
was cut off is caught by the log, whose leaves are anchored outside the database.
docs/decisions/0008-reconcile.md says what this costs and what it can't see.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain
from services.keyvault.anchor import STALE_SECONDS, Anchor, stale
from services.keyvault.database import Connection, Database, is_lost
from services.keyvault.differences import Differences, chain_broken
from services.keyvault.following import (
    MISMATCH,
    BehindError,
    ContradictionError,
    Following,
    Told,
)
from services.keyvault.pages import Pages
from services.keyvault.store import reconcile as store
from services.keyvault.store.leases import Locked

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 20.0
SAVE_SECONDS = 600.0
_HEADS = 20_000
# As in the protos: no other name has keys.
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
T = TypeVar("T")


class Reconcile:
    """Follows chains, freezes versions that differ, distrusts a log that contradicts."""

    def __init__(
        self,
        database: Database,
        reading: Database,
        anchor: Anchor,
        mac_key: bytes,
        deployment: str,
    ) -> None:
        """Reconcile a database. Chains are followed on connections of their own (`reading`):
        whoever holds a chain's lock must not wait for those who wait for it."""
        self._database = database
        self._anchor = anchor
        self._passing = asyncio.Lock()
        self.following = Following(reading, mac_key, lambda version: self._pages.touch(version))
        self._differences = Differences(database, self.following, deployment)
        self._pages = Pages(database, self._differences.agree)
        self._broken_keys: dict[str, int] = {}
        #: Heads that the log was not seen to have when they were looked at.
        self._claimed: dict[str, int] = {}
        self._claimed_at = -math.inf
        #: Chains of which a lease saw more than was followed.
        self._ahead: set[str] = set()
        self._after = ""
        self._passed = -math.inf
        self._saved = time.monotonic()
        self.last: datetime.datetime | None = None

    def refusal(self, locked: Locked) -> ByokeepError | None:
        """Return why this version may not be leased now."""
        if locked.head.sequence > self.following.sequence(locked.head.chain):
            # Followed by the next pass, also where it was kept from the log.
            self._ahead.add(locked.head.chain)
        differs = self._differences.refusal(locked.key, locked.hold, locked.head.sequence)
        # What another replica's operator resumed, this one has not followed yet.
        resumed = self.following.resumed == self._anchor.position.resumed
        if differs is None and (not resumed or time.monotonic() - self._passed > STALE_SECONDS):
            return stale("reconciled")
        return differs

    def told(self, tenant: str, key_id: str, version: int) -> Told:
        """Return what a chain tells of a version, as far as chains were followed; nothing of a past
        that the database does not have any more."""
        if self.rolled_back or self.following.resumed != self._anchor.position.resumed:
            return Told(0, 0, False, 0, 0, 0)
        return self.following.told(tenant, key_id, version)

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
                await self._pass_started()
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

    async def _pass_started(self) -> None:
        while True:
            size = self._anchor.position.size
            try:
                return await self._pass()
            except BehindError:
                # Another replica may have anchored, and kept, more than this one knew of.
                await self._anchor.tick()
                if self._anchor.rolled_back:
                    return
                if self._anchor.position.size <= size:
                    raise

    async def head(self, name: str) -> chain.Head:
        """Return a chain's head as this process followed it, link by link: what may be signed.

        Raises:
            ByokeepError: TENANT_KEY_MISSING where there is no such chain; RECONCILE_MISMATCH where
                its links don't lead to the head that the database states.
        """

        async def that(connection: Connection, head: chain.Head, versions: int) -> chain.Head:
            return head

        return await self.at_head(name, that)

    async def follow(self, name: str) -> None:
        """Follow a chain to its end as it is now; what is wrong with it, a pass says."""
        async with self._passing:
            with contextlib.suppress(ContradictionError):
                await self.following.follow(name)

    async def at_head(
        self, name: str, act: Callable[[Connection, chain.Head, int], Awaitable[T]]
    ) -> T:
        """Act at a chain's followed head, under its lock; told how many key versions the chain has.

        Raises:
            ByokeepError: as `head`; nothing was done.
        """
        async with self._passing, self._database.transaction() as connection:
            head = await chain.lock(connection, name)
            broken = False
            try:
                await self.following.follow(name)
            except ContradictionError:
                broken = True  # of the system chain; a pass says what that means
            followed = self.following.chains[name]
            broken = broken or name in self.following.broken
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

    def check_chain(self, tenant: str) -> None:
        """Refuse what a tenant with a broken chain can't have. Raises ByokeepError:
        RECONCILE_MISMATCH."""
        if chain.tenant_chain(tenant) in self.following.broken:
            raise chain_broken(tenant)

    def broken_tenants(self) -> list[str]:
        """Return the tenants that are held because their chain was altered."""
        names = (one for one in self.following.broken if one.startswith(chain.TENANTS))
        return sorted(name.removeprefix(chain.TENANTS) for name in names)

    def unswept(self, before: datetime.datetime) -> list[str]:
        """Return the tenants whose chain tells of a destruction before a time, and of no sweep."""
        return [
            tenant
            for tenant, (at, _) in self.following.unswept.items()
            if at < before.timestamp() and chain.tenant_chain(tenant) not in self.following.broken
        ]

    def frozen(self) -> int:
        """Return how many keys are frozen: versions on their own, and all keys of a tenant whose
        chain is broken."""
        return self.following.states.frozen + sum(self._broken_keys.values())

    def differing_holds(self) -> frozenset[str]:
        """Return the tenants that are held because row and chain differ on their hold."""
        return frozenset(self._differences.holds_differ)

    async def _pass(self) -> None:
        started, position, taken = time.monotonic(), self._anchor.position, self._anchor.taken
        if position.resumed != self.following.resumed:
            self._forget()
        await self.following.log(position)
        # It says which chains were altered, also before the log has its newest event.
        await self.following.follow(chain.SYSTEM)
        ahead, self._ahead = self._ahead, set()
        for name in ahead:
            await self.following.follow(name)
        await self._check_heads(taken)
        if self.following.found:
            # A database that was put back whole is no damage of its chains.
            await self._anchor.tick()
            if self._anchor.rolled_back:
                return
        found = list(self.following.found)
        await each("freeze_tenant", found, self._differences.freeze_tenant)
        revived = list(self.following.revived)
        await each("freeze_revived", revived, self._differences.freeze_revived)
        await self._differences.again()
        await self._differences.holds()
        await self._pages.look()
        for name in self.following.broken - self._broken_keys.keys():
            tenant = name.removeprefix(chain.TENANTS)
            # An event that somebody planted may name what is not even text to the database.
            named = _TENANT.fullmatch(tenant) is not None
            self._broken_keys[name] = await store.keys(self._database, tenant) if named else 0
        # What it knows is of when it began, however long it was held up.
        self._passed = started
        self.last = datetime.datetime.now(datetime.UTC)

    def _forget(self) -> None:
        self.following.forget(self._anchor.position)
        self._pages.forget()
        self._broken_keys.clear()
        self._claimed.clear()
        self._passed = -math.inf

    async def _check_heads(self, taken: float) -> None:
        """Look at some thousand heads: none may be before what was followed, and each must be in
        the log by the next pass, whatever its row says of that."""
        heads = await store.heads(self._database, self._after, _HEADS)
        looked = time.monotonic()
        claimed = {}
        for name, sequence in heads:
            self.following.stated(name, sequence)
            if sequence > self.following.logged(name):
                claimed[name] = sequence
        self._after = heads[-1][0] if len(heads) == _HEADS else ""
        if taken <= self._claimed_at:
            return  # nothing was anchored since: what was claimed then may still come
        for name, sequence in self._claimed.items():
            if self.following.logged(name) < sequence:
                logs.event(log, "head_kept_from_log", level=logging.CRITICAL, chain=name)
                self._anchor.owe(name)
        self._claimed, self._claimed_at = claimed, looked
