"""Tells keyvault what follows from a verdict: promote the staged version, or destroy it."""

from __future__ import annotations

import logging

from byokeep import names

from services.common import logs
from services.common.errors import ByokeepError
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy.states import Action
from services.orchestrator.store.keys import KeyStore
from services.orchestrator.store.waits import WaitStore

log = logging.getLogger(__name__)
# Repeating these can't help: the version is gone, was promoted by other means, or keyvault
# carried this out for an older state of our database.
_SETTLED = frozenset({"NOT_FOUND", "WRONG_STATE", "REQUEST_ID_CONFLICT"})


class Verdicts:
    """Applies verdicts; safe to repeat, since one may be known and not applied yet."""

    def __init__(self, store: KeyStore, waits: WaitStore, keyvault: Keyvault) -> None:
        """Use keyvault, where verdicts are kept, and what waits for them."""
        self._store = store
        self._waits = waits
        self._keyvault = keyvault

    async def apply(
        self,
        tenant: str,
        key_id: str,
        version: int,
        action: Action,
        actor: str,
        *,
        destroy_previous: bool,
    ) -> None:
        """Tell keyvault; where it does not answer, the sweeper comes back to it."""
        name = names.key_name(tenant, key_id)
        try:
            if action is Action.PROMOTE and not await self._overtaken(name, version):
                await self._keyvault.promote(
                    name, version, actor, destroy_previous=destroy_previous
                )
                await self._waits.resume_key(tenant, key_id, version)
            else:
                await self._keyvault.destroy_version(name, version, actor)
        except ByokeepError as error:
            logs.event(
                log,
                "verdict_not_applied",
                level=logging.WARNING,
                key=key_id,
                version=version,
                action=action,
                reason=error.reason,
            )
            if error.reason not in _SETTLED:
                return
        await self._store.applied(tenant, key_id, version)

    async def apply_all(self) -> None:
        """Tell keyvault of every verdict that it does not know of."""
        for row in await self._store.unapplied():
            await self.apply(
                row.tenant,
                row.key_id,
                row.version,
                row.action,
                row.actor,
                destroy_previous=row.destroy_previous,
            )

    async def _overtaken(self, name: str, version: int) -> bool:
        """Whether a newer version already serves: an older one must not replace it."""
        return (await self._keyvault.get(name)).active_version > version
