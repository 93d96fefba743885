"""What is to be done about tenants, found in their states: the loop that does it.

A row's `due_time` hints at whom to look; what is done follows from the tenant's authenticated
state alone. A tenant that this process can do nothing about is not read again before it changes, or
some seconds have passed. A slow scan over all tenants makes up for hints that somebody changed,
and finds the damaged ones.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable
from typing import Final

from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import custody, kek, lifecycle
from services.keyvault.custody import DAMAGED, Origin
from services.keyvault.database import Database
from services.keyvault.event import SYSTEM
from services.keyvault.heads import Heads
from services.keyvault.holds import Holds
from services.keyvault.ledger import Ledger, Macs, Tenant
from services.keyvault.log import Log
from services.keyvault.release import Releases, overdue
from services.keyvault.shred import Shredding
from services.keyvault.sql import ledger as ledger_sql
from services.keyvault.sql import upkeep as sql
from services.keyvault.tenant_keys import untrimmed
from services.keyvault.upkeep.rewrap import Rewrap
from services.keyvault.upkeep.trim import Trim

log = logging.getLogger(__name__)
TICK_SECONDS: Final = 0.5
SCAN_SECONDS: Final = 3600.0
#: A tenant that has not changed is looked at again after so long.
_IDLE_SECONDS: Final = 10.0
_MOST_IDLE: Final = 100_000
_GRACE_IS_OVER: Final = Origin("keyvault", "grace is over")


class Upkeep:
    """Tends tenants (see the module). `rewrap` and `releases` are the data role's, `trim` and
    `shredding` the admin role's: None in the other one."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        heads: Heads,
        log_: Log,
        macs: Macs,
        backends: kek.Backends,
        holds: Holds,
        shred_after_seconds: int,
        *,
        releases: Releases | None = None,
        rewrap: Rewrap | None = None,
        trim: Trim | None = None,
        shredding: Shredding | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tend a ledger's tenants. `steady` is a clock that never goes back."""
        self._database = database
        self._ledger = ledger
        self._heads = heads
        self._log = log_
        self._macs = macs
        self._backends = backends
        self._holds = holds
        self._shred_after = shred_after_seconds
        self._releases = releases
        self._rewrap = rewrap
        self._trim = trim
        self._shredding = shredding
        self._steady = steady
        #: Tenants that nothing was to be done about: their sequence, and when that was found.
        self._idle: dict[str, tuple[int, float]] = {}
        self._doubted = self._steady()
        #: Tenants whose rows are not what keyvault wrote last, and why.
        self.damaged: dict[str, str] = {}
        #: Tenants of which versions are to be wrapped again, or KEKs destroyed.
        self.open: set[str] = set()
        #: By tenant: keys with a version that did not open.
        self.undecryptable: dict[str, int] = {}

    async def tick(self) -> None:
        """Do what is due now; what fails of one tenant does not stop the others."""
        if self._steady() - self._doubted > _IDLE_SECONDS:
            self._doubted = self._steady()
            await each("damaged", list(self.damaged), self._read)
        await each("owed", {one.tenant for one in self._log.system.owed}, self._carry_out)
        after, now = "", self._ledger.now()
        while found := await sql.due(self._database, now, self.open, after):
            await each("upkeep", found, self._tend)
            after = found[-1][0]

    async def scan(self) -> None:
        """Look at every tenant that there is or was, whatever its row hints."""
        known = set(self._heads.names())
        async for names in ledger_sql.every_name(self._database):
            known.difference_update(names)
            await each("scan", names, self._look)
        # Of these there is no row.
        await each("scan", sorted(known), self._look)
        await self._log.scan()

    async def _carry_out(self, tenant: str) -> None:
        try:
            await self._holds.carry_out(tenant)
        except ByokeepError as error:
            if not self.note_damage(tenant, error):
                raise

    async def _tend(self, found: tuple[str, int]) -> None:
        name, sequence = found
        idle = self._idle.get(name)
        if idle is not None and idle[0] == sequence and self._steady() - idle[1] < _IDLE_SECONDS:
            return
        tenant = await self._read(name)
        if tenant is None:
            self._put_aside(name, sequence)
            return
        await self._count(tenant)
        busy = self._releases is not None and await self._expire(tenant)
        if not busy and self._trim is not None:
            busy = await self._trim.tend(tenant)
        if not busy and self._rewrap is not None:
            busy = await self._rewrap.tend(tenant)
        if busy:
            self._idle.pop(name, None)
            return
        self._put_aside(name, sequence)
        due = self._due(tenant)
        if due > tenant.now:
            await sql.put_off(self._database, name, tenant.head.sequence, due)

    async def _look(self, name: str) -> None:
        """Look at one tenant: is it whole, sealed with the key in use, and is its hint right?"""
        tenant = await self._read(name)
        if tenant is None:
            return
        if tenant.mac_key != self._macs.current:
            resealed = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_STATE_RESEALED)
            await self._ledger.change(name, lambda found: found.events.append(resealed))
        if name == SYSTEM:
            return
        await self._count(tenant)
        # Of versions that were not tried the hint may not know, beside those that did not open.
        left = not tenant.state.shredded and lifecycle.left(tenant.state)
        due = tenant.now if left else self._due(tenant)
        await sql.hasten(self._database, name, tenant.head.sequence, due)
        if name in self._log.system.shredded and self._shredding and not tenant.state.shredded:
            await self._shredding.shred_named(name)
        await asyncio.sleep(0)  # others have a turn

    async def _read(self, name: str) -> Tenant | None:
        """Return a tenant; None where there is none that can be believed."""
        try:
            tenant = await self._ledger.read(name)
        except ByokeepError as error:
            if self.note_damage(name, error):
                return None
            raise
        if self.damaged.pop(name, None) is not None:
            logs.event(log, "tenant_whole", tenant=name)
        return tenant

    def note_damage(self, name: str, error: ByokeepError) -> bool:
        """Note why a tenant can't be read; False where that is no fault of what is stored."""
        if error.reason not in DAMAGED:
            return error.reason == "TENANT_KEY_MISSING"
        if name not in self.damaged:
            logs.event(
                log, "tenant_damaged", level=logging.CRITICAL, tenant=name, reason=error.reason
            )
        self.damaged[name] = error.reason
        return True

    async def _count(self, tenant: Tenant) -> None:
        """Note what is open of a tenant, and which of its keys don't open."""
        state = tenant.state
        kept = not state.shredded
        aimed = kept and state.target_backend == self._backends.primary.name
        opens = (aimed and lifecycle.left(state)) or (kept and bool(lifecycle.owed(state)))
        opens = opens or ((aimed or not kept) and bool(untrimmed(state, self._backends)))
        (self.open.add if opens else self.open.discard)(tenant.name)
        self.undecryptable.pop(tenant.name, None)
        parts = {one.part for one in state.parts if any(held.unopened for held in one.holdings)}
        if parts:
            read = await self._ledger.read(tenant.name, parts)
            self.undecryptable[tenant.name] = sum(
                any(one.unopened_time for one in key.versions) for key in read.every_key()
            )

    async def _expire(self, tenant: Tenant) -> bool:
        """End leases and superseded versions whose time is over."""
        now = tenant.now.timestamp()
        worked = False
        if self._releases is not None and overdue(tenant):
            await self._releases.expire(tenant.name)
            worked = True
        parts = {one.part for one in tenant.state.parts if one.grace_end and one.grace_end < now}
        if parts:
            await self._ledger.change(tenant.name, self._end_grace, parts)
            worked = True
        return worked

    def _end_grace(self, found: Tenant) -> None:
        for key in found.every_key():
            if changes := lifecycle.expired(key, found.now):
                custody.apply(found, key.key_id, changes, _GRACE_IS_OVER, self._backends)

    def _due(self, tenant: Tenant) -> datetime.datetime:
        return lifecycle.due(tenant.state, tenant.usage, tenant.now, self._shred_after)

    def _put_aside(self, name: str, sequence: int) -> None:
        if len(self._idle) >= _MOST_IDLE:
            self._idle.clear()
        self._idle[name] = (sequence, self._steady())
