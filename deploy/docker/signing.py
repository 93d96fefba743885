"""A signed statement of what is in an image: in-toto Statement v1 in a DSSE envelope, both JSON,
by an Ed25519 key in a PEM file. Sources: in-toto attestation spec/v1, secure-systems-lab/dsse.

The statement names the image by its id and its tree: who pulls it reads the tree for himself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from byokeep.dsse import pre_authentication_encoding
from byokeep.ids import public_key_id
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deploy.docker import images

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://byokeep.dev/attestation/image/v1"


class SignatureError(Exception):
    """The statement is not that of this image by this key; the text says in what."""


def sign(image: str, key: Path) -> str:
    """Return the signed statement of an image. Raises ImageError, ValueError for another key."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    if not isinstance(private, Ed25519PrivateKey):
        raise ValueError(f"{key} is not an Ed25519 key: openssl genpkey -algorithm ed25519")
    payload = json.dumps(_statement(image), sort_keys=True).encode()
    signature = private.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": public_key_id("img", private.public_key().public_bytes_raw()),
                "sig": base64.b64encode(signature).decode(),
            }
        ],
    }
    return json.dumps(envelope, indent=2)


def verify(image: str, envelope: str, key: Path) -> None:
    """Check that the statement is by this key and of this image, file for file.

    Raises:
        SignatureError: says in what it is not.
        ImageError: there is no such image.
    """
    public = serialization.load_pem_public_key(key.read_bytes())
    if not isinstance(public, Ed25519PublicKey):
        raise SignatureError(f"{key} is not an Ed25519 public key")
    stated = _opened(envelope, public)
    found = _statement(image)
    # Labels are no files; what they say is not taken from the image itself.
    for field in ("tree", "sbom"):
        if stated["predicate"][field] != found["predicate"][field]:
            raise SignatureError(f"{image} is another image than was signed: its {field} differs")
    if stated["subject"][0]["name"] != found["subject"][0]["name"]:
        raise SignatureError(f"the statement is of {stated['subject'][0]['name']}")


def _opened(envelope: str, public: Ed25519PublicKey) -> Any:
    try:
        outer = json.loads(envelope)
        payload = base64.b64decode(outer["payload"], validate=True)
        signature = base64.b64decode(outer["signatures"][0]["sig"], validate=True)
        if outer["payloadType"] != PAYLOAD_TYPE:
            raise SignatureError("not a signed in-toto statement")
        public.verify(signature, pre_authentication_encoding(PAYLOAD_TYPE, payload))
    except (ValueError, KeyError, IndexError, TypeError):
        raise SignatureError("not a signed in-toto statement") from None
    except InvalidSignature:
        raise SignatureError("the signature does not verify") from None
    return json.loads(payload)


def _statement(image: str) -> dict[str, Any]:
    tree = images.tree(image)
    digest = images.docker("image", "inspect", "--format={{.Id}}", image).removeprefix("sha256:")
    return {
        "_type": _STATEMENT,
        "subject": [{"name": image.rpartition(":")[0], "digest": {"sha256": digest}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "tree": {"sha256": tree.digest},
            "sbom": {"sha256": hashlib.sha256(tree.sbom).hexdigest()},
        },
    }
