"""Grants: our signed word that one child process may have one key, once."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from byokeep import dsse, ids
from byokeep.common.v1.options_pb2 import Provider, SignedEnvelope
from byokeep.identity import Followed
from byokeep.keyvault.v1 import grant_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.config import ConfigError, read_secret_file
from services.orchestrator.policy.states import AttemptKind

GRANT_SECONDS: Final = 60
LOOK_SECONDS: Final = 2.0
#: What a lease is for, by the kind of an attempt.
PURPOSES: Final = {
    AttemptKind.REVIEW: grant_pb2.LEASE_PURPOSE_REVIEW,
    AttemptKind.VALIDATION: grant_pb2.LEASE_PURPOSE_VALIDATION,
    # Whether an ACTIVE version is still taken.
    AttemptKind.CHECK: grant_pb2.LEASE_PURPOSE_VALIDATION,
}
_SETTING: Final = "BYOKEEP_GRANT_SIGNING_KEY"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a grant is about."""

    tenant: str
    owner: str
    actor: str
    provider: Provider.ValueType
    key_id: str
    key_version: int
    review_id: str
    attempt_id: str
    fence: int
    purpose: grant_pb2.LeasePurpose.ValueType


class GrantSigner:
    """Signs grants with this replica's own key, and takes up a new one when its file changes."""

    def __init__(self, key_file: Path, deployment: str, runner_class: str) -> None:
        """Read the key. Raises ConfigError: missing, readable by others, or not Ed25519."""
        self._key = Followed((key_file,), lambda: _load(key_file), "grant_signing_key")
        self._deployment = deployment
        self._runner_class = runner_class

    async def follow(self) -> None:
        """Look at the file again; one that can't be read raises an alarm, and the key before it
        goes on signing. keyvault must trust the new key before: its public part goes into
        BYOKEEP_GRANT_KEYS_DIR first."""
        self._key.refresh()

    def sign(self, subject: Subject, recipient_public_key: bytes) -> SignedEnvelope:
        """Return a signed grant that only the holder of the recipient's key can make use of."""
        now = time.time_ns()
        issued, expires = Timestamp(), Timestamp()
        issued.FromNanoseconds(now)
        expires.FromNanoseconds(now + GRANT_SECONDS * 1_000_000_000)
        grant = grant_pb2.Grant(
            grant_id=ids.new_id("gra"),
            deployment=self._deployment,
            tenant=subject.tenant,
            owner=subject.owner,
            actor=subject.actor,
            provider=subject.provider,
            key_id=subject.key_id,
            key_version=subject.key_version,
            review_id=subject.review_id,
            attempt_id=subject.attempt_id,
            fence=subject.fence,
            purpose=subject.purpose,
            runner_class=self._runner_class,
            recipient_key_sha256=hashlib.sha256(recipient_public_key).digest(),
            issue_time=issued,
            expire_time=expires,
        )
        key_id, key = self._key.value
        return dsse.sign(dsse.GRANT, grant.SerializeToString(), key_id, key)


def _load(file: Path) -> tuple[str, Ed25519PrivateKey]:
    pem = read_secret_file(_SETTING, file).encode()
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{_SETTING}: {file}: must be PEM of an Ed25519 private key (PKCS 8)")
    return ids.public_key_id("gsk", key.public_key().public_bytes_raw()), key
