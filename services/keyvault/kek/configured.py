"""The KEK backends that the settings name."""

from __future__ import annotations

from services.common.config import ConfigError
from services.keyvault.config import Settings
from services.keyvault.database import Database
from services.keyvault.kek import Backend, Backends
from services.keyvault.kek.local import LocalBackend, load_keyring


def open_backends(settings: Settings, database: Database) -> Backends:
    """Return the configured backends, not yet started. Raises ConfigError."""
    primary = settings.kek_backend
    others = [name for name in settings.read_backends() if name != primary]
    return Backends(
        _open(primary, settings, database), *(_open(name, settings, database) for name in others)
    )


def _open(name: str, settings: Settings, database: Database) -> Backend:
    if name == LocalBackend.name:
        keyring = load_keyring(settings.keyring_file)
        return LocalBackend(database, keyring, settings.deployment)
    if name == "vault":
        # Late: whoever has no Vault does not load its client.
        from services.keyvault.kek.vault.backend import VaultBackend

        return VaultBackend(settings)
    raise ConfigError(f"there is no KEK backend {name}")
