"""Keys, certificates and client files of a stack: made once, kept, re-made when stale."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byokeep.ids import public_key_id
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from .pki import CertificateAuthority, Identity, write_file
from .state import State

TRUST_DOMAIN = "byokeep.local"
DEPLOYMENT = "local"
TENANT = "demo"
SERVER_NAMES: Mapping[str, str] = {
    "keyvault": "keyvault.byokeep.internal",
    "orchestrator": "orchestrator.byokeep.internal",
    "runner": "runner.byokeep.internal",
}
SPIFFE_PATHS: Mapping[str, str] = {
    "keyvault": "keyvault",
    "orchestrator": "orchestrator",
    "runner": "runner/default",
}
ROLES = ("developer", "submitter", "key-admin", "auditor", "operator")
PROVIDER_HOSTS = (
    "api.openai.com",
    "api.anthropic.com",
    "generativelanguage.googleapis.com",
)
# Audit and administration have an edge of their own; the others don't know where it is.
_KEYVAULT_ROLES = ("developer", "auditor", "operator")
# The profile that a person uses by default, under a name that says where it leads.
_PROFILE_NAMES = {"developer": "demo"}


def make_authorities(state: State) -> tuple[CertificateAuthority, CertificateAuthority]:
    """Return the stack's CA, and the CA that plays the public ones for the emulator."""
    return (
        CertificateAuthority.ensure(state.pki / "ca", TRUST_DOMAIN),
        CertificateAuthority.ensure(
            state.pki / "provider-ca", TRUST_DOMAIN, "byokeep provider emulator CA"
        ),
    )


def make_certificates(
    state: State, authority: CertificateAuthority, provider: CertificateAuthority
) -> None:
    """Issue what is missing or stale: services, one client per role, the emulator."""
    for service, path in SPIFFE_PATHS.items():
        authority.ensure_leaf(state.pki / service, spiffe_id=path, dns=[SERVER_NAMES[service]])
    for role in ROLES:
        authority.ensure_leaf(state.client / role, spiffe_id=f"client/{role}")
    provider.ensure_leaf(state.pki / "emulator", dns=PROVIDER_HOSTS)


def tls(state: State, service: str) -> Identity:
    """Files of a service's identity."""
    return Identity.at(state.pki / service)


def make_keyring(state: State) -> Path:
    """Return the keyring of keyvault's backend `local`, made if missing."""
    path = state.secrets / "keyring.json"
    if not path.exists():
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        content = json.dumps({"keys": {"1": key}, "primary": "1"})
        write_file(path, content.encode(), mode=0o600)
    return path


def make_grant_key(state: State) -> Path:
    """Return the orchestrator's grant signing key, made if missing; its public half goes
    to keyvault's folder under its id."""
    path = state.secrets / "grant-signing.pem"
    if not path.exists():
        _write_grant_key(state, path)
    return path


def _write_grant_key(state: State, path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes_raw()
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_file(state.grant_keys / f"{public_key_id('gsk', raw)}.pem", public, mode=0o644)
    write_file(path, private, mode=0o600)


def write_database_url(state: State, zone: str, url: str) -> Path:
    """Write the URL of a zone's database where the zone reads it."""
    path = database_url_file(state, zone)
    write_file(path, url.encode(), mode=0o600)
    return path


def database_url_file(state: State, zone: str) -> Path:
    """The 0600 file with the URL of a zone's database."""
    return state.secrets / f"{zone}-database-url"


def write_trust(state: State, bundle: Any) -> None:
    """Write trust.json: what keyvault's `migrate` printed."""
    write_file(state.trust, (json.dumps(bundle, indent=2) + "\n").encode(), mode=0o644)


def write_profiles(path: Path, state: State, orchestrator: str, keyvault: str) -> None:
    """Write a config.toml with a profile per role; its paths are absolute."""
    lines = ["# Written by deploy/local at each start.", 'default_profile = "demo"']
    for role in ROLES:
        lines += [
            "",
            f"[profiles.{_PROFILE_NAMES.get(role, role)}]",
            f'orchestrator = "{orchestrator}"',
            f'orchestrator_name = "{SERVER_NAMES["orchestrator"]}"',
            f"trust = {json.dumps(str(state.trust))}",
            f"certificate = {json.dumps(str(state.client / f'{role}.pem'))}",
            f"key = {json.dumps(str(state.client / f'{role}.key'))}",
            f'tenant = "{TENANT}"',
        ]
        if role in _KEYVAULT_ROLES:
            lines += [
                f'keyvault = "{keyvault}"',
                f'keyvault_name = "{SERVER_NAMES["keyvault"]}"',
            ]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
