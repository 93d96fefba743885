"""An identity's PEM files: read, checked to fit together, and followed while they change.

Certificates live for hours and are replaced on disk. Whoever presents one looks at the files
again and again; a set that is broken is an alarm in the log, and the last good one stays.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from byokeep import Error

log = logging.getLogger(__name__)
T = TypeVar("T")

_ALARM_SECONDS: Final = 60.0
# What tells one state of a file from another: also a chmod, and a link that was turned.
_Stamp = tuple[tuple[int, ...], ...]


class IdentityError(Error):
    """The files are no usable identity; the text says which one and why, and shows nothing."""


@dataclass(frozen=True, slots=True)
class Pem:
    """What a TLS identity is made of, all of it PEM."""

    certificate: bytes
    key: bytes
    ca: bytes

    def __repr__(self) -> str:
        """Show nothing of the key."""
        return "<Pem>"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one identity: certificate chain, private key, CA certificates."""

    certificate: Path
    key: Path
    ca: Path

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The three files."""
        return self.certificate, self.key, self.ca

    def load(self) -> Pem:
        """Read the files, and check that they fit together.

        Raises:
            IdentityError: unreadable, not PEM, a key that others can read, or that belongs to
                another certificate.
        """
        found = [_read(path) for path in self.paths]
        if open_to_others(self.key):
            raise IdentityError(f"{self.key}: readable by others than its owner; chmod 600 it")
        return checked(Pem(*found))


def open_to_others(path: Path) -> bool:
    """Say whether others than this process's user may touch a file. Raises OSError.

    The group may read it where another uid owns it and the group is one of ours: so Kubernetes
    mounts a Secret for a pod that is not root's (owner root, group `fsGroup`, mode 0440).
    """
    if os.name != "posix":
        return False
    status = path.stat()
    others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    groups = {os.getegid(), *os.getgroups()}
    if status.st_uid != os.geteuid() and status.st_gid in groups:
        others &= ~stat.S_IRGRP
    return others != 0


def checked(pem: Pem) -> Pem:
    """Return it; refuse what is not PEM, and a key of another certificate.

    Raises:
        IdentityError: says which of the two.
    """
    fits = None
    try:
        leaf = x509.load_pem_x509_certificates(pem.certificate)[0]
        private = serialization.load_pem_private_key(pem.key, None)
        x509.load_pem_x509_certificates(pem.ca)
        fits = leaf.public_key() == private.public_key()
    except (ValueError, TypeError):
        pass  # their frames hold the key
    if fits is None:
        raise IdentityError("a TLS file is not PEM of the expected kind")
    if not fits:
        raise IdentityError("the TLS key does not belong to the TLS certificate")
    return pem


class Followed(Generic[T]):
    """What some files hold: loaded again when they change, the last good one otherwise."""

    def __init__(
        self, paths: Sequence[Path], load: Callable[[], T], what: str = "certificate"
    ) -> None:
        """Load once; `what` the log's events are about. Raises whatever `load` raises."""
        self._paths = tuple(paths)
        self._load = load
        self._reloaded, self._reload_failed = f"{what}_reloaded", f"{what}_reload_failed"
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._failed: _Stamp | None = None
        self._alarm_time = 0.0
        self.value = load()

    def refresh(self) -> bool:
        """Look at the files, and load them if they changed; True for a new value.

        Files that don't load are an alarm, repeated every minute while they stay so.
        """
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            if stamp == self._failed and time.monotonic() < self._alarm_time + _ALARM_SECONDS:
                return False
            failed: Exception | None = None
            try:
                self.value = self._load()
            except Exception as error:
                failed = error
            if failed is None:
                self._seen = stamp
                log.info(self._reloaded)
                return True
            self._failed = stamp
            self._alarm_time = time.monotonic()
            log.error(self._reload_failed, exc_info=failed)
            return False

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from None
