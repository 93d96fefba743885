"""What the settings name: KEK backends, where the anchor is kept, who signs checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from services.common.config import ConfigError
from services.keyvault.anchor import AnchorStore, FileAnchor
from services.keyvault.config import Settings
from services.keyvault.database import Database
from services.keyvault.kek import Backend, Backends
from services.keyvault.kek.keyring import load_keyring
from services.keyvault.kek.local import LocalBackend
from services.keyvault.signer import Signer, WrappedKeySigner
from services.keyvault.system_keys import SigningKey

if TYPE_CHECKING:
    from services.keyvault.kek.vault.backend import VaultBackend


def check_logins(settings: Settings, role: str) -> None:
    """Hold the logins at Vault against the role: it has its own identities, and no other.

    Raises:
        ConfigError.
    """
    if "vault" not in (settings.kek_backend, *settings.read_backends()):
        return
    for identity, login in (
        ("data", settings.vault_data_login),
        ("admin", settings.vault_admin_login),
    ):
        setting = f"BYOKEEP_VAULT_{identity.upper()}_LOGIN"
        if login and role not in (identity, "all"):
            raise ConfigError(
                f"role {role} is not to have {setting}: whoever takes this process over could do"
                " what the other role may"
            )
        if not login and role in (identity, "all"):
            raise ConfigError(
                f"role {role} needs {setting} for backend vault, which BYOKEEP_KEK_BACKEND or"
                " BYOKEEP_KEK_BACKENDS_READ names"
            )


def open_backends(settings: Settings, database: Database) -> Backends:
    """Return the configured backends, not yet started. Raises ConfigError."""
    primary = settings.kek_backend
    others = [name for name in settings.read_backends() if name != primary]
    return Backends(
        _open(primary, settings, database), *(_open(name, settings, database) for name in others)
    )


def open_anchor(settings: Settings, backends: Backends) -> AnchorStore:
    """Return where the configured anchor is kept. Raises ConfigError."""
    if settings.vault_anchor:
        return _vault(backends, "BYOKEEP_VAULT_ANCHOR").anchor(settings.vault_anchor)
    if settings.anchor_file is None:
        raise ConfigError("BYOKEEP_ANCHOR_FILE or BYOKEEP_VAULT_ANCHOR must be set")
    return FileAnchor(settings.anchor_file)


async def open_signer(
    settings: Settings, backends: Backends, wrapped: Callable[[], SigningKey]
) -> Signer:
    """Return who signs for the audit log: a key in Vault, or keyvault's own wrapped one.

    Raises:
        ConfigError, KekUnavailableError.
    """
    if settings.vault_checkpoint_key:
        vault = _vault(backends, "BYOKEEP_VAULT_CHECKPOINT_KEY")
        return await vault.checkpoint_signer(settings.vault_checkpoint_key)
    return WrappedKeySigner(wrapped)


def _vault(backends: Backends, setting: str) -> VaultBackend:
    from services.keyvault.kek.vault.backend import VaultBackend

    for backend in backends:
        if isinstance(backend, VaultBackend):
            return backend
    raise ConfigError(
        f"{setting} is set, and vault is neither BYOKEEP_KEK_BACKEND nor in"
        " BYOKEEP_KEK_BACKENDS_READ"
    )


def _open(name: str, settings: Settings, database: Database) -> Backend:
    if name == LocalBackend.name:
        keyring = load_keyring(settings.keyring_file)
        return LocalBackend(database, keyring, settings.deployment)
    if name == "aws_kms":
        return _kms(settings)
    # Late: whoever has no Vault does not load its client.
    from services.keyvault.kek.vault.backend import VaultBackend

    return VaultBackend(settings)


def _kms(settings: Settings) -> Backend:
    try:
        # Late: boto3 is in an extra of its own.
        from services.keyvault.kek.aws_kms.backend import KmsBackend
    except ImportError:
        KmsBackend = None  # type: ignore[assignment, misc]
    if KmsBackend is None:
        raise ConfigError("backend aws_kms needs boto3: install the extra aws_kms")
    return KmsBackend(settings.deployment, settings.kms_deletion_days)
