"""Tokens: renewed, replaced at their maximum life, replaced when they are refused."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.keyvault import kek
from tests.harness.vault import write_secret
from tests.harness.vault_backend import opened, started, until, until_opened, until_refused


def short_role(vault, folder, name: str, ttl: str, max_ttl: str) -> str:
    vault.api(
        "POST",
        f"auth/approle/role/{name}",
        token_policies="keyvault-data",
        token_no_default_policy=True,
        token_ttl=ttl,
        token_max_ttl=max_ttl,
    )
    return vault.approle(folder, name)


async def test_token_lifecycle_renewed(vault, proxy, deployment, tmp_path, wrapped):
    """A token of 3 s serves for longer, with one login.

    Shown to fail without the renewal in `Session._renew`."""
    login = short_role(vault, tmp_path, "renewed", "3s", "1h")
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, vault_data_login=login, vault_admin_login=""
    )
    async with started(deployment, settings) as backend:
        end = time.monotonic() + 9
        while time.monotonic() < end:
            await opened(backend, wrapped)
            await asyncio.sleep(0.2)
        assert proxy.calls("renew-self") >= 2
        assert proxy.calls("/login") == 1


async def test_token_lifecycle_at_its_maximum(vault, proxy, deployment, tmp_path, wrapped):
    """At the token's maximum a new login replaces it, with no call refused in between.

    Shown to fail with renewals alone (`_renew` returning whatever Vault still gave)."""
    login = short_role(vault, tmp_path, "maximum", "4s", "6s")
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, vault_data_login=login, vault_admin_login=""
    )
    async with started(deployment, settings) as backend:
        await until(lambda: proxy.calls("/login") >= 3)
        await opened(backend, wrapped)
        assert proxy.calls("renew-self") >= 1
        assert backend._watch._failures == 0


async def test_token_lifecycle_refused(vault, proxy, deployment, tmp_path, wrapped):
    """A revoked token: one login and one retry, also for calls that come at once.

    Shown to fail without the retry in `Session.ask`; and, with one login for each of the calls,
    without the comparison of tokens in `Session._log_in`."""
    settings = vault.settings(tmp_path, vault_address=proxy.address, vault_admin_login="")
    async with started(deployment, settings) as backend:
        await opened(backend, wrapped)
        await asyncio.sleep(1.2)  # older than what is refused for its policy
        vault.cli("token", "revoke", backend.session("data")._token)
        proxy.seen.clear()
        await asyncio.gather(*(opened(backend, wrapped) for _ in range(8)))
        assert proxy.calls("/login") == 1
        assert proxy.calls("/decrypt/") <= 16


async def test_token_lifecycle_a_wrong_policy_is_said_and_not_hammered(
    vault, proxy, deployment, tmp_path, wrapped
):
    """A role without keyvault's policy: DENIED is said, and logins do not follow each call."""
    vault.api("POST", "auth/approle/role/wrong", token_policies="nothing", token_ttl="15m")
    login = vault.approle(tmp_path, "wrong")
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, vault_data_login=login, vault_admin_login=""
    )
    async with started(deployment, settings) as backend:
        for _ in range(20):
            with pytest.raises(kek.KekUnavailableError) as refused:
                await opened(backend, wrapped)
            assert refused.value.state == "denied"
        assert proxy.calls("/login") <= 4


async def test_token_lifecycle_token_file(vault, proxy, deployment, tmp_path, wrapped):
    """Somebody else keeps a token fresh in a file: it is taken up when the old one is refused,
    and never renewed by us."""
    file = write_secret(tmp_path / "token", vault.token("keyvault-data", ttl="2h"))
    settings = vault.settings(
        tmp_path,
        vault_address=proxy.address,
        vault_data_login=f"token_file token={file}",
        vault_admin_login="",
    )
    async with started(deployment, settings) as backend:
        await opened(backend, wrapped)
        old = file.read_text()
        file.write_text(vault.token("keyvault-data", ttl="2h"))
        await asyncio.sleep(1.2)
        vault.cli("token", "revoke", old)
        await opened(backend, wrapped)
        assert proxy.calls("renew-self") == 0


async def test_token_lifecycle_login_lost_and_found(vault, proxy, deployment, tmp_path, wrapped):
    """The secret id is withdrawn and the token revoked: calls are refused, and go on when the
    file has a new secret id, unaided."""
    login = short_role(vault, tmp_path, "lost", "3s", "4s")
    secret = tmp_path / "lost.secret-id"
    settings = vault.settings(
        tmp_path, vault_address=proxy.address, vault_data_login=login, vault_admin_login=""
    )
    async with started(deployment, settings) as backend:
        vault.cli(
            "write", "auth/approle/role/lost/secret-id/destroy", f"secret_id={secret.read_text()}"
        )
        await until_refused(backend, wrapped, "login_refused")
        await until(lambda: not backend._watch.health().ok)
        answer = vault.api("POST", "auth/approle/role/lost/secret-id")
        secret.write_text(answer["data"]["secret_id"])
        await until_opened(backend, wrapped)


async def test_chores_of_vault_that_die_are_told_and_started_again(
    vault, deployment, tmp_path, wrapped, caplog
):
    """54. The look at Vault and the renewal of each token. Shown to fail without the look at
    `down()` in `Watch.health`."""
    async with started(deployment, vault.settings(tmp_path)) as backend:
        chores = backend._background
        names = {"vault-watch", "vault-token-data", "vault-token-admin"}
        await until(lambda: set(chores.tasks) == names)
        for task in list(chores.tasks.values()):
            task.cancel()
        await until(lambda: set(chores.down()) == names)
        assert (await backend.health()).state == "unwatched"
        await until(lambda: chores.down() == [])
        assert (await backend.health()).ok
        await opened(backend, wrapped)
    died = [one.byokeep_fields["task"] for one in caplog.records if one.msg == "background_died"]
    assert sorted(died) == sorted(names)
