"""How an identity logs in to Vault: with a Kubernetes service account, an AppRole, or a
token that somebody else keeps fresh in a file. Files are read again at each login, since a
projected service-account token or a rotated secret id is replaced under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from byokeep.identity import open_to_others

from services.common.config import ConfigError
from services.keyvault.kek.vault.client import Call
from services.keyvault.kek.vault.reply import Reply

#: What each method must be told, and what it may be told with a default.
_METHODS: dict[str, tuple[frozenset[str], dict[str, str]]] = {
    "kubernetes": (
        frozenset({"role"}),
        {"mount": "kubernetes", "jwt": "/var/run/secrets/byokeep-vault/token"},
    ),
    "approle": (frozenset({"role_id", "secret_id"}), {"mount": "approle"}),
    "token_file": (frozenset({"token"}), {}),
}


class CredentialError(Exception):
    """A credential's file can't be read, or others may read it."""


@dataclass(frozen=True, slots=True)
class Login:
    """A parsed login: `method name=value ...`; values are names and paths, never secrets."""

    method: str
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, setting: str, text: str) -> Login:
        """Read a setting such as `kubernetes role=keyvault-data`. Raises ConfigError."""
        method, *pairs = text.split() or [""]
        if method not in _METHODS:
            raise ConfigError(f"{setting} starts with one of {', '.join(_METHODS)}")
        required, defaults = _METHODS[method]
        given = dict(pair.partition("=")[::2] for pair in pairs)
        missing = required - given.keys()
        unknown = given.keys() - required - defaults.keys()
        if missing or unknown or not all(given.values()):
            raise ConfigError(
                f"{setting}: {method} needs {' '.join(f'{name}=…' for name in sorted(required))}"
                + "".join(f", may have {name}=…" for name in defaults)
            )
        return cls(method, {**defaults, **given})

    def send(self, call: Call) -> Reply:
        """Log in; for a token file, look the token up. Raises CredentialError, WireError."""
        values = self.values
        if self.method == "kubernetes":
            # Kubernetes projects it readable for the pod's group; the pod is its wall.
            jwt = _read(values["jwt"], private=False)
            return call.login_kubernetes(values["mount"], values["role"], jwt)
        if self.method == "approle":
            role_id, secret_id = _read(values["role_id"]), _read(values["secret_id"])
            return call.login_approle(values["mount"], role_id, secret_id)
        reply: Reply = call.token.lookup_self()
        return reply

    def token(self) -> str:
        """Return the token of a token file; "" for a method that is given one at login."""
        return _read(self.values["token"]) if self.method == "token_file" else ""


def _read(name: str, *, private: bool = True) -> str:
    text = ""
    try:
        path = Path(name)
        if not private or not open_to_others(path):
            text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        pass
    if not text:
        raise CredentialError
    return text
