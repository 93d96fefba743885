"""DSSE: signed statements whose type is signed with them.

Source: github.com/secure-systems-lab/dsse, protocol.md. The payload is given
out only after its signature and type are verified.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from byokeep.common.v1.options_pb2 import SignedEnvelope

INTAKE_KEY = "application/vnd.byokeep.intake-key.v1+protobuf"
GRANT = "application/vnd.byokeep.grant.v1+protobuf"
CHAIN_HEAD = "application/vnd.byokeep.chain-head.v1+protobuf"


class SignatureError(Exception):
    """The envelope is not a valid statement of the expected type by a trusted key."""


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's PAE(type, body)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(
    payload_type: str, payload: bytes, key_id: str, private_key: Ed25519PrivateKey
) -> SignedEnvelope:
    """Sign serialized bytes as a statement of a type."""
    return SignedEnvelope(
        payload_type=payload_type,
        payload=payload,
        key_id=key_id,
        signature=private_key.sign(pre_authentication_encoding(payload_type, payload)),
    )


def verify(
    envelope: SignedEnvelope, payload_type: str, trusted: Mapping[str, Ed25519PublicKey]
) -> bytes:
    """Return the payload of a statement that a trusted key signed.

    Raises:
        SignatureError: wrong type, unknown key, or a signature that does not verify.
    """
    if envelope.payload_type != payload_type:
        raise SignatureError("payload type is not the expected one")
    key = trusted.get(envelope.key_id)
    if key is None:
        raise SignatureError("signing key is not trusted")
    try:
        key.verify(envelope.signature, pre_authentication_encoding(payload_type, envelope.payload))
    except InvalidSignature:
        raise SignatureError("signature does not verify") from None
    return envelope.payload
