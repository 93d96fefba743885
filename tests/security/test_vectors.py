"""5. `vectors`: Wycheproof's AES-GCM, HKDF and X25519 through the code that keeps keys.

Every valid one passes, every invalid one is refused. The golden envelopes are in
`test_envelope.py`, the seal's vectors in `tests/unit/test_sealing_vectors.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from byokeep import hpke
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.keyvault import envelope
from services.keyvault.envelope import MAGIC, EnvelopeError

_FOLDER = Path(__file__).parents[1] / "vectors" / "wycheproof"
# `cryptography` takes nonces of 8 to 128 bytes; an envelope's has 12.
_NONCE_BITS = range(64, 1025)


def _vectors(name: str) -> list:
    groups = json.loads((_FOLDER / f"{name}_test.json").read_text())["testGroups"]
    return [
        pytest.param(
            SimpleNamespace(
                **{
                    key: bytes.fromhex(value) if key not in _TEXT else value
                    for key, value in {**group, **test}.items()
                }
            ),
            id=str(test["tcId"]),
        )
        for group in groups
        for test in group.pop("tests")
    ]


_TEXT = ("comment", "flags", "result", "tcId", "size", "type", "source", "curve")
_TEXT += ("ivSize", "keySize", "tagSize")
AES_GCM, HKDFS, X25519 = _vectors("aes_gcm"), _vectors("hkdf_sha256"), _vectors("x25519")


def test_vectors_are_all_here():
    assert [len(one) for one in (AES_GCM, HKDFS, X25519)] == [105, 86, 518]


@pytest.mark.parametrize("vector", AES_GCM)
def test_vectors_aes_gcm(vector):
    """With the calls that `envelope` and `kek.local` make.

    Shown to fail: with the associated data left out. (`decrypt_into` leaves a plaintext that it
    refuses in the buffer: `test_envelope.py::test_what_does_not_open_leaves_nothing`.)
    """
    buffer = bytearray(len(vector.msg))
    refused = ""
    try:
        AESGCM(vector.key).decrypt_into(vector.iv, vector.ct + vector.tag, vector.aad, buffer)
    except (InvalidTag, ValueError) as error:
        refused = type(error).__name__
    if vector.ivSize not in _NONCE_BITS:
        assert refused == "ValueError"  # also where the standard would allow it
    elif vector.result == "valid":
        assert (refused, buffer) == ("", vector.msg)
        assert AESGCM(vector.key).encrypt(vector.iv, vector.msg, vector.aad) == (
            vector.ct + vector.tag
        )
    else:
        assert refused == "InvalidTag"


@pytest.mark.parametrize(
    "vector",
    [one for one in AES_GCM if one.values[0].ivSize == 96 and 0 < len(one.values[0].msg) <= 512],
)
def test_vectors_aes_gcm_in_an_envelope(vector, monkeypatch):
    """The same through `envelope.decrypt`, with the vector's key where the derived one stands.

    Shown to fail: with `InvalidTag` ignored in `envelope.decrypt`.
    """
    derived = lambda data_key: (AESGCM(vector.key), bytes(32))  # noqa: E731
    monkeypatch.setattr(envelope, "_derive", derived)
    context = SimpleNamespace(associated_data=lambda: vector.aad)
    sealed = MAGIC + bytes(32) + vector.iv + vector.ct + vector.tag
    if vector.result == "valid":
        assert envelope.decrypt(bytearray(32), sealed, context) == vector.msg
    else:
        with pytest.raises(EnvelopeError):
            envelope.decrypt(bytearray(32), sealed, context)


@pytest.mark.parametrize("vector", HKDFS)
def test_vectors_hkdf(vector):
    if vector.result == "invalid":
        with pytest.raises(ValueError, match="larger than"):
            HKDF(SHA256(), vector.size, vector.salt, vector.info)
        return
    derived = bytearray(vector.size)
    HKDF(SHA256(), vector.size, vector.salt, vector.info).derive_into(vector.ikm, derived)
    assert derived == vector.okm


@pytest.mark.parametrize("vector", X25519)
def test_vectors_x25519(vector):
    """The exchange of RFC 7748, which HPKE uses; a public key of low order is refused, and
    nothing is sealed to one.

    Shown to fail: nothing of ours stands between; a defective library would.
    """
    private = X25519PrivateKey.from_private_bytes(vector.private)
    public = X25519PublicKey.from_public_bytes(vector.public)
    if "ZeroSharedSecret" in vector.flags:
        with pytest.raises(ValueError, match="shared key"):
            private.exchange(public)
        with pytest.raises(hpke.SealError):
            hpke.seal(hpke.X25519_V1, vector.public, b"key", b"info")
        with pytest.raises(hpke.SealError):
            hpke.PrivateKey(hpke.X25519_V1, vector.private).open(vector.public + bytes(19), b"info")
    else:
        assert private.exchange(public) == vector.shared
        assert hpke.seal(hpke.X25519_V1, vector.public, b"key", b"info")
