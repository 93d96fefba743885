"""policy_matrix: what each identity may do in Vault, path by path; everything else is 403."""

from __future__ import annotations

import base64

import pytest

_B64 = base64.b64encode(b"x" * 32).decode()


@pytest.fixture(scope="module")
def keys(vault):
    """Keys of each kind, a foreign key, a foreign engine, and a ciphertext of each."""
    made = {}
    for name in ("tenant-matrix", "intake-matrix", "content-matrix", "system"):
        path = f"transit/keys/byokeep-{name}"
        vault.api("POST", path, type="aes256-gcm96")
        answer = vault.api("POST", f"transit/datakey/plaintext/byokeep-{name}", bits=256)
        made[name] = answer["data"]["ciphertext"]
    vault.api("POST", "transit/keys/foreign", type="aes256-gcm96")
    return made


@pytest.fixture(scope="module")
def data(vault):
    return vault.token("keyvault-data")


@pytest.fixture(scope="module")
def admin(vault):
    return vault.token("keyvault-admin")


def refused_to_both(kind: str) -> list[tuple[str, str, dict]]:
    key = f"byokeep-{kind}"
    return [
        ("POST", f"transit/encrypt/{key}", {"plaintext": _B64}),
        ("POST", f"transit/encrypt/{key}-new", {"plaintext": _B64}),
        ("GET", f"transit/export/encryption-key/{key}", {}),
        ("GET", f"transit/export/hmac-key/{key}", {}),
        ("GET", f"transit/backup/{key}", {}),
        ("POST", f"transit/restore/{key}", {"backup": "x"}),
        ("POST", f"transit/byok-export/foreign/{key}", {}),
        ("GET", f"transit/byok-export/foreign/{key}", {}),
        ("POST", f"transit/keys/{key}/import", {"ciphertext": "x", "type": "aes256-gcm96"}),
        ("POST", f"transit/keys/{key}-i/import", {"ciphertext": "x", "type": "aes256-gcm96"}),
        ("POST", f"transit/keys/{key}/import_version", {"ciphertext": "x"}),
        ("POST", f"transit/keys/{key}", {"type": "aes256-gcm96", "exportable": True}),
        ("POST", f"transit/keys/{key}-x", {"exportable": True}),
        ("POST", f"transit/keys/{key}-x", {"allow_plaintext_backup": True}),
        ("POST", f"transit/keys/{key}-x", {"derived": True}),
        ("POST", f"transit/keys/{key}/config", {"exportable": True}),
        ("POST", f"transit/keys/{key}/config", {"allow_plaintext_backup": True}),
        ("POST", f"transit/keys/{key}/config", {"auto_rotate_period": "1h"}),
        ("POST", f"transit/datakey/wrapped/{key}", {}),
        ("POST", f"transit/hmac/{key}", {"input": _B64}),
        ("POST", f"transit/sign/{key}", {"input": _B64}),
        ("POST", "transit/cache-config", {"size": 10}),
        ("GET", "transit/keys?list=true", {}),
        ("LIST", "transit/keys", {}),
    ]


ELSEWHERE = [
    ("GET", "sys/mounts", {}),
    ("GET", "sys/policies/acl/keyvault-data", {}),
    ("PUT", "sys/policies/acl/keyvault-data", {"policy": 'path "*" {capabilities=["sudo"]}'}),
    ("PUT", "sys/seal", {}),
    ("GET", "sys/audit", {}),
    ("GET", "sys/raw/core/keyring", {}),
    ("POST", "sys/config/auditing/request-headers/x", {"hmac": False}),
    ("DELETE", "sys/config/auditing/request-headers/X-Byokeep-Lease", {}),
    ("DELETE", "sys/audit/file", {}),
    ("POST", "auth/token/create", {"policies": ["keyvault-admin"]}),
    ("POST", "auth/token/create-orphan", {}),
    ("GET", "auth/token/accessors?list=true", {}),
    ("POST", "auth/approle/role/keyvault-admin/secret-id", {}),
    ("GET", "auth/approle/role/keyvault-admin/role-id", {}),
    ("POST", "transit/decrypt/foreign", {"ciphertext": "vault:v1:AAAA"}),
    ("POST", "transit/datakey/plaintext/foreign", {}),
    ("POST", "transit/rewrap/foreign", {"ciphertext": "vault:v1:AAAA"}),
    ("POST", "transit/keys/foreign/rotate", {}),
    ("DELETE", "transit/keys/foreign", {}),
    ("GET", "transit/keys/foreign", {}),
    ("DELETE", "transit/keys/byokeep-checkpoint", {}),
    ("POST", "transit/keys/byokeep-checkpoint/rotate", {}),
    ("POST", "transit/keys/byokeep-checkpoint/config", {"deletion_allowed": True}),
    ("GET", "secret/data/anything", {}),
    ("GET", "cubbyhole/x", {}),
    ("GET", "byokeep/data/other", {}),
    ("DELETE", "byokeep/data/anchor", {}),
    ("POST", "byokeep/delete/anchor", {"versions": [1]}),
    ("PUT", "byokeep/destroy/anchor", {"versions": [1]}),
    ("DELETE", "byokeep/metadata/anchor", {}),
    ("POST", "byokeep/metadata/anchor", {"cas_required": False}),
    ("POST", "byokeep/config", {"cas_required": False}),
    ("GET", "byokeep/metadata?list=true", {}),
]


@pytest.mark.parametrize("kind", ["tenant-matrix", "intake-matrix", "content-matrix", "system"])
@pytest.mark.parametrize("identity", ["data", "admin"])
def test_policy_matrix_refused_to_both(vault, keys, request, identity, kind):
    """Shown to fail with `capabilities = ["create", "update"]` on encrypt, and without
    `allowed_parameters` on keys."""
    token = request.getfixturevalue(identity)
    got = {
        (method, path, *body): vault.status(path, method, token, **body)
        for method, path, body in refused_to_both(kind) + ELSEWHERE
    }
    assert {call: status for call, status in got.items() if status != 403} == {}


@pytest.mark.parametrize("kind", ["tenant-matrix", "intake-matrix", "content-matrix", "system"])
def test_policy_matrix_data(vault, keys, data, kind):
    """Data keys are made, opened and rewrapped; keys are not touched.

    Shown to fail without `allowed_parameters` and `denied_parameters` on decrypt."""
    key, ciphertext = f"byokeep-{kind}", keys[kind]
    allowed = [
        ("POST", f"transit/datakey/plaintext/{key}", {"bits": 256}),
        ("POST", f"transit/decrypt/{key}", {"ciphertext": ciphertext}),
        ("POST", f"transit/rewrap/{key}", {"ciphertext": ciphertext}),
        ("POST", f"transit/rewrap/{key}", {"batch_input": [{"ciphertext": ciphertext}]}),
    ]
    refused = [
        ("POST", f"transit/decrypt/{key}", {"batch_input": [{"ciphertext": ciphertext}]}),
        ("POST", f"transit/decrypt/{key}", {"ciphertext": ciphertext, "batch_input": []}),
        ("POST", f"transit/keys/{key}-new", {"type": "aes256-gcm96"}),
        ("POST", f"transit/keys/{key}/rotate", {}),
        ("POST", f"transit/keys/{key}/config", {"min_decryption_version": 1}),
        ("POST", f"transit/keys/{key}/config", {"deletion_allowed": True}),
        ("POST", f"transit/keys/{key}/trim", {"min_available_version": 1}),
        ("DELETE", f"transit/keys/{key}", {}),
        ("GET", f"transit/keys/{key}", {}),
    ]
    _check(vault, data, allowed, refused)


@pytest.mark.parametrize("kind", ["tenant-matrix", "intake-matrix", "content-matrix"])
def test_policy_matrix_admin(vault, keys, admin, kind):
    """Keys are created, rotated, trimmed and deleted; none is opened."""
    key, ciphertext = f"byokeep-{kind}", keys[kind]
    new = f"{key}-admin"
    allowed = [
        ("POST", f"transit/keys/{new}", {"type": "aes256-gcm96"}),
        ("GET", f"transit/keys/{new}", {}),
        ("POST", f"transit/keys/{new}/rotate", {}),
        (
            "POST",
            f"transit/keys/{new}/config",
            {"min_decryption_version": 2, "min_encryption_version": 2},
        ),
        ("POST", f"transit/keys/{new}/trim", {"min_available_version": 2}),
        ("POST", f"transit/keys/{new}/config", {"deletion_allowed": True}),
        ("DELETE", f"transit/keys/{new}", {}),
    ]
    refused = [
        ("POST", f"transit/decrypt/{key}", {"ciphertext": ciphertext}),
        ("POST", f"transit/decrypt/{key}", {"batch_input": [{"ciphertext": ciphertext}]}),
        ("POST", f"transit/datakey/plaintext/{key}", {}),
        ("POST", f"transit/rewrap/{key}", {"ciphertext": ciphertext}),
        ("POST", f"transit/keys/{new}", {"type": "rsa-4096"}),
    ]
    _check(vault, admin, allowed, refused)


def test_policy_matrix_admin_and_keyvaults_own_key(vault, keys, admin):
    """The admin role opens keyvault's own keys, which open no provider key; it can't delete
    the key that wraps them."""
    ciphertext = keys["system"]
    allowed = [
        ("POST", "transit/decrypt/byokeep-system", {"ciphertext": ciphertext}),
        ("POST", "transit/datakey/plaintext/byokeep-system", {"bits": 256}),
        ("POST", "transit/keys/byokeep-system/rotate", {}),
        ("GET", "transit/keys/byokeep-system", {}),
    ]
    refused = [
        ("DELETE", "transit/keys/byokeep-system", {}),
        ("POST", "transit/keys/byokeep-system/config", {"deletion_allowed": True}),
        ("POST", "transit/decrypt/byokeep-system", {"batch_input": [{"ciphertext": ciphertext}]}),
    ]
    _check(vault, admin, allowed, refused)


@pytest.mark.parametrize("identity", ["data", "admin"])
def test_policy_matrix_anchor_and_checkpoints(vault, request, identity):
    """The anchor is read and written with check-and-set; checkpoints are signed."""
    token = request.getfixturevalue(identity)
    kept = vault.status("byokeep/data/anchor", token=token)
    assert kept in (200, 404)
    version = 0
    if kept == 200:
        answer = vault.api("GET", "byokeep/data/anchor", token=token)
        version = answer["data"]["metadata"]["version"]
    write = {"data": {"text": "{}"}, "options": {"cas": version}}
    assert vault.status("byokeep/data/anchor", "POST", token, **write) == 200
    assert vault.status("byokeep/data/anchor", "POST", token, **write) == 400
    assert vault.status("byokeep/data/anchor", "POST", token, data={"text": "{}"}) == 400
    assert vault.status("transit/sign/byokeep-checkpoint", "POST", token, input=_B64) == 200
    assert vault.status("transit/keys/byokeep-checkpoint", token=token) == 200


def test_policy_matrix_two_deployments(vault, keys):
    """Each with names of its own at one Vault: neither reaches the other's keys or anchor.

    Shown to fail with the first's policies under the second's names (no `ROLES` in setup.sh)."""
    vault.set_up("approle", PREFIX="eu-", ROLES="keyvault-eu-", KV="byokeep-eu")
    vault.api("POST", "transit/keys/eu-tenant-matrix", type="aes256-gcm96")
    made = vault.api("POST", "transit/datakey/plaintext/eu-tenant-matrix", bits=256)
    theirs = made["data"]["ciphertext"]
    deployments = {
        "keyvault-": ("byokeep-tenant-matrix", keys["tenant-matrix"], "byokeep"),
        "keyvault-eu-": ("eu-tenant-matrix", theirs, "byokeep-eu"),
    }
    for role, (own, _, _) in deployments.items():
        data, admin = vault.token(f"{role}data"), vault.token(f"{role}admin")
        for key, ciphertext, anchor in deployments.values():
            rights = 403 if key != own else 200
            path = f"transit/decrypt/{key}"
            assert vault.status(path, "POST", data, ciphertext=ciphertext) == rights
            assert vault.status(f"transit/keys/{key}", token=admin) == rights
            read = vault.status(f"{anchor}/data/anchor", token=data)
            assert read == 403 if rights == 403 else read in (200, 404)
    login = vault.api("GET", "auth/approle/role/keyvault-eu-data")["data"]
    assert login["token_policies"] == ["keyvault-eu-data"]


def _check(vault, token, allowed, refused) -> None:
    got = [
        (method, path, vault.status(path, method, token, **body)) for method, path, body in allowed
    ]
    assert [one for one in got if one[2] not in (200, 204)] == []
    got = [
        (method, path, vault.status(path, method, token, **body)) for method, path, body in refused
    ]
    assert [one for one in got if one[2] != 403] == []
