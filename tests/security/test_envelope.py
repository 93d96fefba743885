"""The envelope, attacked offline; `test_fuzz.py` has the rest of 6."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.keyvault import envelope
from services.keyvault.envelope import Context, EnvelopeError, decrypt, encrypt

CONTEXT = Context("test", "acme", "", "openai", "key_1", 1)
KEY = b"sk-proj-0123456789abcdef"
GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "envelope-v1.json").read_text())


def test_one_dek_per_version():
    """3. 100,000 envelopes: no repeated data key, commitment or nonce.

    Shown to fail: with a nonce of os.urandom(1) padded to 12 bytes.
    """
    seen, nonces = set(), set()
    for _ in range(100_000):
        data_key = bytearray(os.urandom(32))
        sealed = encrypt(data_key, b"k" * 16, CONTEXT)
        seen.add(sealed[4:36])
        nonces.add(sealed[36:48])
    assert len(seen) == len(nonces) == 100_000


@pytest.mark.parametrize("field", [one.name for one in dataclasses.fields(Context)])
def test_every_part_of_the_context_is_bound(field):
    """Shown to fail: leave the field out of Context.associated_data."""
    data_key = bytearray(os.urandom(32))
    sealed = encrypt(data_key, KEY, CONTEXT)
    value = getattr(CONTEXT, field)
    other = dataclasses.replace(CONTEXT, **{field: value + (1 if field == "version" else "x")})
    with pytest.raises(EnvelopeError):
        decrypt(data_key, sealed, other)
    assert decrypt(data_key, sealed, CONTEXT) == KEY


def test_fields_can_not_slide_into_each_other():
    data_key = bytearray(os.urandom(32))
    sealed = encrypt(data_key, KEY, dataclasses.replace(CONTEXT, tenant="ab", owner="c"))
    with pytest.raises(EnvelopeError):
        decrypt(data_key, sealed, dataclasses.replace(CONTEXT, tenant="a", owner="bc"))


@pytest.mark.parametrize("damage", [-1, 48])
def test_what_does_not_open_leaves_nothing(damage, monkeypatch):
    """AES-GCM decrypts before it looks at the tag: what it refuses, it leaves in the buffer.

    Shown to fail: without the wipe before EnvelopeError in envelope.decrypt.
    """
    buffers = []

    class Watched:
        def __init__(self, key):
            self._cipher = AESGCM(key)

        def decrypt_into(self, nonce, data, associated_data, buffer):
            buffers.append(buffer)
            return self._cipher.decrypt_into(nonce, data, associated_data, buffer)

    data_key = bytearray(os.urandom(32))
    damaged = bytearray(encrypt(data_key, KEY, CONTEXT))
    damaged[damage] ^= 1
    monkeypatch.setattr(envelope, "AESGCM", Watched)
    with pytest.raises(EnvelopeError):
        decrypt(data_key, bytes(damaged), CONTEXT)
    assert buffers == [bytearray(len(KEY))]


def test_salamander():
    """4. A ciphertext that is valid under two GCM keys opens under neither data key but its own.

    The attack is carried out for real: the last block is solved for, so that plain
    AES-GCM accepts one ciphertext and tag under both keys.
    Shown to fail: without the comparison of commitments in envelope.decrypt.
    """
    first, second = bytearray(os.urandom(32)), bytearray(os.urandom(32))
    (one, commitment), (two, _) = _material(first), _material(second)
    nonce = os.urandom(12)
    sealed = _collide(one, two, nonce, CONTEXT.associated_data())
    for key in (one, two):
        AESGCM(key).decrypt(nonce, sealed, CONTEXT.associated_data())
    forged = envelope.MAGIC + commitment + nonce + sealed
    assert decrypt(first, forged, CONTEXT)
    with pytest.raises(EnvelopeError):
        decrypt(second, forged, CONTEXT)


@pytest.mark.parametrize("vector", GOLDEN["envelopes"], ids=lambda one: one["name"])
def test_vectors_golden_envelopes(vector):
    """5. Envelopes made by version 1 open for ever; made once, never again."""
    opened = decrypt(
        bytearray.fromhex(vector["data_key"]),
        bytes.fromhex(vector["envelope"]),
        Context(*vector["context"]),
    )
    assert opened.hex() == vector["plaintext"]


_DATA_KEY = bytearray(range(32))
_SEALED = encrypt(_DATA_KEY, KEY, CONTEXT)


@pytest.mark.parametrize("bit", range(len(_SEALED) * 8))
def test_fuzz_envelope_every_bit(bit):
    """6. Every single flipped bit is refused, with one error type."""
    flipped = bytearray(_SEALED)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(EnvelopeError):
        decrypt(_DATA_KEY, bytes(flipped), CONTEXT)


@pytest.mark.parametrize("length", range(len(_SEALED)))
def test_fuzz_envelope_every_truncation(length):
    """6. No prefix opens."""
    with pytest.raises(EnvelopeError):
        decrypt(_DATA_KEY, _SEALED[:length], CONTEXT)


def _material(data_key: bytearray) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    material = HKDF(SHA256(), 64, salt=None, info=b"byokeep/envelope/v1").derive(data_key)
    return material[:32], material[32:]


# GCM's field, NIST SP 800-38D: x^128 + x^7 + x^2 + x + 1, bits reflected.
def _multiply(x: int, y: int) -> int:
    product = 0
    for i in range(127, -1, -1):
        if x >> i & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def _power(x: int, n: int) -> int:
    result = 1 << 127
    for bit in bin(n)[2:]:
        result = _multiply(result, result)
        if bit == "1":
            result = _multiply(result, x)
    return result


def _block(key: bytes, block: bytes) -> int:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 GCM's own part
    return int.from_bytes(encryptor.update(block), "big")


def _collide(one: bytes, two: bytes, nonce: bytes, data: bytes) -> bytes:
    """Return two blocks, the last solved for, and a tag, which AES-GCM accepts under both keys."""
    padded = data + bytes(-len(data) % 16)
    blocks = [padded[i : i + 16] for i in range(0, len(padded), 16)] + [os.urandom(16)]
    lengths = (len(data) * 8).to_bytes(8, "big") + (32 * 8).to_bytes(8, "big")
    total, square_sum = 0, 0
    for key in (one, two):
        h = _block(key, bytes(16))
        # tag = Σ block_i · H^(n+2-i) ⊕ last · H² ⊕ lengths · H ⊕ E(J0)
        power = len(blocks) + 2
        for index, block in enumerate(blocks):
            total ^= _multiply(int.from_bytes(block, "big"), _power(h, power - index))
        total ^= _multiply(int.from_bytes(lengths, "big"), h)
        total ^= _block(key, nonce + (1).to_bytes(4, "big"))
        square_sum ^= _power(h, 2)
    last = _multiply(total, _power(square_sum, 2**128 - 2))
    body = blocks[-1] + last.to_bytes(16, "big")
    h = _block(one, bytes(16))
    state = 0
    for block in [*blocks, body[16:], lengths]:
        state = _multiply(state ^ int.from_bytes(block, "big"), h)
    tag = state ^ _block(one, nonce + (1).to_bytes(4, "big"))
    return body + tag.to_bytes(16, "big")
