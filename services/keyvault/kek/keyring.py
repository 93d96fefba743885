"""The keyring of backend `local`: root keys that the operator keeps outside the database.

Its source is a 0600 file, a mounted secret, a systemd credential or an environment secret.
Its form is JSON: `{"keys": {"1": base64 of 32 bytes}, "primary": "1"}`.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.config import ConfigError, read_secret_file

_CREDENTIAL = "byokeep-keyring"


@dataclass(frozen=True, slots=True)
class Keyring:
    """Root keys by id; `primary` wraps what is new."""

    keys: Mapping[str, AESGCM]
    primary: str

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read a keyring. Raises ConfigError, which shows nothing of it."""
        keyring = None
        try:
            data = json.loads(text)
            raw = {key_id: base64.b64decode(key) for key_id, key in data["keys"].items()}
            if data["primary"] in raw and all(len(key) == 32 for key in raw.values()):
                keyring = cls({k: AESGCM(key) for k, key in raw.items()}, data["primary"])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if keyring is None:
            raise ConfigError(
                "BYOKEEP_KEYRING_FILE or BYOKEEP_KEYRING: the keyring is not of the form"
                ' {"keys": {"1": base64 of 32 bytes}, "primary": "1"}'
            )
        return keyring

    def __repr__(self) -> str:
        """Show ids only."""
        return f"<Keyring {sorted(self.keys)}>"


def new_keyring() -> str:
    """Return the text of a keyring with one fresh root key."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    return json.dumps({"keys": {"1": key}, "primary": "1"})


def load_keyring(file: Path | None, environ: Mapping[str, str] = os.environ) -> Keyring:
    """Load the keyring from its one configured source. Raises ConfigError."""
    value = environ.get("BYOKEEP_KEYRING", "")
    if file is not None and value:
        raise ConfigError("BYOKEEP_KEYRING_FILE and BYOKEEP_KEYRING are both set; keep one")
    if value:
        return Keyring.parse(value)
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if file is None and folder:
        file = Path(folder) / _CREDENTIAL
    if file is None:
        raise ConfigError(
            "no keyring: set BYOKEEP_KEYRING_FILE (a 0600 file) or BYOKEEP_KEYRING (a host's"
            f" secret), or pass the systemd credential {_CREDENTIAL}"
        )
    return Keyring.parse(read_secret_file("BYOKEEP_KEYRING_FILE", file))
