"""Grants: verified before they are parsed, and refused with one uniform message."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

import grpc
from byokeep import dsse
from byokeep.common.v1 import options_pb2
from byokeep.ids import public_key_id
from byokeep.keyvault.v1 import grant_pb2
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from services.common import logs
from services.common.config import ConfigError
from services.common.errors import ByokeepError

log = logging.getLogger(__name__)
MAX_LIFE_SECONDS = 60
#: How far an orchestrator's clock may be from this process's.
SKEW_SECONDS = 5
_NANOS = 10**9
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LONGEST = 256
# What PostgreSQL's bigint and integer hold.
_LARGEST = 2**63 - 1
_LARGEST_VERSION = 2**31 - 1


class GrantRefusedError(Exception):
    """Why a grant is refused: for the audit log; the caller is told nothing of it."""


def refused() -> ByokeepError:
    """Return the one answer to every grant that is refused."""
    return ByokeepError(grpc.StatusCode.PERMISSION_DENIED, "GRANT_REFUSED", "the grant was refused")


def _load_key(path: Path) -> tuple[str, Ed25519PublicKey]:
    key = None
    with contextlib.suppress(ValueError, UnsupportedAlgorithm, PermissionError):
        key = serialization.load_pem_public_key(path.read_bytes())
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            f"BYOKEEP_GRANT_KEYS_DIR: {path}: not an Ed25519 public key, or not readable"
        )
    return public_key_id("gsk", key.public_bytes_raw()), key


class GrantKeys:
    """The public keys of a folder, followed while files come and go: a replica's new key is
    trusted once its file is there, and the old one until its file is taken away."""

    def __init__(self, folder: Path) -> None:
        """Load the folder. Raises ConfigError."""
        self._folder = folder
        #: The keys by id: always the same dict, so that whoever holds it sees changes.
        self.trusted = dict(map(_load_key, sorted(folder.glob("*.pem"))))
        if not self.trusted:
            raise ConfigError(
                f"BYOKEEP_GRANT_KEYS_DIR: no *.pem in {folder}, or no such folder; no lease could"
                " be given"
            )

    async def follow(self) -> None:
        """Take up changes. A file that can't be loaded raises an alarm, and what it held before is
        not trusted any more; the others count, and a key whose file is gone never does."""
        found: dict[str, Ed25519PublicKey] = {}
        for path in sorted(self._folder.glob("*.pem")):
            try:
                key_id, key = _load_key(path)
            except (ConfigError, OSError):
                logs.event(log, "grant_keys_broken", level=logging.CRITICAL, file=path.name)
            else:
                found[key_id] = key
        if found.keys() != self.trusted.keys():
            self.trusted.clear()
            self.trusted.update(found)
            logs.event(log, "grant_keys_changed", keys=" ".join(sorted(found)))


def verify(
    envelope: options_pb2.SignedEnvelope,
    trusted: Mapping[str, Ed25519PublicKey],
    deployment: str,
) -> grant_pb2.Grant:
    """Return the grant that a trusted key signed for this deployment.

    Raises:
        GrantRefusedError: signature, type, form, deployment, or a life longer than 60 s.
    """
    try:
        grant = grant_pb2.Grant.FromString(dsse.verify(envelope, dsse.GRANT, trusted))
    except (dsse.SignatureError, DecodeError) as error:
        raise GrantRefusedError(type(error).__name__) from None
    life = _nanos(grant.expire_time) - _nanos(grant.issue_time)
    if grant.deployment != deployment:
        raise GrantRefusedError("deployment")
    if not 0 < life <= MAX_LIFE_SECONDS * _NANOS:
        raise GrantRefusedError("life")
    if not _well_formed(grant):
        raise GrantRefusedError("form")
    if grant.purpose not in (
        grant_pb2.LEASE_PURPOSE_VALIDATION,
        grant_pb2.LEASE_PURPOSE_REVIEW,
    ):
        raise GrantRefusedError("purpose")
    return grant


def _well_formed(grant: grant_pb2.Grant) -> bool:
    # Whatever a signer writes is stored with the lease and in the audit log.
    texts = (grant.owner, grant.actor, grant.key_id, grant.review_id)
    needed = (grant.grant_id, grant.attempt_id, grant.tenant)
    return (
        all(needed)
        and all(len(text) <= _LONGEST and text.isprintable() for text in needed + texts)
        and grant.fence <= _LARGEST
        and grant.key_version <= _LARGEST_VERSION
    )


def check_time(grant: grant_pb2.Grant, now: datetime.datetime) -> None:
    """Refuse a grant that is not valid now. Raises GrantRefusedError."""
    since = now - _EPOCH
    nanos = (since.days * 86_400 + since.seconds) * _NANOS + since.microseconds * 1_000
    skew = SKEW_SECONDS * _NANOS
    if not _nanos(grant.issue_time) - skew <= nanos <= _nanos(grant.expire_time) + skew:
        raise GrantRefusedError("time")


def check_holder(grant: grant_pb2.Grant, spiffe_id: str, recipient_public_key: bytes) -> None:
    """Refuse a caller outside the runner class, or another key. Raises GrantRefusedError."""
    if spiffe_id.rpartition("/")[2] != grant.runner_class:
        raise GrantRefusedError("runner class")
    digest = hashlib.sha256(recipient_public_key).digest()
    if not hmac.compare_digest(digest, grant.recipient_key_sha256):
        raise GrantRefusedError("recipient key")


def _nanos(stamp: Timestamp) -> int:
    # Compared as numbers: a datetime would cost more than all other checks but the signature.
    return stamp.seconds * _NANOS + stamp.nanos
