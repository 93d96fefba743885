"""Client files: trust bundle and profiles.

`trust.json` pins what the client believes; `config.toml` says where the services
are and as whom to call them. Both are described in docs/decisions/0001-module-map.md.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shlex
import stat
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from byokeep import Error
from byokeep.identity import open_to_others

_MOST_BYTES = 1_048_576
# The package's source in a checkout.
_PACKAGE = Path("clients", "python", "src", "byokeep")
_PORT = re.compile(r":([0-9]{1,20})$")
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PROXY = re.compile(r"http://([^/@\s]+@)?[A-Za-z0-9.\[\]:-]+:[0-9]{1,5}/?")
_ENDPOINTS = ("orchestrator", "keyvault")
_KEYS = {
    *_ENDPOINTS,
    *(f"{name}_name" for name in _ENDPOINTS),
    "trust",
    "certificate",
    "key",
    "tenant",
    "proxy",
}


class ProfileError(Error):
    """A client file is missing or wrong. `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep the hint beside the sentence."""
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service: `host:port`, and the DNS name that its certificate must have."""

    address: str
    server_name: str


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What a client believes: the CA certificates (PEM), and signing keys by id."""

    deployment: str
    ca: bytes
    intake_signing_keys: Mapping[str, Ed25519PublicKey]
    audit_log_keys: Mapping[str, Ed25519PublicKey]


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the services are, as whom to call them, and for which tenant.

    `keyvault` is None where the profile has no audit and admin edge; `tenant` is
    empty where none is set; `source` is the config file that it was read from; `proxy` is an
    HTTP proxy to go through, the only one that is used: none of the environment is.
    """

    name: str
    orchestrator: Endpoint
    keyvault: Endpoint | None
    certificate: Path
    key: Path
    trust: TrustBundle
    tenant: str = ""
    source: Path | None = None
    proxy: str = ""

    def read_identity(self) -> tuple[bytes, bytes]:
        """Return certificate chain and private key, PEM.

        Raises:
            ProfileError: a file can't be read, or others than its owner can read the key.
        """
        certificate = _read(self.certificate, "certificate")
        key = _read(self.key, "private key")
        # Also keeps out a key that came with a repository: git checks out 0644.
        if open_to_others(self.key):
            raise ProfileError(
                f"the private key {self.key} can be read by others than its owner",
                f"chmod 600 {shlex.quote(str(self.key))}",
            )
        return certificate, key


def find_config(
    environ: Mapping[str, str] | None = None,
    *,
    prefix: Path | None = None,
    package: Path | None = None,
) -> Path | None:
    """Return the config file: `BYOKEEP_CONFIG`, else that of the byokeep checkout which this
    code runs from, else `~/.config/byokeep/config.toml`; else None.

    The checkout's is `.byokeep/config.toml` beside the virtual environment `prefix` (default:
    the running one), where `package` (default: this one) is the checkout's own source. The
    working directory is never searched: a config file chooses where keys are sent and whom
    they are sealed to, and a cloned repository could bring one.

    """
    environ = os.environ if environ is None else environ
    if named := environ.get("BYOKEEP_CONFIG"):
        return Path(named)
    checkout = Path(sys.prefix if prefix is None else prefix).parent.resolve()
    source = (package or Path(__file__).parent).resolve()
    own = checkout / ".byokeep" / "config.toml"
    # A virtual environment inside somebody else's repository has no say, whatever lies beside
    # it; one that runs this checkout's source already trusts the checkout.
    if source == checkout / _PACKAGE and own.is_file():
        return own
    home = Path(environ.get("HOME") or Path.home()) / ".config" / "byokeep" / "config.toml"
    return home if home.is_file() else None


def load_profile(name: str | None = None, config: Path | None = None) -> Profile:
    """Read a profile; without a name, the file's default one, else its only one.

    Raises:
        ProfileError: there is no config file, no such profile, it is wrong, or others could have
            written it.
    """
    path = config or find_config()
    if path is None:
        raise ProfileError(
            "there is no configuration: no --config, no BYOKEEP_CONFIG,"
            " no ~/.config/byokeep/config.toml",
            "`make up` in a byokeep checkout starts a local stack, and writes one that the"
            " checkout's .venv/bin/byokeep finds",
        )
    return _profile(path, name, _profiles(path))


def load_trust(path: Path) -> TrustBundle:
    """Read a trust bundle.

    Raises:
        ProfileError: others could have written it (who does chooses whom keys are sealed to), or
            it is wrong; the field is named.
    """
    text = _read(path, "trust bundle")
    _check_owned(path)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise ProfileError(f"{path} is not a trust bundle: it is nested too deep") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path} is not a trust bundle: a JSON object is expected")
    deployment, ca = data.get("deployment"), data.get("ca")
    if not isinstance(deployment, str) or not deployment:
        raise ProfileError(f"{path}: `deployment` must be the name of the deployment")
    if not isinstance(ca, list) or not ca or not all(_is_certificate(entry) for entry in ca):
        raise ProfileError(f"{path}: `ca` must be a list of PEM certificates")
    return TrustBundle(
        deployment=deployment,
        ca="".join(entry.rstrip("\n") + "\n" for entry in ca).encode(),
        intake_signing_keys=_public_keys(path, data, "intake_signing_keys"),
        audit_log_keys=_public_keys(path, data, "audit_log_keys"),
    )


def _check_owned(path: Path) -> None:
    """Refuse a file that others than its owner and root can write, or put another in its place."""
    if os.name != "posix":
        return
    for each in {path.parent: None, path.resolve().parent: None, path: None}:
        status = each.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise ProfileError(
                f"{each} belongs to another user, who could have changed it",
                f"look at it, then make it yours: chown {os.geteuid()} {shlex.quote(str(each))}",
            )
        # In a sticky folder nobody replaces a file of others; on a read-only mount nobody at all.
        kept = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not kept and not os.statvfs(each).f_flag & os.ST_RDONLY:
            raise ProfileError(
                f"{each} is writable by others, who could have changed it",
                f"look at it, then: chmod go-w {shlex.quote(str(each))}",
            )


def _profiles(path: Path) -> dict[str, Any]:
    text = _read(path, "configuration")
    _check_owned(path)
    try:
        # Editors on Windows begin a file with a byte-order mark, which TOML does not know.
        data = tomllib.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ProfileError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ProfileError(f"{path} is no configuration: it is nested too deep") from None
    if not isinstance(data.get("profiles"), dict) or not data["profiles"]:
        raise ProfileError(f"{path} has no [profiles.NAME]")
    if not isinstance(data.get("default_profile", ""), str):
        raise ProfileError(f"{path}: default_profile must be the name of a profile")
    return data


def _profile(path: Path, name: str | None, data: Mapping[str, Any]) -> Profile:
    profiles = data["profiles"]
    chosen = name or data.get("default_profile") or (min(profiles) if len(profiles) == 1 else None)
    known = ", ".join(sorted(profiles))
    if chosen is None:
        raise ProfileError(
            f"{path} has several profiles and no default_profile", f"--profile with one of: {known}"
        )
    if not isinstance(profiles.get(chosen), dict):
        raise ProfileError(f"{path} has no such profile", f"it has: {known}")
    table = profiles[chosen]
    if unknown := sorted(table.keys() - _KEYS):
        raise ProfileError(f"{path}, profile {chosen}: unknown setting {unknown[0]}")
    return Profile(
        name=chosen,
        orchestrator=_endpoint(path, table, "orchestrator"),
        keyvault=_endpoint(path, table, "keyvault") if "keyvault" in table else None,
        certificate=path.parent / _text(path, table, "certificate"),
        key=path.parent / _text(path, table, "key"),
        trust=load_trust(path.parent / _text(path, table, "trust")),
        tenant=_optional(path, table, "tenant", _TENANT, "lower-case letters, digits, hyphens"),
        source=path,
        proxy=_optional(path, table, "proxy", _PROXY, "http://HOST:PORT"),
    )


def _optional(
    path: Path, table: Mapping[str, Any], name: str, form: re.Pattern[str], form_name: str
) -> str:
    if name not in table:
        return ""
    value = _text(path, table, name)
    if not form.fullmatch(value):
        raise ProfileError(f"{path}: `{name}` must be {form_name}")
    return value


def _endpoint(path: Path, table: Mapping[str, Any], name: str) -> Endpoint:
    address = _text(path, table, name)
    port = _PORT.search(address)
    if address.startswith(("http://", "https://")) or (port and int(port[1]) > 65535):
        raise ProfileError(f"{path}: `{name}` must be HOST:PORT")
    return Endpoint(address, _text(path, table, f"{name}_name"))


def _text(path: Path, table: Mapping[str, Any], name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise ProfileError(f"{path}: the profile has no `{name}`")
    return value


def _public_keys(path: Path, data: Mapping[str, Any], field: str) -> dict[str, Ed25519PublicKey]:
    entries = data.get(field)
    if not isinstance(entries, dict):
        raise ProfileError(f"{path}: `{field}` must be an object of ids and base64 keys")
    try:
        return {
            key_id: Ed25519PublicKey.from_public_bytes(base64.b64decode(value, validate=True))
            for key_id, value in entries.items()
        }
    except (binascii.Error, TypeError, ValueError):
        raise ProfileError(
            f"{path}: `{field}` holds something else than base64 of 32 bytes"
        ) from None


def _is_certificate(entry: object) -> bool:
    try:
        return isinstance(entry, str) and bool(x509.load_pem_x509_certificates(entry.encode()))
    except ValueError:
        return False


def _read(path: Path, what: str) -> bytes:
    try:
        # A device has no end, and a pipe may never begin.
        if path.exists() and not path.is_file():
            raise ProfileError(f"the {what} {path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"the {what} {path} can't be read: {error.strerror}") from None
    except ValueError:
        raise ProfileError(f"the path of the {what} is none: it has a NUL") from None
    if len(data) > _MOST_BYTES:
        raise ProfileError(f"the {what} {path} is longer than {_MOST_BYTES:,} bytes")
    return data
