"""Keys of tenants in a real Vault: opened, swapped, rotated, rewrapped, trimmed, destroyed."""

from __future__ import annotations

import pytest
from byokeep.ids import new_id

from services.keyvault import kek
from services.keyvault.kek.vault.backend import VaultBackend
from tests.harness import keyvault as kv
from tests.harness import rows


@pytest.fixture
async def backend(vault, deployment, tmp_path):
    backend = VaultBackend(deployment.settings(**vault.settings(tmp_path)))
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
async def tenants(backend):
    """Two tenants' KEKs, gone after the test."""
    names = [kek.tenant_kek(new_id("t").replace("_", "-")) for _ in range(2)]
    for name in names:
        assert await backend.create(name) is True
        assert await backend.create(name) is False
    yield names
    for name in names:
        await backend.destroy(name)


async def test_transit_wrong_tenant(backend, tenants):
    """Shown to fail with one Transit key for all tenants in `_key`."""
    ours, theirs = tenants
    made = await backend.generate_data_key(ours)
    with made.plaintext as key:
        assert len(key.reveal()) == 32
        with await backend.unwrap(ours, made.wrapped) as opened:
            assert opened.reveal() == key.reveal()
    with pytest.raises(kek.UnwrapError):
        await backend.unwrap(theirs, made.wrapped)
    damaged = made.wrapped[:-6] + bytes(reversed(made.wrapped[-6:-2])) + made.wrapped[-2:]
    for wrong in (damaged, b"", b"vault:v1:", b"local", made.wrapped + b"\n", b"\xff" * 40):
        with pytest.raises(kek.UnwrapError):
            await backend.unwrap(ours, wrong)
    with pytest.raises(kek.UnwrapError):
        await backend.unwrap(ours, made.wrapped.replace(b":v1:", b":v9:"))


async def test_swap_rows_of_two_tenants(vault, deployment, tmp_path):
    """Whoever writes the database puts one tenant's wrapped data key and envelope into
    another's row: keyvault gives it to no Vault; and had its state the digest of it, Vault would
    refuse to open it there."""
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        for tenant in ("acme", "globex"):
            await keyvault.create_tenant(tenant)
        ours = await keyvault.add_active(tenant="acme")
        theirs = await keyvault.add_active("sk-proj-" + "z9Y8x7W6" * 6, tenant="globex")
        assert await kv.try_lease(keyvault, ours) == ""
        await keyvault.sql(
            "UPDATE key_secret AS v SET wrapped_dek = o.wrapped_dek, envelope = o.envelope"
            " FROM key_secret AS o WHERE v.tenant <> o.tenant"
        )
        assert await kv.try_lease(keyvault, ours) == "ROW_TAMPERED"
        assert await kv.try_lease(keyvault, theirs) == "ROW_TAMPERED"
        for key in (ours, theirs):
            _, tenant, _, key_id = key.name.split("/")
            query = "SELECT wrapped_dek, envelope FROM key_secret WHERE key_id = %s"
            ((wrapped, envelope),) = await keyvault.sql(query, key_id)
            await rows.store(
                keyvault.app.ledger, (tenant, key_id, 1), bytes(wrapped), bytes(envelope)
            )
        assert await kv.try_lease(keyvault, ours) == "ROW_TAMPERED"
        assert await kv.try_lease(keyvault, theirs) == "ROW_TAMPERED"


async def test_a_whole_life_with_vault(vault, deployment, tmp_path):
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert key.versions[0].kek_backend == "vault"
        child = kv.Child()
        request = kv.lease_request(deployment, kv.grant_for(key, child), child)
        lease = await keyvault.leases().LeaseKey(request)
        assert child.open(request, lease) == kv.PROVIDER_KEY
        await keyvault.change("DestroyKey", key.name)
        destroyed = [event for event in await keyvault.events() if event.shred]
        assert {event.shred for event in destroyed} == {"immediate"}
        status = await keyvault.admin.GetStatus(kv.admin_pb2.GetStatusRequest())
        assert (status.kek_backend, status.kek_backend_healthy) == ("vault", True)


async def test_rotate_rewrap_trim(backend, tenants):
    name, other = tenants
    old = [await backend.generate_data_key(name) for _ in range(3)]
    strange = await backend.generate_data_key(other)
    assert {key.kek_version for key in old} == {1}
    assert await backend.newest(name) == 1
    assert await backend.rotate(name) == 2
    new = await backend.generate_data_key(name)
    assert new.kek_version == 2
    items = [old[0].wrapped, strange.wrapped, b"no ciphertext", old[1].wrapped, b"\xff\xfe"]
    done = await backend.rewrap(name, items)
    assert [type(one) for one in done] == [
        kek.Rewrapped,
        kek.RewrapFailed,
        kek.RewrapFailed,
        kek.Rewrapped,
        kek.RewrapFailed,
    ]
    assert {one.reason for one in done if isinstance(one, kek.RewrapFailed)} == {"ROW_TAMPERED"}
    await backend.trim(name, 2)
    await backend.trim(name, 2)
    for key, wrapped in ((old[0], done[0]), (old[1], done[3])):
        assert wrapped.kek_version == 2
        with key.plaintext as plain, await backend.unwrap(name, wrapped.wrapped) as opened:
            assert opened.reveal() == plain.reveal()
    with pytest.raises(kek.KekMissingError):
        await backend.unwrap(name, old[2].wrapped)
    (gone,) = await backend.rewrap(name, [old[2].wrapped])
    assert gone == kek.RewrapFailed("UNDECRYPTABLE")


async def test_rewrap_in_batches(backend, tenants):
    name, _ = tenants
    made = await backend.generate_data_key(name)
    await backend.rotate(name)
    done = await backend.rewrap(name, [made.wrapped] * 1203)
    assert len(done) == 1203
    assert {one.kek_version for one in done} == {2}
    assert await backend.rewrap(name, []) == []


async def test_a_kek_that_is_gone(backend, tenants):
    name, _ = tenants
    made = await backend.generate_data_key(name)
    await backend.destroy(name)
    await backend.destroy(name)
    for call in (
        backend.unwrap(name, made.wrapped),
        backend.generate_data_key(name),
        backend.rewrap(name, [made.wrapped]),
        backend.newest(name),
        backend.rotate(name),
    ):
        with pytest.raises(kek.KekMissingError):
            await call
    # A KEK of the same name is another key.
    assert await backend.create(name) is True
    with pytest.raises(kek.UnwrapError):
        await backend.unwrap(name, made.wrapped)


async def test_shred_kek_of_the_tenant_deleted_in_vault(vault, deployment, tmp_path):
    """The restored database has the rows; the KEK stays dead, and it is said as such."""
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        await keyvault.create_tenant("doomed")
        key = await keyvault.add_active(tenant="doomed")
        await keyvault.app.backends.primary.destroy(kek.tenant_kek("doomed"))
        assert await kv.try_lease(keyvault, key) == "UNDECRYPTABLE"
        assert vault.status("transit/keys/byokeep-tenant-doomed", token=vault.root_token) == 404


async def test_local_and_vault_side_by_side(vault, deployment, tmp_path):
    """A tenant's older key under the keyring, its newer one in Vault: both are leased."""
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        older = await keyvault.add_active()
    both = vault.settings(tmp_path, kek_backends_read="local")
    async with kv.running(deployment, **both) as keyvault:
        await keyvault.create_tenant()
        newer = await keyvault.add_active(name="second")
        assert (older.versions[0].kek_backend, newer.versions[0].kek_backend) == ("local", "vault")
        assert await kv.try_lease(keyvault, older) == ""
        assert await kv.try_lease(keyvault, newer) == ""


async def test_an_old_ca_does_not_reach_vault(vault, deployment, tmp_path):
    deployment.ca.issue(tmp_path / "other", spiffe_id="other", dns=["localhost"])
    settings = vault.settings(tmp_path, vault_ca=deployment.folder / "ca.pem")
    backend = VaultBackend(deployment.settings(**settings))
    state = await backend._watch.look()
    assert state == "tls"
    await backend.close()
