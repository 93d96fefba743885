"""9. What was destroyed stays dead, also for whoever kept an older copy of the database."""

from __future__ import annotations

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2
from byokeep.names import last_of

from services.keyvault import epochs, kek
from tests.harness import keyvault as kv

_COPY = "SELECT key_id, wrapped_dek, envelope FROM key_secret ORDER BY key_id"


async def test_shred_key(vault, deployment, tmp_path):
    """The destroyed key's data key can't be unwrapped any more, though its row was kept; the
    tenant's other key lives on, and the tombstone says what that is worth.

    Shown to fail: with backend.trim left out of Trim._destroy.
    """
    settings = vault.settings(tmp_path, shred_after_seconds=0)
    async with kv.running(deployment, **settings) as keyvault:
        backend = keyvault.app.backends.primary
        await keyvault.create_tenant("shredkey")
        gone = await keyvault.add_active(tenant="shredkey", name="gone")
        kept = await keyvault.add_active(tenant="shredkey", name="kept")
        copies = {row[0]: row[1:] for row in await keyvault.sql(_COPY)}
        wrapped = bytes(copies[last_of(gone.name)][0])
        with await backend.unwrap(kek.tenant_kek("shredkey"), wrapped):
            pass
        await keyvault.change("DestroyKey", gone.name)
        assert await kv.swept(keyvault, "shredkey")
        with pytest.raises(kek.KekMissingError):
            await backend.unwrap(kek.tenant_kek("shredkey"), wrapped)
        assert await kv.try_lease(keyvault, kept) == ""
        tombs = [one for one in await keyvault.events("tenants/shredkey") if one.shred]
        assert {(one.type, one.shred) for one in tombs} == {
            (audit_pb2.AUDIT_EVENT_TYPE_DESTROYED, "immediate"),
            (audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMED, "immediate"),
        }
        # An older copy of the whole database holds survivors under the version that is gone, too.
        await keyvault.sql(
            "UPDATE key_secret SET wrapped_dek = %s WHERE key_id = %s",
            copies[last_of(kept.name)][0],
            last_of(kept.name),
        )
        assert await kv.try_lease(keyvault, kept) == "ROW_TAMPERED"
        with pytest.raises(kek.KekMissingError):
            await backend.unwrap(kek.tenant_kek("shredkey"), bytes(copies[last_of(kept.name)][0]))


async def test_shred_tenant(vault, deployment, tmp_path):
    """Shown to fail: with backend.destroy left out of Shredding."""
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        backend = keyvault.app.backends.primary
        await keyvault.create_tenant("shredtenant")
        await keyvault.add_active(tenant="shredtenant")
        ((_, wrapped, _envelope),) = await keyvault.sql(_COPY)
        request = admin_pb2.ShredTenantRequest(
            tenant="tenants/shredtenant", request_id=new_id("req")
        )
        assert (await keyvault.admin.ShredTenant(request)).shred == "immediate"
        with pytest.raises(kek.KekMissingError):
            await backend.unwrap(kek.tenant_kek("shredtenant"), bytes(wrapped))
        # No tenant of the same name is made again; a KEK of it would open nothing of the old one.
        assert await kv.refusal(keyvault.create_tenant("shredtenant")) == "TENANT_KEY_MISSING"
        await backend.create(kek.tenant_kek("shredtenant"))
        with pytest.raises(kek.UnwrapError):
            await backend.unwrap(kek.tenant_kek("shredtenant"), bytes(wrapped))


async def test_shred_intake_epoch(vault, deployment, tmp_path):
    """A sealed key that was recorded can't be opened once its epoch's KEK is destroyed.

    Shown to fail: with the epoch's KEK left alive.
    """
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        backend = keyvault.app.backends.primary
        await keyvault.create_tenant("epoch")
        await keyvault.stage(tenant="epoch")
        ((made, wrapped),) = await keyvault.sql("SELECT not_before, wrapped_dek FROM intake_key")
        name = kek.intake_kek(epochs.INTAKE.at(made))
        with await backend.unwrap(name, bytes(wrapped)):
            pass
        await backend.destroy(name)
        with pytest.raises(kek.KekMissingError):
            await backend.unwrap(name, bytes(wrapped))
        # keyvault says so, and makes no other key of the same name.
        assert await kv.refusal(keyvault.stage(tenant="epoch", name="second")) != ""
