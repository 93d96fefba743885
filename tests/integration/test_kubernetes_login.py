"""Login with a Kubernetes service account: real Vault, its real Kubernetes login method, and an
API server that signs the tokens and reviews them (`tests/harness/kubernetes_api.py`)."""

from __future__ import annotations

import pytest

from tests.harness.kubernetes_api import REVIEWER, KubernetesApi
from tests.harness.vault_backend import (
    first_login,
    opened,
    refusal,
    started,
    until,
    until_opened,
    until_refused,
)

ACCOUNT = "byokeep/keyvault-data"


def configure(vault, api: KubernetesApi, reviewer: str) -> None:
    """Point Vault at the API server; it asks there with an account's token."""
    vault.cli(
        "write",
        "auth/kubernetes/config",
        f"kubernetes_host={api.address}",
        f"kubernetes_ca_cert=@{api.ca}",
        "disable_local_ca_jwt=true",
        f"token_reviewer_jwt={api.token(reviewer)}",
    )


@pytest.fixture
def api(vault, tmp_path):
    """An API server that knows keyvault's service account, and a Vault that asks it."""
    api = KubernetesApi(tmp_path)
    try:
        api.create(ACCOUNT)
        vault.set_up("kubernetes", TOKEN_TTL="3s", TOKEN_MAX_TTL="5s")
        configure(vault, api, REVIEWER)
        yield api
    finally:
        api.stop()


@pytest.fixture
def jwt(tmp_path, api):
    """The file that the kubelet keeps the service account's token in."""
    file = tmp_path / "jwt"
    file.write_text(api.token(ACCOUNT))
    return file


@pytest.fixture
def settings(vault, proxy, tmp_path, jwt):
    return vault.settings(
        tmp_path,
        vault_address=proxy.address,
        vault_data_login=f"kubernetes role=keyvault-data jwt={jwt}",
        vault_admin_login="",
    )


async def test_kubernetes_jwt_is_read_again(proxy, deployment, wrapped, api, jwt, settings):
    """The token is renewed; at its maximum life keyvault logs in again, with the JWT that is in
    the file then. The one of the first login has become worthless meanwhile.

    Shown to fail with the JWT kept from the first login."""
    async with started(deployment, settings) as backend:
        await opened(backend, wrapped)
        assert [review["audiences"] for review in api.reviews] == [["vault"]]
        # The account is made anew: tokens of the old one are refused from here on.
        api.create(ACCOUNT)
        fresh = api.token(ACCOUNT)
        jwt.write_text(fresh)
        await until(lambda: [review["token"] for review in api.reviews].count(fresh) >= 2)
        await until_opened(backend, wrapped)
        assert proxy.calls("renew-self") >= 1


async def test_kubernetes_accounts_that_are_denied(deployment, api, jwt, settings):
    """Another account, the role's account in another namespace, a token for another audience,
    one signed by nobody, one that has expired, one of an account that was deleted."""
    for account in ("byokeep/somebody", "elsewhere/keyvault-data"):
        api.create(account)
    good = api.token(ACCOUNT)
    head, claims, signature = good.split(".")
    wrong = {
        "account": api.token("byokeep/somebody"),
        "namespace": api.token("elsewhere/keyvault-data"),
        "audience": api.token(ACCOUNT, audience="https://kubernetes.default.svc"),
        "signature": f"{head}.{claims}.{signature[:-8]}{signature[-8:][::-1]}",
        "expired": api.token(ACCOUNT, seconds=-3600),
        "deleted": api.token(ACCOUNT, uid="of-the-one-before"),
        "not a JWT": "canary",
    }
    for name, token in wrong.items():
        jwt.write_text(token)
        assert await first_login(deployment, settings) == "login_refused", name
    jwt.unlink()
    assert await first_login(deployment, settings) == "no_credential"
    jwt.write_text(good)
    assert await first_login(deployment, settings) == ""


async def test_kubernetes_jwt_expires_in_its_file(deployment, wrapped, api, jwt, settings):
    """The kubelet does not replace the token: at the maximum life keyvault can't log in, says
    so, and goes on by itself when the file has a new one."""
    jwt.write_text(api.token(ACCOUNT, seconds=2))
    async with started(deployment, settings) as backend:
        await opened(backend, wrapped)
        await until_refused(backend, wrapped, "login_refused")
        await until(lambda: not backend._watch.health().ok)
        jwt.write_text(api.token(ACCOUNT))
        await until_opened(backend, wrapped)


async def test_kubernetes_api_server_is_down(deployment, wrapped, api, settings):
    """A live Vault token serves on; without the API server there is no new one (Vault answers
    403, as it does to a token that it refuses). keyvault comes back by itself."""
    async with started(deployment, settings) as backend:
        await opened(backend, wrapped)
        api.stop()
        try:
            assert await refusal(backend, wrapped) == ""
            await until_refused(backend, wrapped, "login_refused")
            await until(lambda: not backend._watch.health().ok)
        finally:
            api.start()
        await until_opened(backend, wrapped)


async def test_kubernetes_reviewer_without_the_right(vault, deployment, api, settings):
    """Vault's own account may not create TokenReviews: nobody logs in."""
    configure(vault, api, ACCOUNT)
    assert await first_login(deployment, settings) == "login_refused"
    assert api.reviews == []
