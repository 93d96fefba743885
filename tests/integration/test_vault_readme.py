"""deploy/vault/README.md as somebody follows it: its own command lines and settings, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.harness import keyvault as kv
from tests.harness.pages import block
from tests.harness.replica import ROOT, Process, Replica, environment
from tests.harness.vault_binary import OPENBAO

PAGE = "deploy/vault/README.md"
README = (ROOT / PAGE).read_text()


def shell(vault, text: str) -> str:
    """Run lines in a checkout, as Vault's administrator has it."""
    done = subprocess.run(
        # OpenBao's reader types `bao` for `vault`.
        ["/bin/sh", "-euc", f'vault() {{ "{vault.product.binary()}" "$@"; }}\n{text}'],
        cwd=ROOT,
        env={
            "PATH": f"{vault.folder}/path:{os.environ['PATH']}",
            "VAULT_ADDR": vault.address,
            "VAULT_CACERT": str(vault.ca),
            "VAULT_TOKEN": vault.root_token,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def on_path(vault) -> None:
    folder = vault.folder / "path"
    folder.mkdir()
    (folder / vault.product.command).symlink_to(vault.product.binary())


async def test_the_readme_step_by_step(bare_vault, deployment, tmp_path):
    """An empty Vault, set up by the README's lines; keyvault migrated and started in both roles by
    the README's settings; a lease. (Its Kubernetes login: test_kubernetes_login; its last line:
    test_vault_reconcile.)"""
    vault = bare_vault
    on_path(vault)
    command = "VAULT_CLI=bao deploy" if vault.product == OPENBAO else "deploy"
    set_up = block(PAGE, "set-up")
    (line,) = re.findall(rf"^{command}/vault/setup.sh kubernetes", set_up, re.MULTILINE)
    said = shell(vault, line.replace("kubernetes", "approle"))
    assert "audit" not in said
    given = {}
    for role in ("data", "admin"):
        folder = tmp_path / role
        folder.mkdir()
        text = block(PAGE, "approle").replace("keyvault-data", f"keyvault-{role}")
        shell(vault, text.replace("/run/byokeep", str(folder)))
        login = re.search(r'`BYOKEEP_VAULT_DATA_LOGIN="(approle [^"]*)"`', README).group(1)
        given[role] = {
            f"BYOKEEP_VAULT_{role.upper()}_LOGIN": login.replace("/run/byokeep", str(folder))
        }
    settings = dict(
        line.partition("#")[0].strip().split("=", 1)
        for line in block(PAGE, "settings").splitlines()
    )
    settings["BYOKEEP_VAULT_ADDRESS"] = vault.address
    settings["BYOKEEP_VAULT_CA"] = str(vault.ca)
    common = environment(deployment.settings()) | settings
    common |= {"PATH": os.environ["PATH"], "BYOKEEP_VAULT_DEADLINE_MS": "10000"}
    migrated = subprocess.run(
        [sys.executable, "-m", "services.keyvault", "migrate"],
        cwd=ROOT,
        env=common | given["admin"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert migrated.returncode == 0, migrated.stderr
    with served(common, given, tmp_path) as processes:
        trust = json.loads(migrated.stdout)
        admin, data = (Replica(deployment, processes[role], trust) for role in ("admin", "data"))
        await admin.create_tenant()
        key = await data.add_active()
        assert await kv.try_lease(data, key) == ""
        status = await admin.admin.GetStatus(kv.admin_pb2.GetStatusRequest())
        assert (status.kek_backend, status.kek_backend_healthy) == ("vault", True)
        for one in (admin, data):
            await one.close_channels()
    logged = vault.audit_log.read_text()
    assert all(
        name in logged for name in ("byokeep/data/anchor", "keys/byokeep-checkpoint", "lea_")
    )


@contextmanager
def served(common: dict, given: dict, folder: Path):
    """A keyvault process in each role, killed when the block ends."""
    processes = {}
    try:
        for role in ("admin", "data"):
            processes[role] = Process(common | given[role], folder, role, role)
            processes[role].start()
        for process in processes.values():
            process.wait()
        yield processes
    finally:
        for process in processes.values():
            process.kill()
