"""Write docs/vectors/seal-v1.json: `python -m tests.vectors.make_seal_vectors`.

Keys, contexts and signatures are the same in every run; the seals are not, for each
has a fresh ephemeral key. Run it only where the format changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from byokeep import dsse, hpke, ids, sealing
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import custody_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TARGET = Path(__file__).parents[2] / "docs" / "vectors" / "seal-v1.json"
DEPLOYMENT = "example"
INTAKE_KEY_ID = "ink_01hzzzzzzzzzzzzzzzzzzzzzzz"
KEY = "example-provider-key-0001"
CONTEXTS = [
    sealing.SealContext(
        tenant="acme",
        owner="",
        provider="openai",
        key_id="key_01hzzzzzzzzzzzzzzzzzzzzzzz",
        operation="add",
        request_id="0123456789abcdef0123456789abcdef",
    ),
    sealing.SealContext(
        tenant="acme",
        owner="ann@acme.example",
        provider="anthropic",
        key_id="key_01hyyyyyyyyyyyyyyyyyyyyyyy",
        operation="rotate",
        request_id="rotate-2026-03-01",
    ),
]


def fixed(label: str, length: int) -> bytes:
    """Return bytes that are the same in every run."""
    return hashlib.shake_256(f"byokeep seal vectors: {label}".encode()).digest(length)


SEED = fixed("X-Wing seed", 32)


def private_key(suite: int) -> hpke.PrivateKey:
    """Return the recipient's key of a suite; the hybrid's is expanded from a seed, as X-Wing is."""
    if suite == hpke.X25519_V1:
        return hpke.PrivateKey(suite, fixed(f"suite {suite}", 32))
    return hpke.PrivateKey(suite, hashlib.shake_256(SEED).digest(96))


def seal(suite: int, context: sealing.SealContext) -> dict[str, object]:
    private = private_key(suite)
    info = context.info(DEPLOYMENT, INTAKE_KEY_ID)
    return {
        "suite": options_pb2.HpkeSuite.Name(suite),
        "private_key": private.reveal().hex(),
        **({"seed": SEED.hex()} if suite == hpke.HYBRID_V1 else {}),
        "public_key": private.public_bytes.hex(),
        "deployment": DEPLOYMENT,
        "intake_key_id": INTAKE_KEY_ID,
        "tenant": context.tenant,
        "owner": context.owner,
        "provider": context.provider,
        "key_id": context.key_id,
        "operation": context.operation,
        "request_id": context.request_id,
        "info": info.hex(),
        "plaintext": KEY,
        "sealed": hpke.seal(suite, private.public_bytes, KEY.encode(), info).hex(),
    }


def statement(suite: int) -> dict[str, object]:
    signing = Ed25519PrivateKey.from_private_bytes(fixed("intake signing key", 32))
    public = signing.public_key().public_bytes_raw()
    body = custody_pb2.IntakeStatement(
        deployment=DEPLOYMENT,
        suite=suite,
        intake_key_id=INTAKE_KEY_ID,
        public_key=private_key(suite).public_bytes,
    )
    body.not_before.FromJsonString("2026-03-01T12:00:00Z")
    body.not_after.FromJsonString("2026-03-01T13:00:00Z")
    payload = body.SerializeToString(deterministic=True)
    signed = dsse.sign(dsse.INTAKE_KEY, payload, ids.public_key_id("isk", public), signing)
    return {
        "suite": options_pb2.HpkeSuite.Name(suite),
        "signing_public_key": public.hex(),
        "key_id": signed.key_id,
        "payload_type": signed.payload_type,
        "payload": payload.hex(),
        "signed_bytes": dsse.pre_authentication_encoding(dsse.INTAKE_KEY, payload).hex(),
        "signature": signed.signature.hex(),
        "not_before": "2026-03-01T12:00:00Z",
        "not_after": "2026-03-01T13:00:00Z",
    }


def main() -> None:
    suites = (hpke.X25519_V1, hpke.HYBRID_V1)
    vectors = {
        "about": "Test vectors of byokeep's seal, version 1; docs/sealing.md explains them.",
        "seals": [seal(suite, context) for suite in suites for context in CONTEXTS],
        "statements": [statement(suite) for suite in suites],
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
