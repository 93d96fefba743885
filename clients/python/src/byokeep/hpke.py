"""HPKE key pairs and seals for the suites of `byokeep.common.v1.HpkeSuite`.

Source: RFC 9180 (X25519); the hybrid ML-KEM-768 + X25519 KEM is a draft, hence
the version in the suite's name. Public keys travel raw: 32 bytes of X25519, or
1184 bytes of ML-KEM-768 followed by 32 of X25519.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from byokeep import Error
from byokeep.common.v1 import options_pb2

X25519_V1 = options_pb2.HPKE_SUITE_X25519_V1
HYBRID_V1 = options_pb2.HPKE_SUITE_MLKEM768_X25519_V1

_MLKEM_SEED = 64
_MLKEM_PUBLIC = 1184
_SUITES = {
    X25519_V1: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    HYBRID_V1: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}


class SealError(Error):
    """The seal does not open, or the suite or a key is malformed. Says no more."""


class PrivateKey:
    """An HPKE private key: opens seals, and shows nothing of itself."""

    def __init__(self, suite: options_pb2.HpkeSuite.ValueType, raw: bytes) -> None:
        """Load a raw private key: 32 bytes of X25519, or a 64-byte ML-KEM seed before them."""
        self.suite = suite
        self._suite = _suite(suite)
        self._raw = raw
        x25519 = X25519PrivateKey.from_private_bytes(raw[-32:])
        self._key: X25519PrivateKey | MLKEM768X25519PrivateKey = x25519
        self.public_bytes = x25519.public_key().public_bytes_raw()
        if suite == HYBRID_V1:
            mlkem = MLKEM768PrivateKey.from_seed_bytes(raw[:_MLKEM_SEED])
            self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
            self.public_bytes = mlkem.public_key().public_bytes_raw() + self.public_bytes

    @classmethod
    def generate(cls, suite: options_pb2.HpkeSuite.ValueType) -> PrivateKey:
        """Make a fresh key of a suite."""
        raw = X25519PrivateKey.generate().private_bytes_raw()
        if suite == HYBRID_V1:
            raw = MLKEM768PrivateKey.generate().private_bytes_raw() + raw
        return cls(suite, raw)

    def reveal(self) -> bytes:
        """Return the raw private key, to be wrapped for storage."""
        return self._raw

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open a seal made for `info`. Raises SealError, without a cause."""
        plaintext = _attempt(lambda: self._suite.decrypt(sealed, self._key, info))
        if plaintext is None:
            raise SealError("the seal does not open")
        return plaintext

    def __repr__(self) -> str:
        """Show nothing of the key."""
        return "<PrivateKey>"

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise TypeError("a private key is not pickled")


def seal(
    suite: options_pb2.HpkeSuite.ValueType,
    public_key: bytes,
    plaintext: bytes | bytearray,
    info: bytes,
) -> bytes:
    """Seal bytes to a raw public key, bound to `info`. Raises SealError for a malformed key."""
    chosen = _suite(suite)
    sealed = _attempt(lambda: chosen.encrypt(plaintext, _public(suite, public_key), info))
    if sealed is None:
        raise SealError("the public key is malformed")
    return sealed


def _suite(suite: options_pb2.HpkeSuite.ValueType) -> Suite:
    if suite not in _SUITES:
        raise SealError("the suite is not supported")
    return _SUITES[suite]


def _public(
    suite: options_pb2.HpkeSuite.ValueType, raw: bytes
) -> X25519PublicKey | MLKEM768X25519PublicKey:
    if suite == X25519_V1:
        return X25519PublicKey.from_public_bytes(raw)
    if len(raw) != _MLKEM_PUBLIC + 32:
        raise ValueError("length")
    return MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC]),
        X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC:]),
    )


def _attempt(operation: Callable[[], bytes]) -> bytes | None:
    # The exception ends here: raised further, its frames would hold plaintext.
    try:
        return operation()
    except (InvalidTag, ValueError, UnsupportedAlgorithm):
        return None
