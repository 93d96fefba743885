"""A namespace of Vault's: set up in it, worked in it, and what is said where it is the wrong one.

On OpenBao, whatever `BYOKEEP_TEST_VAULT` says: Vault's open version has no namespaces, and takes
no notice of the header."""

from __future__ import annotations

import pytest
from byokeep import vaultlog
from byokeep.ids import new_id

from services.keyvault import kek
from services.keyvault.kek.vault.backend import VaultBackend
from tests.harness import keyvault as kv
from tests.harness.vault import write_secret
from tests.harness.vault_backend import first_login


async def test_a_whole_life_in_a_namespace(in_namespace, deployment, tmp_path):
    """KEKs, anchor and checkpoints in the namespace: leased, rotated, rewrapped, trimmed,
    shredded; the root namespace has nothing of it.

    Shown to fail without the header in `Call`: the login is refused."""
    vault = in_namespace
    settings = vault.settings(
        tmp_path, vault_anchor="byokeep/anchor", vault_checkpoint_key="byokeep-checkpoint"
    )
    async with kv.running(deployment, **settings) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert await kv.try_lease(keyvault, key) == ""
        rotated = await keyvault.admin.RotateTenantKey(
            kv.admin_pb2.RotateTenantKeyRequest(tenant="tenants/acme", request_id=new_id("req"))
        )
        assert rotated.version == 2
        request = kv.admin_pb2.RewrapTenantRequest(tenant="tenants/acme", trim=True)
        last = [one async for one in keyvault.admin.RewrapTenant(request, timeout=60)][-1]
        assert (last.done, last.phase) == (1, kv.admin_pb2.KEK_JOB_PHASE_DONE)
        assert await kv.try_lease(keyvault, key) == ""
        path = "transit/keys/byokeep-tenant-acme"
        assert vault.status(path, token=vault.root_token) == 200
        elsewhere(vault, path, 404)
        shred = kv.admin_pb2.ShredTenantRequest(tenant="tenants/acme", request_id=new_id("req"))
        assert (await keyvault.admin.ShredTenant(shred)).shred == "immediate"
        assert vault.status(path, token=vault.root_token) == 404
        anchored = vault.api("GET", "byokeep/data/anchor")["data"]
        assert '"size"' in anchored["data"]["text"]


def elsewhere(vault, path: str, status: int) -> None:
    """Expect a status of the root namespace."""
    vault.namespace, ours = "", vault.namespace
    try:
        assert vault.status(path, token=vault.root_token) == status
    finally:
        vault.namespace = ours


async def test_the_audit_log_says_which_namespace(in_namespace, deployment, tmp_path):
    """Openings are told apart by their namespace, and the audited header is in the clear."""
    vault = in_namespace
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        await keyvault.create_tenant("named")
        key = await keyvault.add_active(tenant="named")
        assert await kv.try_lease(keyvault, key) == ""

    def purposes(namespace: str) -> list[str]:
        with vault.audit_log.open() as lines:
            read = list(
                vaultlog.read(lines, mount="transit", prefix="byokeep-", namespace=namespace)
            )
        return [one.purpose[:4] for one in read if one.tenant == "named"]

    assert purposes("teams/byokeep") == ["lea_"]
    assert purposes("") == []
    assert purposes("teams") == []


@pytest.mark.parametrize("namespace", ["teams/nowhere", "nowhere", "teams/byokeep/below"])
async def test_a_namespace_that_is_not_there(in_namespace, deployment, tmp_path, namespace):
    """Shown to fail without `_state` in `Session`: it is said that a mount is missing."""
    settings = in_namespace.settings(tmp_path, vault_namespace=namespace)
    assert await first_login(deployment, settings) == "no_namespace"


@pytest.mark.parametrize("namespace", ["", "teams"])
async def test_another_namespace(in_namespace, deployment, tmp_path, namespace):
    """It is there, and not set up for keyvault: to whoever has no token, a login method that is
    not there is one that refuses."""
    settings = in_namespace.settings(tmp_path, vault_namespace=namespace)
    assert await first_login(deployment, settings) == "login_refused"


async def test_nothing_is_taken_for_destroyed_in_a_wrong_namespace(
    in_namespace, deployment, tmp_path
):
    """A token of the root namespace is taken in every namespace. In one that is not there, or has
    no Transit engine, a KEK is not "gone": nothing may be entered as destroyed.

    Shown to fail with every 404 taken for a missing KEK in `Keys._newest`."""
    vault = in_namespace
    token = write_secret(tmp_path / "token", vault.root_token)
    login = f"token_file token={token}"
    for namespace, state in (("teams/byokeep", ""), ("teams", "no_mount"), ("x", "no_namespace")):
        settings = vault.settings(
            tmp_path, vault_namespace="teams/byokeep", vault_admin_login=login
        )
        backend = VaultBackend(deployment.settings(**settings))
        await backend.start()
        try:
            # As if the setting had been wrong all along; the login would have failed.
            backend.session("admin")._namespace = namespace
            if not state:
                await backend.destroy("tenant/nobody")
                continue
            for call in (backend.destroy, backend.newest, backend.create, backend.rotate):
                with pytest.raises(kek.KekUnavailableError) as refused:
                    await call("tenant/nobody")
                assert refused.value.state == state
        finally:
            await backend.close()
