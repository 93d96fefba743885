"""`python -m deploy.dev.pki`: every certificate, key and password of a development deployment.

It writes Secrets and ConfigMaps of the cluster that its pod runs in, or (--folder) files for
Compose. Run again it renews what is past half its life; --renew renews every leaf. The CA's key
lies beside the rest, in byokeep-pki: for development, and no other use.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from byokeep.ids import public_key_id
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.dev.cluster import Cluster
from deploy.dev.folders import Folders
from deploy.local.material import PROVIDER_HOSTS, ROLES, SERVER_NAMES, TRUST_DOMAIN
from deploy.local.pki import CertificateAuthority, Identity

OWN, CLIENT = "byokeep-pki", "byokeep-client"
_KEYVAULT, _ORCHESTRATOR, _RUNNER = "byokeep-keyvault", "byokeep-orchestrator", "byokeep-runner"
_OPENBAO, _EMULATOR, _POSTGRES = "byokeep-openbao", "byokeep-emulator", "byokeep-postgres"
_POSTGRES_NAMES = ("postgres.byokeep-postgres.svc.cluster.local", "postgres")
_OPENBAO_NAMES = ("openbao.byokeep-openbao.svc.cluster.local", "openbao", "localhost")


class Store(Protocol):
    """Keeps named sets of files: secret ones, and others; each for one namespace."""

    def secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """Return a secret set's files; none where there is no such set."""

    def write_secret(self, namespace: str, name: str, files: Mapping[str, bytes]) -> None:
        """Create a secret set, or give it these files."""

    def write_config(self, namespace: str, name: str, files: Mapping[str, str]) -> None:
        """Create another set, or give it these files."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate: where its Secret is, and the names in it."""

    namespace: str
    secret: str
    spiffe_id: str | None
    dns: tuple[str, ...] = ()


LEAVES = (
    Leaf(_KEYVAULT, "keyvault-data-tls", "keyvault", (SERVER_NAMES["keyvault"],)),
    Leaf(_KEYVAULT, "keyvault-admin-tls", "keyvault", (SERVER_NAMES["keyvault"],)),
    Leaf(_ORCHESTRATOR, "orchestrator-tls", "orchestrator", (SERVER_NAMES["orchestrator"],)),
    Leaf(_RUNNER, "runner-tls", "runner/default", (SERVER_NAMES["runner"],)),
    Leaf(_OPENBAO, "openbao-tls", None, _OPENBAO_NAMES),
    *(Leaf(CLIENT, f"client-{role}", f"client/{role}") for role in ROLES),
)
_EMULATOR_LEAF = Leaf(_EMULATOR, "emulator-tls", None, PROVIDER_HOSTS)


def main() -> None:
    """Make what is missing, renew what is old."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", help="issue every leaf anew")
    parser.add_argument("--folder", type=Path, help="write files here, for Compose")
    arguments = parser.parse_args()
    if arguments.folder is None:
        make(Cluster(), _POSTGRES_NAMES[0], renew=arguments.renew)
    else:
        make(Folders(arguments.folder), _POSTGRES_NAMES[1], renew=arguments.renew)


def make(store: Store, database: str, *, renew: bool) -> None:
    """Make all of it; `database` is PostgreSQL's host."""
    with tempfile.TemporaryDirectory() as folder:
        authority = _authority(store, Path(folder), "authority", "byokeep development CA")
        provider = _authority(store, Path(folder), "provider-authority", "byokeep emulator CA")
        for leaf in LEAVES:
            _leaf(store, authority, leaf, renew=renew)
        _leaf(store, provider, _EMULATOR_LEAF, renew=renew)
    for namespace in (_KEYVAULT, _ORCHESTRATOR, _RUNNER, _OPENBAO, CLIENT):
        store.write_config(namespace, "byokeep-ca", {"ca.pem": authority.pem})
    store.write_config(_KEYVAULT, "vault-ca", {"ca.pem": authority.pem})
    store.write_config(_RUNNER, "provider-ca", {"ca.pem": provider.pem})
    _databases(store, database)
    _grant_key(store)
    _once(store, _OPENBAO, "openbao-unseal", lambda: {"key": secrets.token_bytes(32)})


def _authority(store: Store, folder: Path, name: str, common_name: str) -> CertificateAuthority:
    prefix = folder / name
    _unpack(prefix, store.secret(OWN, name))
    authority = CertificateAuthority.ensure(prefix, TRUST_DOMAIN, common_name)
    store.write_secret(OWN, name, _packed(Identity.at(prefix)))
    return authority


def _leaf(store: Store, authority: CertificateAuthority, leaf: Leaf, *, renew: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / leaf.secret
        known = {} if renew else store.secret(leaf.namespace, leaf.secret)
        _unpack(prefix, known)
        files = _packed(authority.ensure_leaf(prefix, spiffe_id=leaf.spiffe_id, dns=leaf.dns))
        if files != known:
            store.write_secret(leaf.namespace, leaf.secret, files)


def _unpack(prefix: Path, files: Mapping[str, bytes]) -> None:
    identity = Identity.at(prefix)
    for key, path in (("tls.crt", identity.certificate), ("tls.key", identity.key)):
        if key in files:
            path.write_bytes(files[key])


def _packed(identity: Identity) -> dict[str, bytes]:
    return {"tls.crt": identity.certificate.read_bytes(), "tls.key": identity.key.read_bytes()}


def _databases(store: Store, database: str) -> None:
    """A password for each zone's role; the zone has it in its URL, PostgreSQL as a file."""
    known = store.secret(_POSTGRES, "passwords")
    passwords = {
        zone: known.get(zone, secrets.token_urlsafe(24).encode())
        for zone in ("keyvault", "orchestrator")
    }
    for zone, password in passwords.items():
        url = f"postgresql://byokeep_{zone}:{password.decode()}@{database}:5432/{zone}"
        store.write_secret(f"byokeep-{zone}", f"{zone}-database", {"url": url.encode()})
    store.write_secret(_POSTGRES, "passwords", passwords)


def _grant_key(store: Store) -> None:
    """The key that signs grants; keyvault has its public half."""
    known = store.secret(_ORCHESTRATOR, "grant-signing")
    if known:
        key = serialization.load_pem_private_key(known["key.pem"], None)
    else:
        key = Ed25519PrivateKey.generate()
    assert isinstance(key, Ed25519PrivateKey)  # noqa: S101 we made it
    public = key.public_key()
    name = public_key_id("gsk", public.public_bytes_raw())
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    store.write_config(_KEYVAULT, "grant-keys", {f"{name}.pem": pem.decode()})
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    store.write_secret(_ORCHESTRATOR, "grant-signing", {"key.pem": private})


def _once(store: Store, namespace: str, name: str, make: Callable[[], dict[str, bytes]]) -> None:
    if not store.secret(namespace, name):
        store.write_secret(namespace, name, make())


if __name__ == "__main__":
    main()
