"""Settings from the environment, checked whole before anything starts.

A dataclass declares them; a missing or wrong one is named, with what is allowed,
and its value is not repeated: it may be a secret in the wrong place.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import socket
import stat
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from byokeep.identity import TlsFiles, open_to_others

T = TypeVar("T")
# What gRPC and PostgreSQL take as a number of seconds, rows or bytes.
_MOST = 2**31 - 1


class ConfigError(Exception):
    """The service can't start as it is configured; the text says what to change."""


def setting(
    help_text: str,
    *,
    default: Any = dataclasses.MISSING,
    least: int = 1,
    most: int = _MOST,
    form: tuple[str, str] = ("", ""),
) -> Any:
    """Declare a setting of a settings dataclass; without a default it is required.

    A number is `least` to `most`; a text matches `form`, a pattern and what it says to a person.
    """
    allowed = {"help": help_text, "least": least, "most": most, "form": form}
    return dataclasses.field(default=default, metadata=allowed)


#: Forms of texts.
_HOST = r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._*-]+)"
_PORT = r"([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_PORTS = "; a port is 0 to 65535"
LISTEN = (rf"unix:.+|{_HOST}:{_PORT}", f"host:port, or unix:path{_PORTS}")
TARGET = (
    rf"unix:.+|((dns|ipv4|ipv6):(//[^/]*/)?)?{_HOST}:{_PORT}",
    f"host:port, or unix:path, or a gRPC target such as dns:///host:port{_PORTS}",
)
PORT = (rf"{_HOST}:{_PORT}", f"host:port{_PORTS}")
URL = (rf"https?://{_HOST}(:{_PORT})?", f"https://host:port{_PORTS}")
NAME = (r"[A-Za-z0-9._-]{1,100}", "letters, digits and . _ -, 100 at most")
DOMAIN = (r"[a-z0-9._-]{1,255}", "lower-case letters, digits and . _ -")
DNS = (r"[A-Za-z0-9*_-]+(\.[A-Za-z0-9_-]+)*", "a DNS name")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """What every service is told."""

    deployment: str = setting("name of this deployment, as in clients' trust bundles", form=NAME)
    trust_domain: str = setting("SPIFFE trust domain of every caller", form=DOMAIN)
    listen: str = setting("host:port of the mTLS gRPC server", form=LISTEN)
    health_listen: str = setting("host:port of the plaintext gRPC health server", form=LISTEN)
    metrics_listen: str = setting(
        "host:port of the plaintext Prometheus metrics; none: they are not served",
        default="",
        form=PORT,
    )
    otlp_endpoint: str = setting(
        "http://host:port or https://host:port of an OTLP collector (gRPC) for traces; none: no"
        " traces",
        default="",
    )
    otlp_ca: Path | None = setting(
        "PEM file: CA of the collector's certificate; else the system's", default=None
    )
    tls_cert: Path = setting("PEM file: this service's certificate chain")
    tls_key: Path = setting("PEM file: its private key")
    tls_ca: Path = setting("PEM file: CA certificates of every caller and callee")
    callers: str = setting("caller classes: class=spiffe-pattern pairs separated by blanks")
    mode: Literal["production", "development"] = setting(
        "production, or development (one machine, throwaway keys)", default="production"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "debug, info, warning or error", default="info"
    )
    connection_age_seconds: int = setting(
        "a caller's connection is closed to new calls after so many seconds",
        default=10 * 60,
        most=_MOST // 1000,
    )
    connection_grace_seconds: int = setting(
        "and is cut, with the calls that still run, after so many seconds more",
        default=65 * 60,
        most=_MOST // 1000,
    )
    ready_file: Path | None = setting("file to write once the service serves", default=None)

    @property
    def call_drain_seconds(self) -> float:
        """SIGTERM waits this long for calls that run."""
        return 10.0

    @property
    def tls(self) -> TlsFiles:
        """The files of this service's identity."""
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)


# What would write or show what a process keeps to itself, and what that is.
_LEAKS = {
    "GRPC_TRACE": "gRPC would print payloads",
    "SSLKEYLOGFILE": "the session keys of TLS connections would be written there",
    "LD_PRELOAD": "foreign code would be loaded into this process",
    "LD_AUDIT": "foreign code would be loaded into this process",
    "PYTHONINSPECT": "an interactive prompt would open on this process's memory",
    "PYTHONASYNCIODEBUG": "asyncio would report the arguments of slow calls",
    "PYTHONDEVMODE": "asyncio would report the arguments of slow calls",
}


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse to start where a library would print or write secrets, or under a tracer.

    Raises:
        ConfigError: names what to unset.
    """
    for name, what in _LEAKS.items():
        if environ.get(name):
            raise ConfigError(f"{name} is set: {what}; unset it")
    if environ.get("GRPC_VERBOSITY", "").upper() == "DEBUG":
        raise ConfigError("GRPC_VERBOSITY is DEBUG: gRPC would print payloads; unset it")
    if sys.flags.dev_mode or sys.flags.inspect:
        raise ConfigError("python runs with -X dev or -i; start it without")
    if sys.gettrace() is not None or sys.getprofile() is not None or _traced():
        raise ConfigError("a debugger or tracer is attached; start without it")


def _traced(status: Path = Path("/proc/self/status")) -> bool:
    """Whether another process traces this one: proc(5), TracerPid."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False  # not Linux
    return any(line.split()[1:] not in ([], ["0"]) for line in lines if line[:10] == "TracerPid:")


def load(cls: type[T], environ: Mapping[str, str]) -> T:
    """Build settings from `BYOKEEP_<NAME>` variables.

    Raises:
        ConfigError: names every setting that is missing or wrong, and what is allowed.
    """
    check_environment(environ)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = f"BYOKEEP_{field.name.upper()}"
        raw = environ.get(name, "")
        if not raw:
            if field.default is dataclasses.MISSING:
                problems.append(f"{name} is not set: {field.metadata['help']}")
            continue
        try:
            values[field.name] = _allowed(_convert(hints[field.name], raw), field.metadata)
        except ValueError as error:
            problems.append(f"{name}, in the environment, {error}: {field.metadata['help']}")
    if problems:
        raise ConfigError("\n".join(problems))
    return cls(**values)


def _allowed(value: Any, allowed: Mapping[str, Any]) -> Any:
    pattern, form = allowed["form"]
    if isinstance(value, str) and pattern and not re.fullmatch(pattern, value):
        raise ValueError(f"must be {form}")
    if type(value) is int and not allowed["least"] <= value <= allowed["most"]:
        raise ValueError(f"must be {allowed['least']} to {allowed['most']}")
    return value


def _convert(kind: Any, raw: str) -> Any:
    if typing.get_origin(kind) is types.UnionType:
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if raw not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return raw
    converters: dict[Any, Callable[[str], Any]] = {
        str: str,
        Path: _path,
        int: _whole_number,
        bool: _yes_or_no,
    }
    return converters[kind](raw)


def _path(raw: str) -> Path:
    """A file or a folder, which may be missing: whoever reads it says so. From a device or a pipe
    one could read for ever."""
    path, mode = Path(raw), 0
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("is too long for a path") from None
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("must be a file or a folder")
    return path


def _whole_number(raw: str) -> int:
    if not raw.isascii() or not raw.isdigit():
        raise ValueError("must be a whole number")
    return int(raw)


def _yes_or_no(raw: str) -> bool:
    if raw not in ("yes", "no"):
        raise ValueError("must be yes or no")
    return raw == "yes"


def read_secret_file(name: str, path: Path) -> str:
    """Return the text of the secret file that a setting names, without its final line break.

    Raises:
        ConfigError: missing, no text, or readable by others than its owner.
    """
    text, why = "", ""
    try:
        check_private(name, path)
        text = path.read_text()
    except OSError as error:
        why = error.strerror or "not readable"
    except ValueError:
        why = "not text"  # its frames hold it
    if why:
        raise ConfigError(f"{name}: {path}: {why}")
    return text.rstrip("\n")


def check_private(name: str, path: Path) -> None:
    """Refuse a file that others than its owner may touch. Raises ConfigError, OSError."""
    if open_to_others(path):
        raise ConfigError(f"{name}: {path}: readable by others than its owner; chmod 600 it")


def check_folder(name: str, file: Path) -> None:
    """Refuse a file that this process could not write. Raises ConfigError."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {file.parent} is no folder that this process may write to")


def check_listen(name: str, address: str) -> None:
    """Refuse an address that can't be bound now. Raises ConfigError."""
    if address.startswith("unix:"):
        check_folder(name, Path(address.removeprefix("unix:").removeprefix("//")))
        return
    host, _, port = address.rpartition(":")
    failed: OSError | None = None
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC binds: what another replica has, or what is left of one, is no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if hasattr(socket, "SO_REUSEPORT"):
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(where)
    except OSError as error:
        failed = error
    if failed is not None:
        raise ConfigError(f"{name}: can't listen at {address}: {failed.strerror}")
