"""Moving rows from one KEK backend to another, while both are in use."""

from __future__ import annotations

import asyncio
import datetime
import functools

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, content_pb2, content_pb2_grpc
from byokeep.names import key_name

from services.common.config import ConfigError
from services.keyvault import kek, lifecycle, migrate, server
from services.keyvault.kek.keyring import load_keyring
from services.keyvault.kek.local import LocalBackend
from services.keyvault.ledger import ALL
from services.keyvault.upkeep.trim import Trim
from tests.harness import bulk
from tests.harness import keyvault as kv
from tests.security.test_rewrap import TENANT, open_all, rewrap


class Elsewhere(LocalBackend):
    """A second backend with KEKs of its own: another name for the KEKs of the same tenant."""

    name = "elsewhere"

    async def create(self, kek):
        return await super().create(f"elsewhere/{kek}")

    async def rotate(self, kek):
        return await super().rotate(f"elsewhere/{kek}")

    async def newest(self, kek):
        return await super().newest(f"elsewhere/{kek}")

    async def trim(self, kek, minimum):
        await super().trim(f"elsewhere/{kek}", minimum)

    async def destroy(self, kek):
        await super().destroy(f"elsewhere/{kek}")

    async def generate_data_key(self, kek):
        return await super().generate_data_key(f"elsewhere/{kek}")

    async def unwrap(self, kek, wrapped):
        return await super().unwrap(
            kek if kek.startswith("elsewhere/") else f"elsewhere/{kek}", wrapped
        )

    async def rewrap(self, kek, wrapped):
        return await super().rewrap(f"elsewhere/{kek}", wrapped)


@pytest.fixture
def moved(monkeypatch, soon):
    """From now on "elsewhere" is primary and "local" is still read; or the other way round."""

    def use(*, back: bool = False) -> None:
        def both(settings, database):
            keyring = load_keyring(settings.keyring_file)
            kinds = (LocalBackend, Elsewhere) if back else (Elsewhere, LocalBackend)
            return kek.Backends(*(one(database, keyring, settings.deployment) for one in kinds))

        monkeypatch.setattr(server, "open_backends", both)
        monkeypatch.setattr(migrate, "open_backends", both)

    return use


async def _held_by(keyvault) -> list[str]:
    """Which backends hold the tenant's versions, as its state says."""
    tenant = await keyvault.app.ledger.read("acme", ALL)
    return sorted({one.kek_backend for key in tenant.every_key() for one in key.versions})


async def _filled(deployment, count: int = 20) -> dict[str, str]:
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        return await bulk.fill(keyvault, count)


async def test_migrate_kek_online(deployment, moved):
    """Rows move while they are leased; new ones are written to the new backend at once; the
    old backend's KEK goes last."""
    values = await _filled(deployment)
    moved()
    async with kv.running(deployment) as keyvault:
        # Both are read before anything moved.
        await open_all(keyvault, dict(list(values.items())[:4]))
        job, _ = await asyncio.gather(
            rewrap(keyvault, trim=True, target_backend="elsewhere"), open_all(keyvault, values)
        )
        assert (job.done, job.failed, job.backend) == (20, 0, "elsewhere")
        assert job.phase == admin_pb2.KEK_JOB_PHASE_DONE
        assert await _held_by(keyvault) == ["elsewhere"]
        assert await keyvault.sql("SELECT name FROM local_kek WHERE name LIKE '%%tenant/acme'") == [
            ("elsewhere/tenant/acme",)
        ]
        await open_all(keyvault, values)
        # keyvault's own keys have moved with `migrate`.
        assert await keyvault.sql("SELECT DISTINCT kek_backend FROM system_key") == [("elsewhere",)]
        kinds = [event.type for event in await keyvault.events()]
        assert kinds.count(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED) == 2
        key = await keyvault.add_active(name="new")
        assert key.versions[-1].kek_backend == "elsewhere"
        assert await kv.try_lease(keyvault, key) == ""


async def test_migrated_envelope_stays_bound(deployment, moved):
    """A row that was swapped before the migration is not authenticated by it: it fails, and
    stays where it is.

    Shown to fail: with envelopes that are bound to nothing, and digests that are not compared.
    """
    values = await _filled(deployment, 6)
    first, second, *_ = sorted(values)
    moved()
    async with kv.running(deployment) as keyvault:
        await keyvault.sql(
            "UPDATE key_secret a SET envelope = b.envelope, wrapped_dek = b.wrapped_dek"
            " FROM key_secret b WHERE a.key_id = %s AND b.key_id = %s",
            first,
            second,
        )
        job = await rewrap(keyvault, trim=True)
        assert job.phase == admin_pb2.KEK_JOB_PHASE_PARTIAL
        assert [(one.key_id, one.reason) for one in job.failures] == [(first, "ROW_TAMPERED")]
        assert await _held_by(keyvault) == ["elsewhere", "local"]
        # Nothing is trimmed: the old KEK is there.
        assert await keyvault.sql("SELECT 1 FROM local_kek WHERE name = 'tenant/acme'") == [(1,)]
        await keyvault.change("DestroyKey", key_name("acme", first))
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        assert await keyvault.sql("SELECT 1 FROM local_kek WHERE name = 'tenant/acme'") == []


async def test_migrate_forth_and_back(deployment, moved):
    """What was said of the KEK that was destroyed is not said of the one made after it, also
    where whoever made it died before it could say so.

    Shown to fail: without `again` in TenantKeys._take.
    """
    values = await _filled(deployment, 3)
    moved()
    async with kv.running(deployment) as keyvault:
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        assert await keyvault.sql("SELECT 1 FROM local_kek WHERE name = 'tenant/acme'") == []
    moved(back=True)
    async with kv.running(deployment) as keyvault:
        await keyvault.app.backends.primary.create("tenant/acme")
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        key = await keyvault.add_active(name="new")
        assert key.versions[-1].kek_backend == "local"
        assert await kv.try_lease(keyvault, key) == ""
        await open_all(keyvault, values)


async def test_back_before_the_old_kek_is_gone(deployment, moved, monkeypatch):
    """Turned round while the first migration waits to destroy the old KEK: that one is given up,
    and nothing that rows need is destroyed.

    Shown to fail: with trims carried out whatever backend they aim at.
    """
    values = await _filled(deployment, 3)
    moved()
    with monkeypatch.context() as patched:
        patched.setattr(server, "Trim", functools.partial(Trim, delay=3600))
        async with kv.running(deployment) as keyvault:
            request = admin_pb2.RewrapTenantRequest(
                tenant=TENANT, trim=True, request_id=new_id("req")
            )
            async for one in keyvault.admin.RewrapTenant(request, timeout=60):
                if one.phase == admin_pb2.KEK_JOB_PHASE_TRIM:
                    break
    moved(back=True)
    async with kv.running(deployment) as keyvault:
        again = [one async for one in keyvault.admin.RewrapTenant(request, timeout=60)]
        assert again[-1].phase == admin_pb2.KEK_JOB_PHASE_CANCELLED
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        assert await _held_by(keyvault) == ["local"]
        key = await keyvault.add_active(name="new")
        assert key.versions[-1].kek_backend == "local"
        await open_all(keyvault, values)


async def test_a_lost_kek_is_not_replaced(deployment, moved):
    """Only a KEK that is held elsewhere is made anew in the primary backend.

    Shown to fail: without `Backends.have` in TenantKeys.aim.
    """
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        await keyvault.app.backends.primary.destroy("tenant/acme")
        with pytest.raises(grpc.RpcError) as caught:
            await keyvault.admin.RotateTenantKey(
                admin_pb2.RotateTenantKeyRequest(tenant=TENANT, request_id=new_id("req"))
            )
        assert error_info(caught.value).reason == "TENANT_KEY_MISSING"


async def test_until_when_the_old_backend_is_needed(deployment, moved, monkeypatch):
    """What its epochs wrap is not moved: it is said how long that lives, and without it keyvault
    does not start until then, unless an operator says that it is lost.

    Shown to fail: with needed.check saying nothing; with the epochs left out.
    """
    await _filled(deployment, 2)
    async with kv.running(deployment) as keyvault:
        content = content_pb2_grpc.ContentKeyServiceStub(keyvault.channel("orchestrator"))
        await content.GetContentKey(content_pb2.GetContentKeyRequest(tenant=TENANT))
    moved()
    async with kv.running(deployment) as keyvault:
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        answer = await keyvault.admin.ListKekBackends(admin_pb2.ListKekBackendsRequest())
        new, old = answer.backends
        assert (new.backend, new.primary, new.data_keys, new.tenants) == ("elsewhere", True, 2, 1)
        assert new.system_keys == 3
        assert (old.backend, old.primary, old.configured) == ("local", False, True)
        assert (old.data_keys, old.system_keys) == (0, 0)
        until = old.epochs_end_time.ToDatetime(datetime.UTC)
        days = (until - datetime.datetime.now(datetime.UTC)).days
        assert days in range(90, 95)

    def alone(settings, database):
        keyring = load_keyring(settings.keyring_file)
        return kek.Backends(Elsewhere(database, keyring, settings.deployment))

    monkeypatch.setattr(server, "open_backends", alone)
    monkeypatch.setattr(migrate, "open_backends", alone)
    said = rf"local is not configured.*epochs until {until:%Y-%m-%d %H:%M} UTC.*BACKENDS_READ"
    with pytest.raises(ConfigError, match=said):
        async with kv.running(deployment):
            pass
    async with kv.running(deployment, kek_backends_lost="local") as keyvault:
        key = await keyvault.add_active(name="new")
        assert await kv.try_lease(keyvault, key) == ""


async def test_an_old_backend_that_is_not_configured_any_more(deployment, soon):
    """Versions of a backend that is gone are undecryptable, and said to be."""
    await _filled(deployment, 2)
    async with kv.running(deployment) as keyvault:

        def gone(found) -> None:
            for key in found.every_key():
                lifecycle.version_of(found.edit_key(key.key_id), 1).kek_backend = "gone"
            found.events.append(audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED))

        await keyvault.app.ledger.change("acme", gone, ALL)
        job = await rewrap(keyvault, trim=True)
        assert (job.phase, job.failed) == (admin_pb2.KEK_JOB_PHASE_PARTIAL, 2)
        assert {one.reason for one in job.failures} == {"UNDECRYPTABLE"}
