"""Rotation, rewrap and shred sweeps of a tenant's KEK, on the local backend."""

from __future__ import annotations

import asyncio
import datetime
import time

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, custody_pb2, lease_pb2
from byokeep.names import key_name

from services.keyvault.kek import KekMissingError, UnwrapError
from services.keyvault.ledger import ALL, clock
from tests.harness import bulk, rows
from tests.harness import keyvault as kv

TENANT = "tenants/acme"
pytestmark = pytest.mark.usefixtures("soon")


async def rotate(keyvault, request_id: str | None = None) -> int:
    answer = await keyvault.admin.RotateTenantKey(
        admin_pb2.RotateTenantKeyRequest(tenant=TENANT, request_id=request_id or new_id("req"))
    )
    return answer.version


async def rewrap(keyvault, **changes) -> admin_pb2.RewrapTenantResponse:
    """Rewrap to the end; return the last message."""
    request = admin_pb2.RewrapTenantRequest(tenant=TENANT, **changes)
    return [one async for one in keyvault.admin.RewrapTenant(request, timeout=60)][-1]


async def kek_versions(keyvault) -> list[int]:
    rows = await keyvault.sql(
        "SELECT version FROM local_kek WHERE name = 'tenant/acme' ORDER BY version"
    )
    return [version for (version,) in rows]


async def open_all(keyvault, values: dict[str, str]) -> None:
    """Lease every key, as a runner's child would, and see that it is the right one."""
    at_once = asyncio.Semaphore(8)

    async def one(key_id: str, value: str) -> None:
        key = custody_pb2.ProviderKey(name=key_name("acme", key_id), provider=1, active_version=1)
        child = kv.Child(2)
        request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
        async with at_once:
            lease = await keyvault.leases().LeaseKey(request)
            await keyvault.leases().ReleaseLease(
                lease_pb2.ReleaseLeaseRequest(
                    lease_id=lease.lease_id, outcome=lease_pb2.LEASE_OUTCOME_COMPLETED
                )
            )
        assert child.open(request, lease) == value

    # A group: where one fails, the others' calls end before the channel is closed.
    async with asyncio.TaskGroup() as group:
        for item in values.items():
            group.create_task(one(*item))


async def _status(keyvault) -> tuple[int, int]:
    """How many keys don't open, and of how many tenants something is still to be done."""
    await keyvault.app.upkeep.scan()
    status = await keyvault.admin.GetStatus(admin_pb2.GetStatusRequest())
    return status.undecryptable_keys, status.open_kek_jobs


async def until(condition, seconds: float = 60.0) -> None:
    """Wait for an awaitable condition."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.1)


async def test_rotate_then_rewrap_then_trim(keyvault):
    """Old rows open after the rotation, all are wrapped anew, only then the old version goes."""
    values = await bulk.fill(keyvault, 30)
    assert await rotate(keyvault) == 2
    await open_all(keyvault, values)
    last = await rewrap(keyvault)
    assert (last.done, last.total, last.failed) == (30, 30, 0)
    assert last.phase == admin_pb2.KEK_JOB_PHASE_DONE
    assert await kek_versions(keyvault) == [1, 2]
    assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
    assert await kek_versions(keyvault) == [2]
    await open_all(keyvault, values)
    # A second "create" finds it, and does not bring version 1 back.
    assert not (await keyvault.create_tenant()).created
    assert await kek_versions(keyvault) == [2]
    kinds = [event.type for event in await keyvault.events()]
    assert kinds.count(audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_ROTATED) == 1
    rewrapped = [
        event
        for event in await keyvault.events()
        if event.type == audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED
    ]
    assert [(event.count, event.detail) for event in rewrapped] == [
        (0, "local v2"),
        (30, "local v2"),
        (0, "local v2"),
    ]


async def test_the_same_request_rotates_once(keyvault):
    request_id = new_id("req")
    assert await rotate(keyvault, request_id) == 2
    assert await rotate(keyvault, request_id) == 2
    await rewrap(keyvault, request_id=request_id)
    with pytest.raises(grpc.RpcError) as caught:
        await rewrap(keyvault, request_id=request_id, trim=True)
    assert error_info(caught.value).reason == "REQUEST_ID_CONFLICT"
    assert await kek_versions(keyvault) == [1, 2]


async def test_a_row_that_does_not_open_fails_alone_and_stops_the_trim(keyvault):
    """The job ends, names what failed, and trims nothing.

    Shown to fail: with Trim._trim going on although versions are left.
    """
    values = await bulk.fill(keyvault, 12)
    bad = sorted(values)[5]
    await keyvault.sql(
        "UPDATE key_secret SET wrapped_dek = set_byte(wrapped_dek, 30,"
        " get_byte(wrapped_dek, 30) # 1) WHERE key_id = %s",
        bad,
    )
    await rotate(keyvault)
    last = await rewrap(keyvault, trim=True)
    assert last.phase == admin_pb2.KEK_JOB_PHASE_PARTIAL
    assert (last.done, last.failed) == (11, 1)
    assert [(one.key_id, one.version, one.reason) for one in last.failures] == [
        (bad, 1, "ROW_TAMPERED")
    ]
    assert await kek_versions(keyvault) == [1, 2]
    assert await _status(keyvault) == (1, 1)
    await open_all(keyvault, {key: value for key, value in values.items() if key != bad})
    # Destroyed, it is in nobody's way any more.
    await keyvault.change("DestroyKey", key_name("acme", bad))
    assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
    assert await _status(keyvault) == (0, 0)


async def test_a_version_that_is_gone_is_counted_and_never_retried_for_ever(keyvault):
    values = await bulk.fill(keyvault, 4)
    await rotate(keyvault)
    await keyvault.sql("DELETE FROM local_kek WHERE name = 'tenant/acme' AND version = 1")
    keyvault.app.backends.primary._cache.clear()
    last = await rewrap(keyvault)
    assert (last.phase, last.failed) == (admin_pb2.KEK_JOB_PHASE_PARTIAL, 4)
    assert {one.reason for one in last.failures} == {"UNDECRYPTABLE"}
    assert await _status(keyvault) == (4, 1)
    key = custody_pb2.ProviderKey(
        name=key_name("acme", next(iter(values))), provider=1, active_version=1
    )
    assert await kv.try_lease(keyvault, key) == "UNDECRYPTABLE"


async def test_an_envelope_of_another_version_is_said_as_such(keyvault):
    """Not damaged: written by a newer keyvault; the tenant can re-key, and it is counted.

    Shown to fail: with UnknownEnvelopeError an EnvelopeError like any other.
    """
    key = await keyvault.add_active()
    key_id = key.name.split("/")[3]
    place = "acme", key_id, 1

    found = await keyvault.app.ledger.read("acme", (), [place])
    wrapped, envelope = found.secrets[place]
    await rows.store(keyvault.app.ledger, place, wrapped, envelope[:3] + b"9" + envelope[4:])
    assert await kv.try_lease(keyvault, key) == "UNDECRYPTABLE"
    assert await kv.try_lease(keyvault, key) == "UNDECRYPTABLE"
    assert await _status(keyvault) == (1, 0)


async def test_a_row_that_changed_meanwhile_is_not_written(keyvault, monkeypatch):
    """Destroyed between read and write: the destruction stands.

    Shown to fail: without the look at the version's digest in Rewrap._swap.
    """
    values = await bulk.fill(keyvault, 3)
    victim = sorted(values)[1]
    backend = keyvault.app.backends.primary
    real = backend.rewrap
    stored = "SELECT 1 FROM key_secret WHERE key_id = %s"

    async def slow(name, wrapped):
        results = await real(name, wrapped)
        if await keyvault.sql(stored, victim):
            await keyvault.change("DestroyKey", key_name("acme", victim))
        return results

    monkeypatch.setattr(backend, "rewrap", slow)
    await rotate(keyvault)
    last = await rewrap(keyvault)
    assert (last.done, last.failed, last.phase) == (2, 0, admin_pb2.KEK_JOB_PHASE_DONE)
    assert await keyvault.sql(stored, victim) == []


async def test_a_target_that_moves_to_another_backend_meanwhile_is_left_to_whose_primary_it_is(
    keyvault, monkeypatch
):
    """What this process's primary backend wraps is never noted as another's.

    Shown to fail: without the second look at what is left in Rewrap._work.
    """
    await bulk.fill(keyvault, 3)
    await rotate(keyvault)
    ledger = keyvault.app.ledger
    read = ledger.read

    def aim(backend: str):
        def decide(found):
            state = found.edit()
            state.target_backend, state.target_version = backend, 2
            found.events.append(audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED))

        return ledger.change("acme", decide)

    async def late(name, parts=(), secrets=()):
        found = await read(name, parts, secrets)
        if parts:
            await aim("elsewhere")
        return found

    monkeypatch.setattr(ledger, "read", late)
    await aim("local")
    await keyvault.tend()
    found = await read("acme", ALL)
    wrapped = {
        (one.kek_backend, one.kek_version) for key in found.every_key() for one in key.versions
    }
    assert (found.state.target_backend, wrapped) == ("elsewhere", {("local", 1)})


async def test_what_is_staged_under_a_trimmed_version_is_staged_again(keyvault, monkeypatch):
    """A data key made before the rotation and stored after the trim could never be opened.

    Shown to fail: without may_store in Staging._store.
    """
    backend = keyvault.app.backends.primary
    staging = keyvault.app._staging
    real, calls = staging._open, []

    async def slow(order, data_key, context):
        opened = await real(order, data_key, context)
        calls.append(1)
        if len(calls) == 1:
            await rotate(keyvault)
            await rewrap(keyvault, trim=True)
        return opened

    monkeypatch.setattr(staging, "_open", slow)
    key = await keyvault.stage()
    assert len(calls) == 2
    assert key.versions[-1].kek_version == 2
    assert await backend.newest("tenant/acme") == 2
    key = await keyvault.promote(key.name, 1)
    assert await kv.try_lease(keyvault, key) == ""


async def test_shred_sweep_after_destroy(deployment):
    """9. A destroyed key's data key is dead once its sweep is over; the others live on.

    The local backend promises nothing of old copies: the tombstone says "none". Shown to
    fail: with Trim._sweep doing nothing.
    """
    async with kv.running(deployment, shred_after_seconds=1) as keyvault:
        await keyvault.create_tenant()
        values = await bulk.fill(keyvault, 8)
        gone = sorted(values)[:3]
        copies = await keyvault.sql("SELECT key_id, wrapped_dek FROM key_secret")
        for key_id in gone:
            await keyvault.change("DestroyKey", key_name("acme", key_id))
        assert await kv.swept(keyvault)
        # Three destructions, one sweep or, where they took long, as many.
        newest = (await kek_versions(keyvault))[-1]
        assert await kek_versions(keyvault) == [newest]
        assert 2 <= newest <= 4
        backend = keyvault.app.backends.primary
        backend._cache.clear()
        for key_id, wrapped in copies:
            if key_id in gone:
                with pytest.raises((KekMissingError, UnwrapError)):
                    await backend.unwrap("tenant/acme", wrapped)
        await open_all(keyvault, {key: values[key] for key in values if key not in gone})
        events = await keyvault.events()
        told = [e for e in events if e.type == audit_pb2.AUDIT_EVENT_TYPE_DESTROYED]
        # Each key as a whole, then its version.
        assert [one.key_version for one in told] == [0, 1] * 3
        tombstones = [one for one in told if one.key_version]
        assert [(one.key_id, one.shred) for one in tombstones] == [(key, "none") for key in gone]
        trimmed = [e for e in events if e.type == audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMED]
        assert (trimmed[-1].detail, trimmed[-1].shred) == (f"local v{newest}", "none")


@pytest.mark.parametrize("when", ["now", "grace", "invalid"])
async def test_shred_sweep_after_a_version(deployment, when):
    """A version's data key dies as its key's would: replaced, past its grace, or found invalid.

    Shown to fail: with `owed` of keys that are destroyed as a whole alone.
    """
    async with kv.running(deployment, shred_after_seconds=1) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        _, _, _, key_id = key.name.split("/")
        if when == "invalid":
            await keyvault.stage(key_id=key_id, operation="rotate")
            await keyvault.change("DestroyKeyVersion", key.name, version=2)
        else:
            await keyvault.add_active(
                key_id=key_id, operation="rotate", destroy_previous=when == "now"
            )
        if when == "grace":
            assert await kv.swept(keyvault)
            assert await kek_versions(keyvault) == [1]
            real = keyvault.app.ledger.now
            later = datetime.timedelta(hours=25)
            # The database's clock stays behind.
            keyvault.app.ledger.now = lambda: real() + later

        async def swept() -> bool:
            await keyvault.tend()
            return await kek_versions(keyvault) == [2]

        await until(swept)
        keyvault.app.ledger.now = clock
        current = await keyvault.custody.GetKey(custody_pb2.GetKeyRequest(name=key.name))
        assert await kv.try_lease(keyvault, current.key) == ""


async def test_shred_tenant_ends_what_was_to_come(deployment):
    """9. The tenant's KEK is gone, its waiting sweep too, and the tombstones say what it is
    worth; no tenant of the same name is ever made again."""
    async with kv.running(deployment, shred_after_seconds=3600) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        other = await keyvault.add_active(name="other")
        await rotate(keyvault)
        assert (await rewrap(keyvault, trim=True)).phase == admin_pb2.KEK_JOB_PHASE_DONE
        await keyvault.change("DestroyKey", other.name)
        answer = await keyvault.admin.ShredTenant(
            admin_pb2.ShredTenantRequest(tenant=TENANT, request_id=new_id("req"))
        )
        assert (answer.destroyed_versions, answer.shred) == (1, "none")
        assert await kek_versions(keyvault) == []
        assert (await keyvault.events())[-1].type == audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED
        for call in (rotate(keyvault), keyvault.create_tenant(), keyvault.add_active()):
            assert await kv.refusal(call) == "TENANT_KEY_MISSING"
        assert await kv.try_lease(keyvault, key) == "WRONG_STATE"
        assert await _status(keyvault) == (0, 0)
        await keyvault.tend()
        assert await kek_versions(keyvault) == []


async def test_tenants_and_what_wraps_their_keys(keyvault):
    await keyvault.create_tenant("other")
    await bulk.fill(keyvault, 5)
    await rotate(keyvault)
    await bulk.fill(keyvault, 1)
    first = await keyvault.admin.ListTenantKeys(admin_pb2.ListTenantKeysRequest(page_size=1))
    (entry,) = first.tenant_keys
    assert entry.tenant == TENANT
    (holding,) = entry.holdings
    assert (holding.backend, holding.oldest_version, holding.newest_version) == ("local", 1, 2)
    assert holding.rows == 6
    second = await keyvault.admin.ListTenantKeys(
        admin_pb2.ListTenantKeysRequest(page_size=1, page_token=first.next_page_token)
    )
    assert [one.tenant for one in second.tenant_keys] == ["tenants/other"]
    assert not second.tenant_keys[0].holdings
    assert not second.tenant_keys[0].kek_destroyed


async def test_a_target_that_is_not_the_primary_is_refused(keyvault):
    with pytest.raises(grpc.RpcError) as caught:
        await rewrap(keyvault, target_backend="vault")
    assert error_info(caught.value).reason == "KEK_BACKEND_NOT_PRIMARY"
