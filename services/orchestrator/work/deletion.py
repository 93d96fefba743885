"""Deleting a tenant: each step can be repeated, so what breaks off is finished by the sweeper."""

from __future__ import annotations

from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.store.tenants import TenantStore


class Deletion:
    """Ends what a deleted tenant has."""

    def __init__(self, tenants: TenantStore, keyvault: Keyvault) -> None:
        """Use the store, and keyvault for its keys."""
        self._tenants = tenants
        self._keyvault = keyvault

    async def carry_out(self, tenant: str, actor: str) -> int:
        """Cancel what runs and waits, destroy the keys, erase the rows of a tenant that is DELETED;
        return how many keys there were."""
        await self._tenants.cancel_all(tenant)
        destroyed = await self._keyvault.destroy_all(tenant, actor)
        await self._tenants.erase(tenant)
        return destroyed

    async def finish(self, tenant: str, actor: str) -> None:
        """Carry it out once more, and note that it is done where no call that began before the
        deletion can go on any more."""
        await self.carry_out(tenant, actor)
        await self._tenants.note_erased(tenant)
