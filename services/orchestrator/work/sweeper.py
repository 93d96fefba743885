"""What must happen though nobody asks: dead workers, lost jobs, verdicts, retention."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from typing import Final

from byokeep import names
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2

from services.common import logs
from services.common.background import Background, each
from services.common.errors import ByokeepError
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy.keys import ENDED, usable
from services.orchestrator.policy.plans import Plans
from services.orchestrator.policy.states import Reason, TenantState
from services.orchestrator.store.attempts import Fenced
from services.orchestrator.store.endings import EndingStore
from services.orchestrator.store.keys import KeyStore
from services.orchestrator.store.retention import RetentionStore
from services.orchestrator.store.tenants import TenantRow, TenantStore
from services.orchestrator.store.waits import PausedKey, WaitStore
from services.orchestrator.work.deletion import Deletion
from services.orchestrator.work.dispatcher import ORPHANED_SECONDS, Dispatcher
from services.orchestrator.work.fleet import SILENCE_SECONDS, Fleet
from services.orchestrator.work.outcomes import key_after_silence, review_after_silence
from services.orchestrator.work.verdicts import Verdicts

log = logging.getLogger(__name__)
STALE_SECONDS: Final = ORPHANED_SECONDS
# What a runner keeps for 30 s may be taken over for as long.
HELD_SECONDS: Final = 32.0
_TICK_SECONDS: Final = 2.0
# Longer than a runner's silence, so that one who restarts at once is not told of.
_LACK_SECONDS: Final = SILENCE_SECONDS + 2.0
_PAUSED_SECONDS: Final = 10.0
_UNSCHEDULED_SECONDS: Final = 300.0
_MODELS_SECONDS: Final = 60.0
# Checks go before reviews: so many at once keep none waiting for long.
_MODELS_AT_ONCE: Final = 20
_DELETION_SECONDS: Final = 30.0
_RETENTION_SECONDS: Final = 600.0
_ACTOR: Final = "byokeep/orchestrator"


class Sweeper:
    """Runs in every replica; rows that another replica works on are skipped."""

    def __init__(
        self,
        endings: EndingStore,
        retention: RetentionStore,
        keys: KeyStore,
        tenants: TenantStore,
        keyvault: Keyvault,
        deletion: Deletion,
        verdicts: Verdicts,
        waits: WaitStore,
        dispatcher: Dispatcher,
        fleet: Fleet,
        plans: Plans,
    ) -> None:
        """Use the stores, keyvault, the runners, and what else has chores."""
        self._endings = endings
        self._retention = retention
        self._keys = keys
        self._tenants = tenants
        self._keyvault = keyvault
        self._deletion = deletion
        self._verdicts = verdicts
        self._waits = waits
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._plans = plans
        self._lacking = False

    def start(self, background: Background) -> None:
        """Sweep from now on; a chore that has to wait for keyvault holds up no other."""
        background.every("attempts", _TICK_SECONDS, self.attempts, vital=True)
        background.every("waits", _TICK_SECONDS, self.lack, self._waits.sweep)
        background.every("paused-keys", _PAUSED_SECONDS, self.paused_keys)
        background.every("verdicts", _TICK_SECONDS, self._verdicts.apply_all)
        background.every("model-lists", _MODELS_SECONDS, self.model_lists)
        background.every("deletions", _DELETION_SECONDS, self.deletions)
        background.every("unscheduled", _UNSCHEDULED_SECONDS, self.unscheduled)
        background.every("retention", _RETENTION_SECONDS, self.retention)

    async def attempts(self) -> None:
        """Have attempts taken over whose worker is gone, or fence them off."""
        await self._dispatcher.take_over()
        for attempt_id in await self._endings.stale(STALE_SECONDS, HELD_SECONDS):
            await self.fence_off(attempt_id)

    async def fence_off(self, attempt_id: str, seconds: float = STALE_SECONDS) -> None:
        """End an attempt whose worker gave no sign of life for so long, and its child."""
        try:
            stale = await self._endings.fence_off(
                attempt_id, seconds, review_after_silence, key_after_silence
            )
        except Fenced:
            return
        if stale is None:
            return
        logs.event(
            log,
            "attempt_fenced_off",
            level=logging.WARNING,
            attempt=attempt_id,
            fence=stale.fence,
        )
        await self._fleet.cancel(stale.runner_id, attempt_id, stale.fence)

    async def lack(self) -> None:
        """Let who waits know why no runner takes anything, where none has for some time."""
        lack = self._fleet.lack(_LACK_SECONDS)
        if lack or self._lacking:
            await self._waits.pause_all(lack, 3 * _TICK_SECONDS)
        self._lacking = lack is not None

    async def paused_keys(self) -> None:
        """Let reviews go on whose key serves again, or has ended, though nobody told us."""
        await each("paused_key", await self._waits.paused_keys(), self._look_at)

    async def _look_at(self, paused: PausedKey) -> None:
        if paused.reason is Reason.KEY_REJECTED:
            if not await self._waits.is_checked(paused.tenant, paused.key_id):
                await self._waits.resume_key(paused.tenant, paused.key_id, 0, [paused.reason])
            return
        try:
            key = await self._keyvault.get(names.key_name(paused.tenant, paused.key_id))
        except ByokeepError as error:
            if error.reason != "NOT_FOUND":
                raise
            key = custody_pb2.ProviderKey(state=custody_pb2.KEY_VERSION_STATE_DESTROYED)
        if usable(key) or key.state in ENDED:
            await self._waits.resume_key(paused.tenant, paused.key_id, key.active_version)

    async def model_lists(self) -> None:
        """Have providers asked once a day for the models of keys that reviews run on."""
        outdated = await self._keys.outdated(_MODELS_AT_ONCE)
        await each("outdated_key", outdated, lambda one: self._refresh(*one))

    async def _refresh(self, tenant: str, key_id: str) -> None:
        key = await self._keyvault.get(names.key_name(tenant, key_id))
        if usable(key):
            await self._keys.refresh(tenant, key, _ACTOR)

    async def unscheduled(self) -> None:
        """Have versions validated that were staged just before we stopped."""
        after = ""
        while rows := await self._tenants.page(None, after, 100):
            for row in rows:
                if row.state is TenantState.ACTIVE:
                    await _swept(row.id, self._resume(row))
            after = rows[-1].id

    async def deletions(self) -> None:
        """Finish deletions of tenants that broke off."""
        for tenant in await self._tenants.unerased():
            await _swept(tenant, self._deletion.finish(tenant, _ACTOR))

    async def retention(self) -> None:
        """Delete what was kept long enough."""
        await self._retention.sweep()

    async def _resume(self, row: TenantRow) -> None:
        if row.plan not in self._plans:
            logs.event(log, "plan_unknown", level=logging.WARNING, tenant=row.id, plan=row.plan)
        for key in await self._keyvault.keys(row.id):
            for version in key.versions:
                age = time.time() - version.create_time.seconds
                if (
                    version.state == custody_pb2.KEY_VERSION_STATE_PENDING
                    # A row of keyvault's that somebody else wrote may name none.
                    and key.provider != options_pb2.PROVIDER_UNSPECIFIED
                    and age > _UNSCHEDULED_SECONDS / 5
                ):
                    await self._keys.schedule(row.id, key, version.version, _ACTOR)


async def _swept(tenant: str, sweep: Awaitable[None]) -> None:
    """Sweep one tenant; what is wrong with it keeps no other waiting."""
    try:
        await sweep
    except ByokeepError as error:
        logs.event(
            log, "tenant_not_swept", level=logging.WARNING, tenant=tenant, reason=error.reason
        )
