"""Checks an exported audit chain offline, against keys that the verifier pins.

An export is JSON Lines: `{"event": {"body", "previous_hash", "hash"}, "view": {…}}`
for each link (base64; `view` is the decoded body, for people), then
`{"head": {"payloadType", "payload", "keyId", "signature"}}`. The chain is described
in protos/byokeep/keyvault/v1/audit.proto.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from byokeep import dsse
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import audit_pb2

LABEL = b"byokeep/audit/v1\n"
FIRST_HASH = bytes(32)
_Keys = Mapping[str, Ed25519PublicKey]


class VerificationError(Exception):
    """The export is not what keyvault wrote. `sequence` is the first broken link; 0: no link."""

    def __init__(self, sequence: int, what: str) -> None:
        """Keep both beside the sentence."""
        super().__init__(f"link {sequence}: {what}" if sequence else what)
        self.sequence = sequence
        self.what = what


@dataclass(frozen=True, slots=True)
class Verified:
    """What an export proves. Times are None for an empty chain."""

    deployment: str
    chain: str
    count: int
    first_time: datetime.datetime | None
    last_time: datetime.datetime | None
    head: audit_pb2.ChainHead
    signed_by: str


def link_hash(previous_hash: bytes, body: bytes) -> bytes:
    """Return a link's hash: SHA-256 of label, hash before and body."""
    return hashlib.sha256(LABEL + previous_hash + body).digest()


def event_line(event: audit_pb2.ChainedEvent) -> str:
    """Return the line of an export for one link."""
    return json.dumps(
        {
            "event": {
                "body": base64.b64encode(event.body).decode(),
                "previous_hash": base64.b64encode(event.previous_hash).decode(),
                "hash": base64.b64encode(event.hash).decode(),
            },
            "view": _view(audit_pb2.AuditEvent.FromString(event.body)),
        }
    )


def head_line(head: options_pb2.SignedEnvelope) -> str:
    """Return the last line of an export."""
    return json.dumps({"head": json_format.MessageToDict(head)})


def verify(
    lines: Iterable[str],
    trusted: _Keys,
    *,
    deployment: str = "",
    against: audit_pb2.ChainHead | None = None,
) -> Verified:
    """Verify an export: every link, no gap, one chain, and the signed head at its end.

    `against` is an older head that the verifier holds: the chain must go through it.
    `deployment` is the one expected; empty: any.

    Raises:
        VerificationError: with the first link that is broken, and what is wrong with it.
    """
    chain = _Chain(deployment, against)
    head: audit_pb2.ChainHead | None = None
    signed_by = ""
    for record in map(_record, _numbered(lines)):
        if head is not None:
            raise VerificationError(0, "there is something after the signed head")
        if "head" in record:
            head, signed_by = _head(record["head"], trusted)
        else:
            chain.add(record)
    if head is None:
        raise VerificationError(
            0, f"it ends after link {chain.sequence} without a signed head: it was cut"
        )
    chain.check_end(head)
    return Verified(
        deployment=head.deployment,
        chain=head.chain,
        count=chain.sequence,
        first_time=chain.first_time,
        last_time=chain.last_time,
        head=head,
        signed_by=signed_by,
    )


def read_head(lines: Iterable[str], trusted: _Keys) -> audit_pb2.ChainHead:
    """Return the signed head of an older export, or of a file that holds the head alone.

    Raises:
        VerificationError: it has no head, or not one that a trusted key signed.
    """
    for record in map(_record, _numbered(lines)):
        if "head" in record:
            return _head(record["head"], trusted)[0]
    raise VerificationError(0, "the older file has no signed head")


class _Chain:
    """The links seen so far."""

    def __init__(self, deployment: str, against: audit_pb2.ChainHead | None) -> None:
        self.sequence = 0
        self.hash = FIRST_HASH
        self.name = ""
        self.deployment = deployment
        self.first_time: datetime.datetime | None = None
        self.last_time: datetime.datetime | None = None
        self._against = against

    def add(self, record: Mapping[str, Any]) -> None:
        """Check the next link and keep it."""
        expected = self.sequence + 1
        body, previous, stated = _link(expected, record)
        event = _event(expected, body)
        if event.sequence != expected:
            raise VerificationError(
                expected, f"it is missing: the next one in the file is link {event.sequence}"
            )
        if previous != self.hash:
            raise VerificationError(expected, "it does not follow from the link before")
        if stated != link_hash(previous, body):
            raise VerificationError(expected, "its hash is not that of its content: altered")
        self._check_place(event)
        if record.get("view") != _view(event):
            raise VerificationError(expected, "its readable view differs from its hashed body")
        self.sequence, self.hash = expected, stated
        self.last_time = event.event_time.ToDatetime(datetime.UTC)
        self.first_time = self.first_time or self.last_time
        older = self._against
        if older is not None and older.sequence == expected and older.hash != stated:
            raise VerificationError(expected, "it is not the link that the older head names")

    def check_end(self, head: audit_pb2.ChainHead) -> None:
        """Check that the signed head is the end, and that the older head is not past it."""
        if head.sequence > self.sequence:
            raise VerificationError(
                self.sequence + 1,
                f"it is missing: the signed head counts {head.sequence} events,"
                f" the file has {self.sequence}",
            )
        if head.sequence < self.sequence:
            raise VerificationError(
                head.sequence + 1, f"the signed head ends before it, at {head.sequence}"
            )
        if (head.hash or FIRST_HASH) != self.hash:
            raise VerificationError(self.sequence, "it is not the link that the signed head names")
        if head.chain != (self.name or head.chain):
            raise VerificationError(0, "the signed head is of another chain")
        if head.deployment != (self.deployment or head.deployment):
            raise VerificationError(0, "the signed head is of another deployment")
        self._check_older(head.chain, head.deployment)
        older = self._against
        if older is not None and older.sequence > self.sequence:
            raise VerificationError(
                self.sequence + 1,
                f"it is missing: an older head counts {older.sequence} events,"
                f" this file has {self.sequence}",
            )

    def _check_place(self, event: audit_pb2.AuditEvent) -> None:
        self.name = self.name or event.chain
        self.deployment = self.deployment or event.deployment
        if event.chain != self.name:
            raise VerificationError(event.sequence, "it belongs to another chain")
        if event.deployment != self.deployment:
            raise VerificationError(event.sequence, "it belongs to another deployment")
        self._check_older(event.chain, event.deployment)

    def _check_older(self, chain: str, deployment: str) -> None:
        older = self._against
        if older is not None and (older.chain, older.deployment) != (chain, deployment):
            raise VerificationError(0, "the older head is of another chain or deployment")


def _numbered(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _record(numbered: tuple[int, str]) -> dict[str, Any]:
    number, line = numbered
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not ("event" in record) ^ ("head" in record):
        raise VerificationError(0, f"line {number} is neither an event nor a head")
    return record


def _link(sequence: int, record: Mapping[str, Any]) -> tuple[bytes, bytes, bytes]:
    event = record["event"]
    try:
        body, previous, stated = (
            base64.b64decode(event[name], validate=True)
            for name in ("body", "previous_hash", "hash")
        )
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise VerificationError(sequence, "it lacks body, previous_hash or hash") from None
    return body, previous, stated


def _event(sequence: int, body: bytes) -> audit_pb2.AuditEvent:
    try:
        event = audit_pb2.AuditEvent.FromString(body)
        _view(event)
    # json_format.Error: a time that no calendar has.
    except (DecodeError, json_format.Error):
        raise VerificationError(sequence, "its body is not an event") from None
    return event


def _head(record: Any, trusted: _Keys) -> tuple[audit_pb2.ChainHead, str]:
    try:
        envelope = json_format.ParseDict(record, options_pb2.SignedEnvelope())
        payload = dsse.verify(envelope, dsse.CHAIN_HEAD, trusted)
        return audit_pb2.ChainHead.FromString(payload), envelope.key_id
    except json_format.ParseError:
        raise VerificationError(0, "the signed head is malformed") from None
    except dsse.SignatureError as error:
        raise VerificationError(0, f"the signed head is not to be believed: {error}") from None
    except DecodeError:
        raise VerificationError(0, "the signed head is malformed") from None


def _view(event: audit_pb2.AuditEvent) -> dict[str, Any]:
    return json_format.MessageToDict(event)
