"""vault_reconcile: a decrypt in Vault's audit log that no lease explains raises an alarm."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

from byokeep import vaultlog
from byokeep.keyvault.v1 import audit_pb2

from tests.harness import keyvault as kv


def write_profile(keyvault, folder) -> dict[str, str]:
    """Write an auditor's profile; return the environment that finds it."""
    deployment = keyvault.deployment
    trust = {
        "deployment": kv.DEPLOYMENT,
        "ca": [(deployment.folder / "ca.pem").read_text()],
        "intake_signing_keys": {},
        "audit_log_keys": keyvault.audit_keys,
    }
    (folder / "trust.json").write_text(json.dumps(trust))
    (folder / "config.toml").write_text(
        f"""
        default_profile = "test"
        [profiles.test]
        orchestrator = "127.0.0.1:1"
        orchestrator_name = "orchestrator.byokeep.internal"
        keyvault = "127.0.0.1:{keyvault.port}"
        keyvault_name = "{kv.NAME}"
        trust = "trust.json"
        certificate = "{deployment.folder}/auditor.pem"
        key = "{deployment.folder}/auditor.key"
        tenant = "acme"
        """
    )
    return {**os.environ, "BYOKEEP_CONFIG": str(folder / "config.toml")}


async def reconcile(vault, environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "byokeep.cli", "admin", "reconcile-vault"]
    return await asyncio.to_thread(
        subprocess.run,
        [*command, str(vault.audit_log), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_vault_reconcile(own_vault, deployment, tmp_path):
    """Real Vault, real audit device: leases are explained; what somebody opens with keyvault's
    rights is found, whatever lease they name.

    Shown to fail without the header in `VaultBackend.unwrap`, and without `opened_for` in
    `Leasing._seal`: then every lease is an alarm."""
    vault = own_vault
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        for tenant in ("acme", "globex"):
            await keyvault.create_tenant(tenant)
        ours = await keyvault.add_active(tenant="acme")
        theirs = await keyvault.add_active(tenant="globex")
        for key in (ours, theirs, ours):
            assert await kv.try_lease(keyvault, key) == ""
        environment = write_profile(keyvault, tmp_path)
        ran = await reconcile(vault, environment)
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        assert json.loads(ran.stdout)["openings"] == 3

        # A rogue with the data identity's token opens a data key from the database.
        rows = await keyvault.sql("SELECT wrapped_dek FROM key_secret WHERE tenant = 'acme'")
        ciphertext = bytes(rows[0][0]).decode()
        token = vault.token("keyvault-data")
        path = "transit/decrypt/byokeep-tenant-acme"
        leases = [
            event.lease_id
            for event in await keyvault.events("tenants/globex")
            if event.type == audit_pb2.AUDIT_EVENT_TYPE_LEASED
        ]
        vault.api("POST", path, token=token, ciphertext=ciphertext)
        ran = await reconcile(vault, environment)
        assert ran.returncode == 6
        (rogue,) = json.loads(ran.stdout)["unexplained"]
        assert (rogue["path"], rogue["what"]) == (path, "no lease is named")
        vault.lease_header = leases[0]
        vault.api("POST", path, token=token, ciphertext=ciphertext)
        found = json.loads((await reconcile(vault, environment)).stdout)["unexplained"]
        assert [one["what"] for one in found] == [
            "no lease is named",
            "a lease is named that the tenant's chain does not have",
        ]
        assert kv.PROVIDER_KEY not in vault.audit_log.read_text()


async def test_vault_reconcile_reads_its_own_log(own_vault, deployment, tmp_path):
    """Openings are counted as Vault wrote them; the header is in the clear, values are not."""
    vault = own_vault
    async with kv.running(deployment, **vault.settings(tmp_path)) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert await kv.try_lease(keyvault, key) == ""
        with vault.audit_log.open() as lines:
            accesses = list(vaultlog.read(lines, mount="transit", prefix="byokeep-"))
        assert [one.purpose[:4] for one in accesses if one.tenant == "acme"] == ["lea_"]
        assert all(one.accessor.startswith("hmac-") for one in accesses)
