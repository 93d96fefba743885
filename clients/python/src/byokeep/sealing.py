"""Sealing a provider key, so that only keyvault can open it.

The statement that names the public key is believed only if a pinned intake
signing key signed it, for this deployment and for now. The seal is bound to
everything that the key is for: replayed under another tenant, owner, provider,
key, operation, request or deployment, it does not open.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from byokeep import Error, dsse, hpke
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.keyshape import check_key
from byokeep.keyvault.v1 import custody_pb2

LABEL = "byokeep/intake/v1"
MAX_WINDOW = datetime.timedelta(hours=1)
SUITE = hpke.HYBRID_V1

_SKEW = datetime.timedelta(minutes=2)


class UntrustedIntakeKeyError(Error):
    """The intake statement is not one that this client may seal to."""


class ClockError(UntrustedIntakeKeyError):
    """The statement is a pinned key's, and its hour is not this machine's: a clock is off, or an
    old statement was passed on."""


@dataclass(frozen=True, slots=True)
class SealContext:
    """Everything that a seal is bound to."""

    tenant: str
    owner: str
    provider: str
    key_id: str
    operation: str
    request_id: str

    def info(self, deployment: str, intake_key_id: str) -> bytes:
        """Return HPKE's `info`; docs/sealing.md has it for other languages."""
        return fields(
            LABEL,
            deployment,
            intake_key_id,
            self.tenant,
            self.owner,
            self.provider,
            self.key_id,
            self.operation,
            self.request_id,
        )


def verify_statement(
    statement: options_pb2.SignedEnvelope,
    *,
    deployment: str,
    pinned: Mapping[str, Ed25519PublicKey],
    now: datetime.datetime,
) -> custody_pb2.IntakeStatement:
    """Return the statement that a pinned key signed for this deployment and time.

    Raises:
        UntrustedIntakeKeyError: unpinned key, other deployment, or too long a window.
        ClockError: its window is not now.
    """
    try:
        payload = dsse.verify(statement, dsse.INTAKE_KEY, pinned)
    except dsse.SignatureError as error:
        raise UntrustedIntakeKeyError(f"intake statement refused: {error}") from None
    parsed = custody_pb2.IntakeStatement.FromString(payload)
    start = parsed.not_before.ToDatetime(datetime.UTC)
    end = parsed.not_after.ToDatetime(datetime.UTC)
    if parsed.deployment != deployment:
        raise UntrustedIntakeKeyError("intake statement refused: it is for another deployment")
    if not datetime.timedelta() < end - start <= MAX_WINDOW:
        raise UntrustedIntakeKeyError("intake statement refused: its window is no hour")
    if not start - _SKEW <= now <= end:
        raise ClockError(
            f"the intake key's hour is {start:%Y-%m-%d %H:%M} to {end:%H:%M} UTC,"
            f" and this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
        )
    return parsed


def seal_key(
    key: str, context: SealContext, statement: custody_pb2.IntakeStatement
) -> custody_pb2.SealedKey:
    """Seal a provider key for one operation on one key. Raises KeyFormatError."""
    check_key(context.provider, key)
    return custody_pb2.SealedKey(
        intake_key_id=statement.intake_key_id,
        suite=statement.suite,
        ciphertext=hpke.seal(
            statement.suite,
            statement.public_key,
            key.encode("ascii"),
            context.info(statement.deployment, statement.intake_key_id),
        ),
    )
