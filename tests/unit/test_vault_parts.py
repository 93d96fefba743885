"""Parts of the Vault backend that need no Vault: data keys out of bytes, logins, names."""

from __future__ import annotations

import base64
import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.config import ConfigError
from services.keyvault.kek import Backends
from services.keyvault.kek.configured import check_logins, open_anchor
from services.keyvault.kek.keyring import Keyring
from services.keyvault.kek.local import LocalBackend
from services.keyvault.kek.vault import plaintext, states
from services.keyvault.kek.vault.backend import VaultBackend
from services.keyvault.kek.vault.log import KvAnchor
from services.keyvault.kek.vault.login import CredentialError, Login
from services.keyvault.kek.vault.transit import Place
from tests.harness.keyvault import Deployment


@given(st.binary(min_size=32, max_size=32))
def test_a_data_key_is_taken_out_of_the_bytes(key):
    text = base64.b64encode(key).decode()
    for body in (f'{{"data":{{"plaintext":"{text}"}}}}', f'{{"data": {{"plaintext": "{text}" }}}}'):
        found = plaintext.take(bytearray(body.encode()))
        assert found is not None
        assert bytes(found.reveal()) == key


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_another_size_is_no_data_key(size):
    text = base64.b64encode(os.urandom(size)).decode()
    assert plaintext.take(bytearray(f'{{"plaintext":"{text}"}}'.encode())) is None
    assert plaintext.take(bytearray(b'{"errors":["x"]}')) is None


def test_logins_are_parsed_and_refused():
    login = Login.parse("X", "kubernetes role=keyvault-data jwt=/tmp/jwt")
    assert login.values == {"mount": "kubernetes", "role": "keyvault-data", "jwt": "/tmp/jwt"}
    for text in (
        "",
        "password user=me",
        "approle role_id=/a",
        "approle role_id=/a secret_id=/b extra=1",
        "token_file token=",
        "kubernetes",
    ):
        with pytest.raises(ConfigError):
            Login.parse("X", text)


def test_a_credential_that_others_may_read_is_refused(tmp_path):
    """Shown to fail with `private` ignored in `_read`."""
    file = tmp_path / "token"
    file.write_text("hvs.token\n")
    file.chmod(0o600)
    login = Login.parse("X", f"token_file token={file}")
    assert login.token() == "hvs.token"
    file.chmod(0o640)
    with pytest.raises(CredentialError):
        login.token()
    file.unlink()
    with pytest.raises(CredentialError):
        login.token()


def settings(tmp_path, **changes):
    deployment = Deployment(tmp_path, "postgresql://nowhere")
    return deployment.settings(
        **{
            "kek_backend": "vault",
            "vault_address": "https://vault:8200",
            "vault_data_login": "kubernetes role=keyvault-data",
            **changes,
        }
    )


def test_names_of_transit_keys_are_injective_and_valid():
    place = Place("transit", "byokeep-")
    names = [
        "system",
        "tenant/acme",
        "tenant/acme-",
        "tenant/acme--",
        "tenant/system",
        "tenant/tenant-acme",
        "intake/2026-11-23T16",
        "intake/2026-11-23",
        "content/2026-11-23",
    ]
    keys = [place.key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert place.key("tenant/acme") == "byokeep-tenant-acme"
    assert all(key[-1].isalnum() or key[-1] == "_" for key in keys)
    for name in ("tenant/", "tenant/a/b", "tenant/../x", "other/a", "tenant/A", "system/x", ""):
        with pytest.raises(ValueError, match="not the name"):
            place.key(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"vault_data_login": ""},
        {"vault_address": None},
        {"vault_address": "vault:8200"},
        {"vault_address": "https://["},
        {"vault_address": "https://vault:99999"},
        {"vault_address": "https://vault:8200/v1"},
        {"vault_address": "http://vault:8200", "mode": "production"},
    ],
)
def test_wrong_settings_stop_the_start(tmp_path, changes):
    with pytest.raises(ConfigError):
        VaultBackend(settings(tmp_path, **changes))


async def test_a_role_without_an_identity_can_not_use_it(tmp_path):
    backend = VaultBackend(settings(tmp_path))
    with pytest.raises(RuntimeError):
        await backend.create("tenant/acme")
    folder = tmp_path / "admin"
    folder.mkdir()
    login = "kubernetes role=keyvault-admin"
    admin = VaultBackend(settings(folder, vault_data_login="", vault_admin_login=login))
    with pytest.raises(RuntimeError):
        await admin.unwrap("tenant/acme", b"vault:v1:AAAA")
    with pytest.raises(RuntimeError):
        await admin.generate_data_key("tenant/acme")
    with pytest.raises(RuntimeError):
        await admin.rewrap("tenant/acme", [b"vault:v1:AAAA"])


@pytest.mark.parametrize("role", ["data", "admin", "all"])
@pytest.mark.parametrize("logins", [("data",), ("admin",), ("data", "admin")], ids="-".join)
@pytest.mark.parametrize("where", ["kek_backend", "kek_backends_read"])
def test_a_role_has_its_own_logins_and_no_other(tmp_path, role, logins, where):
    """Shown to fail without the first raise in `check_logins`."""
    backends = {"kek_backend": "local", where: "vault"}
    changes = {
        f"vault_{one}_login": f"kubernetes role=keyvault-{one}" if one in logins else ""
        for one in ("data", "admin")
    }
    given = settings(tmp_path, **backends, **changes)
    if set(logins) == ({"data", "admin"} if role == "all" else {role}):
        check_logins(given, role)
        return
    with pytest.raises(ConfigError, match=f"role {role} (needs|is not to have) BYOKEEP_VAULT_"):
        check_logins(given, role)


def test_the_anchor_needs_a_place_that_is_configured(tmp_path):
    vault = settings(tmp_path, anchor_file=None, vault_anchor="byokeep/anchor")
    backend = VaultBackend(vault)
    assert isinstance(open_anchor(vault, Backends(backend)), KvAnchor)
    nowhere = dataclasses.replace(vault, vault_anchor="")
    with pytest.raises(ConfigError, match="BYOKEEP_ANCHOR_FILE or BYOKEEP_VAULT_ANCHOR"):
        open_anchor(nowhere, Backends(backend))
    local = LocalBackend(None, Keyring({}, ""), "test")
    with pytest.raises(ConfigError, match="vault is neither"):
        open_anchor(vault, Backends(local))


def test_every_state_has_a_sentence():
    named = set(states.OF_HEALTH.values()) | {states.of_answer(code) for code in range(200, 600)}
    assert named <= set(states.SENTENCES)
    assert set(states.SENTENCES) >= states.USABLE
    assert states.health("sealed").ok is False
    assert states.health("standby").ok is True
