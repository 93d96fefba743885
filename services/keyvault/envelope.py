"""Envelope v1: how one version of a provider key is stored, and keyvault's own private keys.

    "BYK1" ‖ commitment (32) ‖ nonce (12) ‖ AES-256-GCM ciphertext and tag

The data key (DEK) is 256 random bits of its own for every version.
`enc_key ‖ commitment = HKDF-SHA256(DEK, info = label, 64 bytes)`: GCM alone lets a
ciphertext be valid under two keys, the commitment does not. The associated data
is the length-prefixed context of the row, so that a row moved to another tenant,
owner, provider, key or version does not open.

Source: NIST SP 800-38D (GCM), RFC 5869 (HKDF), Albertini et al., "How to Abuse
and Fix Authenticated Encryption Without Key Commitment" (USENIX Security 2022).
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

from byokeep.encoding import fields
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common.secret import wipe

MAGIC = b"BYK1"
_FAMILY = MAGIC[:3]
_LABEL = b"byokeep/envelope/v1"
_COMMITMENT, _NONCE, _TAG = 32, 12, 16
_HEADER = len(MAGIC) + _COMMITMENT + _NONCE
_LARGEST = _HEADER + 512 + _TAG  # of a provider key; a private key is shorter


class EnvelopeError(Exception):
    """The envelope does not open: damaged, moved, or not an envelope. Says no more."""


class UnknownEnvelopeError(EnvelopeError):
    """An envelope of another version: written by a newer keyvault, or an older one."""


@dataclass(frozen=True, slots=True)
class Context:
    """What an envelope is bound to."""

    deployment: str
    tenant: str
    owner: str
    provider: str
    key_id: str
    version: int

    def associated_data(self) -> bytes:
        """Return the length-prefixed context."""
        return fields(
            MAGIC,
            self.deployment,
            self.tenant,
            self.owner,
            self.provider,
            self.key_id,
            self.version,
        )


def encrypt(data_key: bytearray, plaintext: bytes | bytearray, context: Context) -> bytes:
    """Return the envelope of a secret under a fresh data key of 32 bytes."""
    cipher, commitment = _derive(data_key)
    nonce = os.urandom(_NONCE)
    sealed = cipher.encrypt(nonce, plaintext, context.associated_data())
    return MAGIC + commitment + nonce + sealed


def check_header(envelope: bytes) -> None:
    """Refuse what can't be an envelope, before any key is asked for. Raises EnvelopeError;
    UnknownEnvelopeError where it is one of another version."""
    if envelope.startswith(_FAMILY) and not envelope.startswith(MAGIC):
        raise UnknownEnvelopeError("not an envelope of version 1")
    if not envelope.startswith(MAGIC) or not _HEADER + _TAG < len(envelope) <= _LARGEST:
        raise EnvelopeError("not an envelope of version 1")


def decrypt(data_key: bytearray, envelope: bytes, context: Context) -> bytearray:
    """Return the secret in a buffer that the caller wipes. Raises EnvelopeError."""
    check_header(envelope)
    cipher, commitment = _derive(data_key)
    if not hmac.compare_digest(envelope[len(MAGIC) : len(MAGIC) + _COMMITMENT], commitment):
        raise EnvelopeError("the envelope does not open")
    buffer = bytearray(len(envelope) - _HEADER - _TAG)
    try:
        cipher.decrypt_into(
            envelope[_HEADER - _NONCE : _HEADER],
            envelope[_HEADER:],
            context.associated_data(),
            buffer,
        )
    except InvalidTag:
        # It holds what was decrypted before the tag was looked at: one flipped bit of a row
        # leaves all but one of the key's.
        wipe(buffer)
    else:
        return buffer
    raise EnvelopeError("the envelope does not open")


def _derive(data_key: bytearray) -> tuple[AESGCM, bytes]:
    material = bytearray(64)
    HKDF(SHA256(), 64, salt=None, info=_LABEL).derive_into(data_key, material)
    with memoryview(material) as view:
        cipher = AESGCM(view[:32])
    commitment = bytes(material[32:])
    wipe(material)
    return cipher, commitment
