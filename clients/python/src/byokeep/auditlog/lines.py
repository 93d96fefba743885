"""The lines of an export, as keyvault's client writes them and as a verifier expects them."""

from __future__ import annotations

import base64
import hashlib
import json

from google.protobuf import json_format

from byokeep.auditlog.view import view
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import audit_pb2

LABEL = b"byokeep/audit/v1\n"
FIRST_HASH = bytes(32)
#: What the line of a link begins with.
START = '{"event": {"body": "'


def link_hash(previous_hash: bytes, body: bytes) -> bytes:
    """Return a link's hash: SHA-256 of label, hash before and body."""
    return hashlib.sha256(LABEL + previous_hash + body).digest()


def link_line(body: str, previous_hash: str, link: str, shown: str) -> str:
    """Return the line of a link from its parts: three in base64, and the readable view."""
    return (
        f'{START}{body}", "previous_hash": "{previous_hash}", "hash": "{link}"}}, "view": {shown}}}'
    )


def event_line(event: audit_pb2.ChainedEvent) -> str:
    """Return the line of an export for one link."""
    return link_line(
        base64.b64encode(event.body).decode(),
        base64.b64encode(event.previous_hash).decode(),
        base64.b64encode(event.hash).decode(),
        view(audit_pb2.AuditEvent.FromString(event.body)),
    )


def head_line(head: options_pb2.SignedEnvelope, proof: audit_pb2.LogProof | None = None) -> str:
    """Return the last line of an export; on its own, what a later export is held against."""
    record = {"head": json_format.MessageToDict(head)}
    if proof is not None:
        record["proof"] = json_format.MessageToDict(proof)
    return json.dumps(record)
