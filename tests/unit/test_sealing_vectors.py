"""The published vectors of the seal: ours opens them, and so does one written from the page.

`open_by_the_page` follows docs/sealing.md, RFC 9180 and X-Wing with nothing of
byokeep in it, so that the page is known to be enough for another language.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest
from byokeep import dsse, hpke, sealing
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VECTORS = json.loads((Path(__file__).parents[2] / "docs" / "vectors" / "seal-v1.json").read_text())
FIELDS = (
    "deployment",
    "intake_key_id",
    "tenant",
    "owner",
    "provider",
    "key_id",
    "operation",
    "request_id",
)
each_seal = pytest.mark.parametrize(
    "vector", VECTORS["seals"], ids=lambda v: f"{v['suite']}-{v['operation']}"
)
each_statement = pytest.mark.parametrize("vector", VECTORS["statements"], ids=lambda v: v["suite"])


def info_by_the_page(vector):
    values = ["byokeep/intake/v1", *(vector[name] for name in FIELDS)]
    return b"".join(len(v.encode()).to_bytes(4, "big") + v.encode() for v in values)


def extract(suite_id, salt, label, material):
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + material, "sha256")


def expand(suite_id, secret, label, info, length):
    text = length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info
    return hmac.digest(secret, text + b"\x01", "sha256")[:length]


def x25519_secret(private, encapsulated, public):
    suite_id = b"KEM" + (0x0020).to_bytes(2, "big")
    shared = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(encapsulated)
    )
    extracted = extract(suite_id, b"", b"eae_prk", shared)
    return expand(suite_id, extracted, b"shared_secret", encapsulated + public, 32)


def xwing_secret(private, encapsulated, public):
    seed, scalar = private[:64], private[64:]
    of_mlkem = MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(encapsulated[:1088])
    of_x25519 = X25519PrivateKey.from_private_bytes(scalar).exchange(
        X25519PublicKey.from_public_bytes(encapsulated[1088:])
    )
    label = bytes.fromhex("5c2e2f2f5e5c")
    return hashlib.sha3_256(
        of_mlkem + of_x25519 + encapsulated[1088:] + public[1184:] + label
    ).digest()


def open_by_the_page(vector, info):
    hybrid = vector["suite"] == "HPKE_SUITE_MLKEM768_X25519_V1"
    kem_id, length, decapsulate = (
        (0x647A, 1120, xwing_secret) if hybrid else (0x0020, 32, x25519_secret)
    )
    sealed, private, public = (
        bytes.fromhex(vector[name]) for name in ("sealed", "private_key", "public_key")
    )
    secret = decapsulate(private, sealed[:length], public)
    suite_id = b"HPKE" + kem_id.to_bytes(2, "big") + bytes.fromhex("0001" + "0002")
    context = (
        b"\x00" + extract(suite_id, b"", b"psk_id_hash", b"")
        + extract(suite_id, b"", b"info_hash", info)
    )  # fmt: skip
    scheduled = extract(suite_id, secret, b"secret", b"")
    key = expand(suite_id, scheduled, b"key", context, 32)
    nonce = expand(suite_id, scheduled, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, sealed[length:], b"")


def context_of(vector):
    return sealing.SealContext(*(vector[name] for name in FIELDS[2:]))


def private_of(vector):
    suite = options_pb2.HpkeSuite.Value(vector["suite"])
    return hpke.PrivateKey(suite, bytes.fromhex(vector["private_key"]))


@each_seal
def test_info_is_as_published(vector):
    info = context_of(vector).info(vector["deployment"], vector["intake_key_id"])
    assert info.hex() == vector["info"]
    assert info_by_the_page(vector).hex() == vector["info"]


@each_seal
def test_vector_opens(vector):
    private = private_of(vector)
    assert private.public_bytes.hex() == vector["public_key"]
    opened = private.open(bytes.fromhex(vector["sealed"]), bytes.fromhex(vector["info"]))
    assert opened == vector["plaintext"].encode()


@each_seal
def test_the_page_is_enough_to_open_it(vector):
    assert open_by_the_page(vector, info_by_the_page(vector)) == vector["plaintext"].encode()


@each_seal
@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_info_may_change(vector, name):
    changed = vector | {name: vector[name] + "x"}
    with pytest.raises(hpke.SealError):
        private_of(vector).open(bytes.fromhex(vector["sealed"]), info_by_the_page(changed))


@each_statement
def test_statement_verifies(vector):
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(vector["signing_public_key"]))
    payload = bytes.fromhex(vector["payload"])
    assert (
        dsse.pre_authentication_encoding(vector["payload_type"], payload).hex()
        == (vector["signed_bytes"])
    )
    public.verify(bytes.fromhex(vector["signature"]), bytes.fromhex(vector["signed_bytes"]))
    envelope = options_pb2.SignedEnvelope(
        payload_type=vector["payload_type"],
        payload=payload,
        key_id=vector["key_id"],
        signature=bytes.fromhex(vector["signature"]),
    )
    parsed = custody_pb2.IntakeStatement.FromString(payload)
    stated = sealing.verify_statement(
        envelope,
        deployment="example",
        pinned={vector["key_id"]: public},
        now=parsed.not_before.ToDatetime(sealing.datetime.UTC),
    )
    assert stated.intake_key_id == VECTORS["seals"][0]["intake_key_id"]


def test_the_hybrid_key_is_what_x_wing_expands_its_seed_to():
    hybrid = [vector for vector in VECTORS["seals"] if "MLKEM" in vector["suite"]]
    assert hybrid
    for vector in hybrid:
        expanded = hashlib.shake_256(bytes.fromhex(vector["seed"])).digest(96)
        assert expanded.hex() == vector["private_key"]
