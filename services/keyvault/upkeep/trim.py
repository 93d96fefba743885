"""Trims, in the admin role: versions of KEKs that open nothing any more are destroyed.

That is what makes a destroyed key unreadable in backups of the database too. A tenant whose
destroyed versions can still be opened gets a target above them; once all that lives is wrapped
there (`rewrap`), what is below it goes, in two steps: `trimming` is written and anchored, so that
nothing is stored there any more; a while later, on an anchored head, with the ciphertext of every
living version looked at, the backend destroys, and `trimmed` is written. Every step follows from
the state, and may be repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Final

from byokeep.keyvault.v1 import audit_pb2, state_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import kek, lifecycle
from services.keyvault.ledger import ALL, Ledger, Tenant
from services.keyvault.log import Log
from services.keyvault.shred import Shredding
from services.keyvault.sql.ledger import SecretName
from services.keyvault.tenant_keys import TenantKeys, untrimmed

log = logging.getLogger(__name__)
#: A lease that read a version just before it was wrapped again has this long to open it with the
#: old one: longer than any backend's deadline, and than a lease may wait between commit and unwrap.
TRIM_DELAY: Final = 12.0
_CALLER: Final = "keyvault"
#: A trim that is refused is looked at again after so long, or once nothing is marked any more.
_REFUSED_SECONDS: Final = 600.0
#: Tenant, backend and version.
_Target = tuple[str, str, int]


class Trim:
    """Sweeps, trims and finishes shreds (see the module)."""

    def __init__(
        self,
        ledger: Ledger,
        log_: Log,
        backends: kek.Backends,
        keys: TenantKeys,
        shredding: Shredding,
        shred_after_seconds: int,
        delay: float = TRIM_DELAY,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Trim the KEKs of a ledger's tenants. `steady` is a clock that never goes back."""
        self._ledger = ledger
        self._log = log_
        self._backends = backends
        self._keys = keys
        self._shredding = shredding
        self._shred_after = shred_after_seconds
        self._delay = delay
        self._steady = steady
        #: Since when this process has seen a trim stand anchored, by tenant and target.
        self._since: dict[_Target, float] = {}
        #: When a trim was refused, by tenant and target.
        self._refused: dict[_Target, float] = {}

    async def tend(self, tenant: Tenant) -> bool:
        """Do the next step of what is to be done about a tenant's KEK; False where there is none,
        or none now."""
        if self._forbidden():
            return False
        if tenant.state.shredded:
            return await self._finish_shred(tenant)
        if await self._sweep(tenant):
            return True
        return await self._trim(tenant)

    def _forbidden(self) -> bool:
        return self._log.quiet or self._log.refusal() is not None

    def _under_way(self, state: state_pb2.TenantState) -> bool:
        here = state.target_backend == self._backends.primary.name
        return state.trim and here and bool(untrimmed(state, self._backends))

    async def _finish_shred(self, tenant: Tenant) -> bool:
        if not untrimmed(tenant.state, self._backends):
            return False
        await self._log.anchored(tenant.name, tenant.head)
        await self._shredding.finish(tenant.name, _CALLER)
        return True

    async def _sweep(self, tenant: Tenant) -> bool:
        """Aim above what is owed, where nothing is on its way there."""
        state, primary = tenant.state, self._backends.primary.name
        owed = lifecycle.owed(state)
        due = state.owed_since + self._shred_after
        if not owed or due > tenant.now.timestamp() or self._under_way(state):
            return False
        try:
            aim = await self._keys.aim(tenant.name, above=owed.get(primary, -1))
        except ByokeepError as error:
            if error.reason != "TENANT_KEY_MISSING":
                raise
            self._refuse(tenant, error.reason)
            return False
        await self._keys.take_target(tenant.name, aim, _CALLER, trim=True)
        return True

    async def _trim(self, tenant: Tenant) -> bool:
        state = tenant.state
        if not self._under_way(state):
            return False
        if lifecycle.left(state):
            if lifecycle.blocked(state):
                self._refuse(tenant, "UNDECRYPTABLE")
            return False
        target = _target(tenant)
        left = untrimmed(state, self._backends)
        if any(one.trimming < lifecycle.minimum(state, one) for one in left):
            await self._announce(tenant)
            return True
        if target not in self._since:
            await self._log.anchored(tenant.name, tenant.head)
            self._forget(tenant.name)
            self._since[target] = self._steady()
        if self._steady() - self._since[target] < self._delay:
            return True
        since = self._steady() - self._refused.get(target, -_REFUSED_SECONDS)
        if lifecycle.blocked(state) and since < _REFUSED_SECONDS:
            return False
        return await self._destroy(tenant)

    async def _announce(self, tenant: Tenant) -> None:
        """Write what is about to be destroyed: nothing is stored there from then on."""

        def announce(found: Tenant) -> None:
            if not self._same(tenant, found):
                return
            for one in untrimmed(found.edit(), self._backends):
                one.trimming = max(one.trimming, lifecycle.minimum(found.state, one))
            found.events.append(self._event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMING, found))

        _, head = await self._ledger.change(tenant.name, announce)
        await self._log.anchored(tenant.name, head)

    async def _destroy(self, tenant: Tenant) -> bool:
        """Destroy what is below the target, where every living version is found not to need it."""
        bad = await self._unproven(tenant)
        if bad is None:
            return True  # it changed meanwhile: looked at again
        if bad:
            await self._mark(tenant, bad)
            self._refuse(tenant, "ROW_TAMPERED")
            return False
        name, state = kek.tenant_kek(tenant.name), tenant.state
        for one in untrimmed(state, self._backends):
            # Once more before each: an operator may have aimed at what this would destroy.
            last = await self._ledger.read(tenant.name)
            if self._forbidden() or not self._same(tenant, last):
                return False
            backend = self._backends.named(one.backend)
            if one.backend == state.target_backend:
                await backend.trim(name, state.target_version)
            else:
                await backend.destroy(name)

        def done(found: Tenant) -> None:
            if not self._same(tenant, found):
                return
            for one in untrimmed(found.edit(), self._backends):
                one.trimmed = lifecycle.minimum(found.state, one)
            found.edit().owed_since = 0
            event = self._event(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMED, found)
            event.shred = self._backends.shred_of(found.state.target_backend)
            found.events.append(event)

        await self._ledger.change(tenant.name, done)
        self._forget(tenant.name)
        return True

    async def _unproven(self, tenant: Tenant) -> set[SecretName] | None:
        """Return the living versions whose ciphertext at the target is not there as their state
        names it; None where the tenant's target changed, or something is left below it. What was
        read was, and is anchored then."""
        bad = set[SecretName]()
        for part in tenant.state.parts:
            read = await self._ledger.read(tenant.name, {part.part})
            names = {(tenant.name, key.key_id, one.version) for key, one in read.living()}
            read = await self._ledger.read(tenant.name, {part.part}, names)
            if not self._same(tenant, read) or lifecycle.left(read.state):
                return None
            for key, one in read.living():
                name = tenant.name, key.key_id, one.version
                # What came since was stored at the target: below it nothing may be any more.
                if name in names and read.secret(name, one.secret_digest) is None:
                    bad.add(name)
        last = await self._ledger.read(tenant.name)
        await self._log.anchored(tenant.name, last.head)
        if not self._same(tenant, last) or lifecycle.left(last.state):
            return None
        return bad

    async def _mark(self, tenant: Tenant, bad: Collection[SecretName]) -> None:
        """Mark versions whose ciphertext is not there, where that is so under the lock too."""

        def mark(found: Tenant) -> None:
            for key, one in found.living():
                name = found.name, key.key_id, one.version
                there = found.secret(name, one.secret_digest) is not None
                if name not in bad or one.unopened_time or there:
                    continue
                version = lifecycle.version_of(found.edit_key(key.key_id), one.version)
                version.unopened_time = int(found.now.timestamp())
                version.unopened_reason = "ROW_TAMPERED"
                found.events.append(
                    audit_pb2.AuditEvent(
                        type=audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
                        key_id=key.key_id,
                        key_version=one.version,
                        caller=_CALLER,
                        reason="ROW_TAMPERED",
                    )
                )

        await self._ledger.change(tenant.name, mark, ALL, bad)

    def _same(self, tenant: Tenant, found: Tenant) -> bool:
        """Say whether a tenant still has the target that it had."""
        was, now = tenant.state, found.state
        return (was.target_backend, was.target_version) == (
            now.target_backend,
            now.target_version,
        ) and self._under_way(now)

    def _refuse(self, tenant: Tenant, reason: str) -> None:
        target = _target(tenant)
        if target not in self._refused:
            logs.event(
                log, "trim_refused", level=logging.CRITICAL, tenant=tenant.name, reason=reason
            )
        self._refused[target] = self._steady()

    def _forget(self, name: str) -> None:
        for known in (self._since, self._refused):
            for target in [one for one in known if one[0] == name]:
                del known[target]

    def _event(
        self, kind: audit_pb2.AuditEventType.ValueType, found: Tenant
    ) -> audit_pb2.AuditEvent:
        detail = f"{found.state.target_backend} v{found.state.target_version}"
        return audit_pb2.AuditEvent(type=kind, caller=_CALLER, detail=detail)


def _target(tenant: Tenant) -> _Target:
    return tenant.name, tenant.state.target_backend, tenant.state.target_version
