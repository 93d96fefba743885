"""`--role data` and `--role admin` as two processes at one Vault, each with its own identity, as
production runs them: what either token may do, by the tokens that the processes really used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2

from tests.harness.keyvault import try_lease
from tests.harness.replica import in_roles
from tests.harness.vault_faults import FaultProxy

TENANT = "tenants/acme"
KEK = "byokeep-tenant-acme"


@pytest.fixture
def proxies(own_vault, tmp_path) -> Iterator[dict[str, FaultProxy]]:
    """A way to Vault for each role, which sees what goes through it."""
    with contextlib.ExitStack() as stack:
        proxies = {}
        for role in ("admin", "data"):
            folder = tmp_path / role
            folder.mkdir()
            proxies[role] = FaultProxy(own_vault, folder)
            stack.callback(proxies[role].close)
        yield proxies


async def test_each_role_has_its_own_identity_alone(own_vault, deployment, tmp_path, proxies):
    """A tenant's whole life through both processes. Then with the token that the data process
    has, nobody creates, rotates, trims or deletes a KEK; with the admin process's, nobody opens
    or makes a data key.

    Shown to fail with both logins given to both processes: they do not start (without
    `check_logins` the data process's tokens are two)."""
    vault = own_vault
    settings = vault.settings(
        tmp_path, vault_anchor="byokeep/anchor", vault_checkpoint_key="byokeep-checkpoint"
    )
    only = {
        role: {"vault_address": proxies[role].address, f"vault_{other}_login": ""}
        for role, other in (("admin", "data"), ("data", "admin"))
    }
    async with in_roles(deployment, "admin", "data", only=only, **settings) as (admin, data):
        await admin.create_tenant()
        key = await data.add_active()
        assert await try_lease(data, key) == ""
        ciphertext = _wrapped(deployment.database_url)
        rotated = await admin.admin.RotateTenantKey(
            admin_pb2.RotateTenantKeyRequest(tenant=TENANT, request_id=new_id("req"))
        )
        assert rotated.version == 2
        request = admin_pb2.RewrapTenantRequest(tenant=TENANT)
        last = [one async for one in admin.admin.RewrapTenant(request, timeout=120)][-1]
        assert (last.done, last.phase) == (1, admin_pb2.KEK_JOB_PHASE_DONE)
        assert await try_lease(data, key) == ""

        for role, proxy in proxies.items():
            # `migrate` logged in as well, with the admin identity.
            assert len(proxy.tokens) == (2 if role == "admin" else 1)
            for token in proxy.tokens:
                assert _policies(vault, token) in (None, [f"keyvault-{role}"])
        _may_not(vault, proxies["data"], _changes())
        _may_not(vault, proxies["admin"], _openings(ciphertext))
        # What was refused changed nothing.
        assert await try_lease(data, key) == ""

        shred = admin_pb2.ShredTenantRequest(tenant=TENANT, request_id=new_id("req"))
        assert (await admin.admin.ShredTenant(shred)).destroyed_versions == 1
        assert await try_lease(data, key) == "WRONG_STATE"
    assert not any(f"/keys/{KEK}" in path for _, path in proxies["data"].seen)
    opened = [path for _, path in proxies["admin"].seen if "/decrypt/" in path or "/data" in path]
    assert not any(KEK in path for path in opened)


def _wrapped(database_url: str) -> str:
    """Return the data key that a reader of the database finds."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT wrapped_dek FROM key_secret").fetchone()
    return bytes(row[0]).decode()


def _policies(vault, token: str) -> list[str] | None:
    """Return a token's policies; None where it is over."""
    if vault.status("auth/token/lookup-self", token=token) == 403:
        return None
    return vault.api("GET", "auth/token/lookup-self", token=token)["data"]["policies"]


def _changes() -> list[tuple[str, str, dict]]:
    return [
        ("POST", "transit/keys/byokeep-tenant-new", {"type": "aes256-gcm96"}),
        ("POST", f"transit/keys/{KEK}/rotate", {}),
        ("POST", f"transit/keys/{KEK}/config", {"min_decryption_version": 2}),
        ("POST", f"transit/keys/{KEK}/trim", {"min_available_version": 2}),
        ("POST", f"transit/keys/{KEK}/config", {"deletion_allowed": True}),
        ("DELETE", f"transit/keys/{KEK}", {}),
        ("GET", f"transit/export/encryption-key/{KEK}", {}),
    ]


def _openings(ciphertext: str) -> list[tuple[str, str, dict]]:
    return [
        ("POST", f"transit/decrypt/{KEK}", {"ciphertext": ciphertext}),
        ("POST", f"transit/decrypt/{KEK}", {"batch_input": [{"ciphertext": ciphertext}]}),
        ("POST", f"transit/datakey/plaintext/{KEK}", {"bits": 256}),
        ("POST", f"transit/rewrap/{KEK}", {"ciphertext": ciphertext}),
        ("POST", f"transit/encrypt/{KEK}", {"plaintext": "AAAA"}),
        ("GET", f"transit/export/encryption-key/{KEK}", {}),
    ]


def _may_not(vault, proxy: FaultProxy, calls: list[tuple[str, str, dict]]) -> None:
    for token in proxy.tokens:
        got = {
            (method, path, *body): vault.status(path, method, token, **body)
            for method, path, body in calls
        }
        assert {call: status for call, status in got.items() if status != 403} == {}
