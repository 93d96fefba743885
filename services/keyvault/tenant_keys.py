"""Tenants' KEKs: made, rotated, aimed at.

What is to be wrapped under which version stands in the tenant's state as a target; upkeep's data
role wraps towards it, its admin role destroys what is below it (`upkeep.rewrap`, `upkeep.trim`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from byokeep.keyvault.v1 import audit_pb2, state_pb2

from services.common.errors import ByokeepError
from services.keyvault import custody, kek, lifecycle
from services.keyvault.custody import Request
from services.keyvault.database import DuplicateError
from services.keyvault.event import SYSTEM, Head
from services.keyvault.ledger import ALL, Ledger, Tenant
from services.keyvault.lifecycle import WHOLE, State
from services.keyvault.log import Log

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Aim:
    """A version of the tenant's KEK in the primary backend, and whether that was made now."""

    version: int
    made: bool


class TenantKeys:
    """Administers tenants' KEKs (see the module); in the admin role."""

    def __init__(self, ledger: Ledger, log: Log, backends: kek.Backends) -> None:
        """Administer the KEKs of a ledger's tenants."""
        self._ledger = ledger
        self._log = log
        self._backends = backends

    async def create(self, tenant: str, request: Request, caller: str) -> Aim:
        """Create a tenant and its KEK, or find them.

        Raises:
            ByokeepError: TENANT_KEY_MISSING for one that was shredded; STATE_TAMPERED, ROLLED_BACK.
        """
        there = await self._there(tenant)
        backend, name = self._backends.primary, kek.tenant_kek(tenant)
        made = await backend.create(name)
        aim = Aim(await backend.newest(name), made)
        created = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED, backend, aim, caller)

        def begin(found: Tenant) -> None:
            lifecycle.edit_kek(found.edit(), backend.name).version = aim.version
            _note(found, request, created, aim.version)

        def note(found: Tenant, new: bool) -> None:
            if new:
                _note(found, request, created, aim.version)

        head: Head | None = None
        if not there:
            with suppress(DuplicateError):
                head = await self._ledger.create(tenant, state_pb2.TenantState(), begin)
        if head is None:
            _, head = await self._take(tenant, aim, note)
        await self._log.anchored(tenant, head)
        return aim

    async def rotate(self, tenant: str, request: Request, caller: str) -> int:
        """Make a new version of a tenant's KEK; return it. A repeated request makes none.

        Raises:
            ByokeepError: TENANT_KEY_MISSING; STATE_TAMPERED, ROLLED_BACK; REQUEST_ID_CONFLICT.
        """
        found = await self._living(tenant)
        past = custody.done_before(found.state.requests, request)
        if past is not None:
            await self._log.anchored(tenant, found.head)
            return past.version
        backend = self._backends.primary
        aim = await self.aim(tenant, above=WHOLE)
        event = _event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_ROTATED, backend, aim, caller)

        def note(found: Tenant, new: bool) -> int:
            return _note(found, request, event, aim.version)

        version, head = await self._take(tenant, aim, note)
        await self._log.anchored(tenant, head)
        return version

    async def rewrap(self, tenant: str, request: Request, caller: str, *, trim: bool) -> None:
        """Have a tenant's data keys wrapped under the newest version in the primary backend, and
        older versions destroyed then where that is asked. A repeated request changes nothing.

        Raises:
            ByokeepError: as `rotate`.
        """
        found = await self._living(tenant)
        if custody.done_before(found.state.requests, request) is not None:
            await self._log.anchored(tenant, found.head)
            return
        aim = await self.aim(tenant)
        backend = self._backends.primary
        event = _event(audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED, backend, aim, caller)

        def order(found: Tenant, new: bool) -> None:
            if custody.done_before(found.state.requests, request) is None:
                self._target(found, aim.version, trim=trim)
                _clear_unopened(found)
                _note(found, request, event, aim.version)

        _, head = await self._take(tenant, aim, order, whole=True)
        await self._log.anchored(tenant, head)

    async def aim(self, tenant: str, above: int = -1) -> Aim:
        """Return a version of a tenant's KEK in the primary backend that is above one: the newest,
        or a new one. A KEK that is in another backend only is made in the primary one.

        Raises:
            ByokeepError: TENANT_KEY_MISSING: it is in no backend; one that is lost is not replaced
                silently.
        """
        backend, name = self._backends.primary, kek.tenant_kek(tenant)
        try:
            newest = await backend.newest(name)
            if newest <= above:
                return Aim(await backend.rotate(name), made=False)
            return Aim(newest, made=False)
        except kek.KekMissingError:
            pass
        if not await self._backends.have(name):
            raise lifecycle.tenant_key_missing(tenant)
        made = await backend.create(name)
        return Aim(await backend.newest(name), made)

    async def take_target(self, tenant: str, aim: Aim, caller: str, *, trim: bool) -> None:
        """Have a tenant's data keys wrapped as `aim` says, of keyvault's own accord."""

        kind = audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_ROTATED
        event = _event(kind, self._backends.primary, aim, caller)

        def order(found: Tenant, new: bool) -> None:
            self._target(found, aim.version, trim=trim)
            found.events.append(event)

        await self._take(tenant, aim, order)

    def _target(self, found: Tenant, version: int, *, trim: bool) -> None:
        """Set the target of a tenant that is being changed. A trim that is under way stays one."""
        under_way = found.state.trim and bool(untrimmed(found.state, self._backends))
        state = found.edit()
        state.target_backend, state.target_version = self._backends.primary.name, version
        state.trim = trim or under_way
        for backend in sorted({one.backend for one in lifecycle.holdings(state)}):
            lifecycle.edit_kek(state, backend)

    async def _there(self, tenant: str) -> bool:
        """Say whether there is a tenant. Raises ByokeepError where there was one."""
        if tenant in (await self._ledger.read(SYSTEM)).state.shredded:
            raise lifecycle.tenant_key_missing(tenant)
        try:
            found = await self._ledger.read(tenant)
        except ByokeepError as error:
            if error.reason != "TENANT_KEY_MISSING":
                raise
            return False
        if found.state.shredded:
            raise lifecycle.tenant_key_missing(tenant)
        return True

    async def _living(self, tenant: str) -> Tenant:
        found = await self._ledger.read(tenant)
        if found.state.shredded:
            raise lifecycle.tenant_key_missing(tenant)
        return found

    async def _take(
        self, tenant: str, aim: Aim, act: Callable[[Tenant, bool], T], *, whole: bool = False
    ) -> tuple[T, Head]:
        """Note a version of the KEK in the primary backend, with what else is done of the tenant;
        `act` is told whether the version is new to its state."""
        backend = self._backends.primary.name

        def take(found: Tenant) -> T:
            if found.state.shredded:
                raise lifecycle.tenant_key_missing(tenant)
            known = lifecycle.kek_of(found.state, backend)
            # Destroyed, as the state says, and there all the same: made anew by who died then.
            again = known.trimmed > aim.version
            new = aim.made or known.trimming > aim.version or known.version < aim.version
            if new:
                _take_version(found, backend, Aim(aim.version, aim.made or again))
            return act(found, new)

        return await self._ledger.change(tenant, take, ALL if whole or aim.made else ())


def _take_version(found: Tenant, backend: str, aim: Aim) -> None:
    """Note a version in the state. A KEK that was made anew starts over: what was destroyed with
    the one before it is owed nothing any more."""
    own = lifecycle.edit_kek(found.edit(), backend)
    own.version = aim.version
    if not aim.made:
        # It is the target again: what was about to be destroyed is not.
        own.trimming = min(own.trimming, max(own.trimmed, aim.version))
        return
    own.trimming = own.trimmed = 0
    for key in found.every_key():
        for one in key.versions:
            if (
                one.kek_backend == backend
                and lifecycle.state_of(one) is State.DESTROYED
                and one.kek_version
            ):
                version = lifecycle.version_of(found.edit_key(key.key_id), one.version)
                version.kek_version = 0


def _clear_unopened(found: Tenant) -> None:
    """Have versions tried again that did not open; every part was read."""
    for key, one in found.living():
        if one.unopened_time:
            version = lifecycle.version_of(found.edit_key(key.key_id), one.version)
            version.unopened_time, version.unopened_reason = 0, ""


def untrimmed(state: state_pb2.TenantState, backends: kek.Backends) -> list[state_pb2.KekState]:
    """Return the tenant's KEKs of which something is to be destroyed that this keyvault can."""
    configured = {one.name for one in backends}
    return [one for one in lifecycle.untrimmed(state) if one.backend in configured]


def _note(found: Tenant, request: Request, event: audit_pb2.AuditEvent, version: int) -> int:
    """Put what was asked on record, and remember it; return the version that it came to."""
    past = custody.done_before(found.state.requests, request)
    if past is not None:
        return past.version
    custody.remember(found.edit().requests, request.past(version))
    found.events.append(event)
    return version


def _event(
    kind: audit_pb2.AuditEventType.ValueType, backend: kek.Backend, aim: Aim, caller: str
) -> audit_pb2.AuditEvent:
    """Return an event of a kind, or that the KEK was created, where it was made for this."""
    detail = f"{backend.name} v{aim.version}"
    kind = audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED if aim.made else kind
    return audit_pb2.AuditEvent(type=kind, caller=caller, detail=detail)
