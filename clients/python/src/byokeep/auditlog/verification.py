"""Checks an exported audit chain offline, against keys that the verifier pins: one line after the
other, in this module. An auditor reads it from top to bottom, with `view` (the readable copy of an
event), `checkpoint` (signed notes), `merkle` (proofs) and `dsse` (signatures) beside it.

An export is JSON Lines: `{"event": {"body", "previous_hash", "hash"}, "view": {…}}`
for each link (base64; `view` is the decoded body, for people), then `{"head":
{"payloadType", "payload", "keyId", "signature"}, "proof": {…}}`, where the proof ties
the head to a checkpoint of the log of all chains' heads. Chain, head and proof are
described in protos/byokeep/keyvault/v1/audit.proto. An export has one spelling: a
byte that differs is a change, whatever it means.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from byokeep import checkpoint, dsse, merkle
from byokeep.auditlog.view import view
from byokeep.checkpoint import Checkpoint, NoteError
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

#: The audit log keys that a verifier pins, by key id.
Keys = Mapping[str, Ed25519PublicKey]
LABEL = b"byokeep/audit/v1\n"
FIRST_HASH = bytes(32)
#: What the line of a link begins with.
START = '{"event": {"body": "'
#: No line of an export is longer; one that is may not be held.
LINE_BYTES = 16 << 20
_PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED


class VerificationError(Exception):
    """The export is not what keyvault wrote. `sequence` is the first broken link; 0: no link."""

    def __init__(self, sequence: int, what: str) -> None:
        """Keep both beside the sentence."""
        super().__init__(f"link {sequence}: {what}" if sequence else what)
        self.sequence = sequence
        self.what = what


class UnpinnedKeyError(VerificationError):
    """The head says that it is signed by a key that the verifier does not pin: nothing can be
    said of the export, neither that it holds nor that it was altered."""

    def __init__(self, key_id: str) -> None:
        """Keep the id as the file states it."""
        super().__init__(0, f"its head is signed by {key_id}, which is not pinned")
        self.key_id = key_id


class OtherChainError(VerificationError):
    """What the verifier holds from before is of another chain or deployment: the two files say
    nothing of each other."""

    def __init__(self) -> None:
        """Say so."""
        super().__init__(0, "the older head is of another chain or deployment")


@dataclass(frozen=True, slots=True)
class Older:
    """What a verifier holds from before: a chain's signed head, a checkpoint, or both."""

    head: audit_pb2.ChainHead | None = None
    checkpoint: Checkpoint | None = None


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
    #: The last event that retention dropped, as the chain itself states; 0: none.
    dropped: int = 0
    #: The signed checkpoint that contains the head; None where the export has none.
    checkpoint: Checkpoint | None = None
    #: Size of the older checkpoint that this log was shown to continue; 0: not compared.
    since: int = 0


def verify(
    lines: Iterable[str],
    trusted: Keys,
    *,
    deployment: str = "",
    against: audit_pb2.ChainHead | None = None,
    since: Checkpoint | None = None,
) -> Verified:
    """Verify an export: every link, no gap, one chain, the signed head at its end, and its place
    in the log.

    `deployment` is the one expected; empty: any. `against` is an older head that the verifier
    holds: the chain must go through it. `since` is an older checkpoint: the log must have grown
    from it, and the export must not be older than it is.

    Raises:
        VerificationError: with the first link that is broken, and what is wrong with it.
        OtherChainError: `against` is of another chain or deployment.
        UnpinnedKeyError: nothing is broken up to the head, which no pinned key signed.
    """
    export = Export(trusted, deployment, against)
    for number, line in enumerate(lines, 1):
        export.take(number, line.removesuffix("\n"))
    return export.verified(since)


class Export:
    """What was read of an export so far, all of it in order."""

    def __init__(
        self, trusted: Keys, deployment: str = "", against: audit_pb2.ChainHead | None = None
    ) -> None:
        """Start with no line; otherwise as `verify`."""
        self.sequence, self.hash = 0, FIRST_HASH
        self.chain, self.deployment = "", deployment
        self.first_time: datetime.datetime | None = None
        self.last_time: datetime.datetime | None = None
        #: The last link that is not in the file, and its hash: the chain must state them.
        self.dropped = (0, FIRST_HASH)
        #: What events state of retention: up to which link events were dropped, and its hash.
        self.stated: set[tuple[int, bytes]] = set()
        self.against = against
        #: Hash of the link that the older head is about, once it was read.
        self.asked: bytes | None = None
        self.ended = False
        self._trusted = trusted
        self._end: _End | None = None

    def take(self, number: int, line: str) -> None:
        """Check the line of that number, and keep what it says. Raises VerificationError."""
        if not line:
            return
        if self.ended:
            raise VerificationError(0, "there is something after the signed head")
        record = _record(number, line)
        if "head" in record:
            self._end, self.ended = _end(line, record, self._trusted), True
        else:
            self._link(line, record["event"])

    def begin_after(self, sequence: int, digest: bytes) -> None:
        """Begin behind a link that is not in the file."""
        self.dropped = (sequence, digest)
        self.go_on(sequence, digest)

    def go_on(self, sequence: int, digest: bytes) -> None:
        """Have the chain end at a link."""
        self.sequence, self.hash = sequence, digest
        if self.against is not None and self.against.sequence == sequence:
            self.asked = digest

    def verified(self, since: Checkpoint | None) -> Verified:
        """Return what the whole of it proves. Raises VerificationError."""
        end = self._end
        if end is None:
            raise VerificationError(
                0, f"it ends after link {self.sequence} without a signed head: it was cut"
            )
        self._check_head(end.head)
        contained = self._check_older(end.head)
        return Verified(
            deployment=end.head.deployment,
            chain=end.head.chain,
            count=self.sequence - self.dropped[0],
            first_time=self.first_time,
            last_time=self.last_time,
            head=end.head,
            signed_by=end.signed_by,
            dropped=self.dropped[0],
            checkpoint=end.checkpoint,
            since=_since(end, since, required=not contained),
        )

    def _link(self, line: str, parts: Any) -> None:
        expected = self.sequence + 1
        try:
            body, previous, digest = (
                base64.b64decode(parts[name], validate=True)
                for name in ("body", "previous_hash", "hash")
            )
        except (KeyError, TypeError, ValueError):
            raise VerificationError(expected, "it lacks body, previous_hash or hash") from None
        try:
            event = audit_pb2.AuditEvent.FromString(body)
            written = event_line(
                audit_pb2.ChainedEvent(body=body, previous_hash=previous, hash=digest)
            )
        # ValueError: a time that no calendar has.
        except (DecodeError, ValueError):
            raise VerificationError(expected, "its body is not an event") from None
        if self.last_time is None and event.sequence > 1:
            self.begin_after(event.sequence - 1, previous)
            expected = event.sequence
        if event.sequence != expected:
            raise VerificationError(
                expected, f"it is missing: the next one in the file is link {event.sequence}"
            )
        if previous != self.hash:
            raise VerificationError(expected, "it does not follow from the link before")
        if digest != link_hash(previous, body):
            raise VerificationError(expected, "its hash is not that of its content: altered")
        if event.chain != (self.chain or event.chain):
            raise VerificationError(expected, "it belongs to another chain")
        if event.deployment != (self.deployment or event.deployment):
            raise VerificationError(expected, "it belongs to another deployment")
        if line != written:
            raise VerificationError(
                expected, "its readable view, or its spelling, is not that of its hashed body"
            )
        self.chain, self.deployment = event.chain, event.deployment
        self.go_on(expected, digest)
        self.last_time = event.event_time.ToDatetime(datetime.UTC)
        self.first_time = self.first_time or self.last_time
        if event.type == _PRUNED:
            self.stated.add((event.pruned_sequence, event.pruned_hash))

    def _check_head(self, head: audit_pb2.ChainHead) -> None:
        """Check that the head is the end of these links, and their beginning is the chain's."""
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
        if head.chain != (self.chain or head.chain):
            raise VerificationError(0, "the signed head is of another chain")
        if head.deployment != (self.deployment or head.deployment):
            raise VerificationError(0, "the signed head is of another deployment")
        dropped = self.dropped[0]
        if dropped and self.dropped not in self.stated:
            raise VerificationError(
                1,
                f"it is missing: the file begins with link {dropped + 1}, and no event in it"
                " says that retention dropped those before",
            )

    def _check_older(self, head: audit_pb2.ChainHead) -> bool:
        """Check that the chain goes through the older head. False where there is none, or where
        retention dropped its link: that shows nothing."""
        older = self.against
        if older is None:
            return False
        if (older.chain, older.deployment) != (head.chain, head.deployment):
            raise OtherChainError
        if self.asked not in (None, older.hash):
            raise VerificationError(older.sequence, "it is not the link that the older head names")
        if older.sequence > self.sequence:
            raise VerificationError(
                self.sequence + 1,
                f"it is missing: an older head counts {older.sequence} events,"
                f" this file has {self.sequence}",
            )
        return older.sequence >= self.dropped[0]


def _record(number: int, line: str) -> dict[str, Any]:
    if len(line) > LINE_BYTES:
        raise VerificationError(0, f"line {number} is longer than 16 MiB")
    try:
        record = json.loads(line)
    # RecursionError: brackets in brackets, a thousand deep.
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not ("event" in record) ^ ("head" in record):
        raise VerificationError(0, f"line {number} is neither an event nor a head")
    return record


# --- the last line


@dataclass(frozen=True, slots=True)
class _End:
    """The last line of an export, verified; without a proof there is no checkpoint."""

    head: audit_pb2.ChainHead
    signed_by: str
    proof: audit_pb2.LogProof
    checkpoint: Checkpoint | None


def _end(line: str, record: Mapping[str, Any], trusted: Keys) -> _End:
    """Verify the last line of an export."""
    proof = None
    try:
        envelope = json_format.ParseDict(record["head"], options_pb2.SignedEnvelope())
        if "proof" in record:
            proof = json_format.ParseDict(record["proof"], audit_pb2.LogProof())
    # Of a record that is no object, or has a name that is no text, it says so otherwise.
    except (json_format.ParseError, TypeError, ValueError, SystemError):
        raise VerificationError(0, "the signed head or its proof is malformed") from None
    if envelope.key_id not in trusted:
        raise UnpinnedKeyError(envelope.key_id)
    try:
        head = audit_pb2.ChainHead.FromString(dsse.verify(envelope, dsse.CHAIN_HEAD, trusted))
        view(head)
    except dsse.SignatureError as error:
        raise VerificationError(0, f"the signed head is not to be believed: {error}") from None
    # ValueError: a time that no calendar has.
    except (DecodeError, ValueError):
        raise VerificationError(0, "the signed head is malformed") from None
    if head_line(envelope, proof) != line:
        raise VerificationError(0, "the head's line is not written as keyvault's export is")
    if proof is not None:
        return _End(head, envelope.key_id, proof, _tied(head, proof, trusted))
    if head.log_size:
        raise VerificationError(0, "the proof that ties the head to the log was taken out")
    return _End(head, envelope.key_id, audit_pb2.LogProof(), None)


def _tied(head: audit_pb2.ChainHead, proof: audit_pb2.LogProof, trusted: Keys) -> Checkpoint:
    """Return the checkpoint that a proof leads to."""
    leaf = leaf_of(head, proof.leaf_blind)
    older_root = proof.since_root if proof.since_size else merkle.EMPTY
    try:
        newer = checkpoint.open_checkpoint(proof.checkpoint, head.deployment, trusted)
        merkle.verify_inclusion(leaf, proof.leaf_index, newer.size, proof.inclusion, newer.root)
        merkle.verify_consistency(
            proof.since_size, older_root, newer.size, newer.root, proof.consistency
        )
    except (NoteError, merkle.ProofError) as error:
        raise VerificationError(0, f"the head is not in the log: {error}") from None
    if newer.size != head.log_size:
        raise VerificationError(0, "the checkpoint is not the one that the head was signed for")
    if proof.since_root and not proof.since_size:
        raise VerificationError(0, "the proof names the root of an older log without its size")
    return newer


def _since(end: _End, older: Checkpoint | None, *, required: bool) -> int:
    """Check that the export's log continues an older checkpoint; return that one's size.

    Where the chain was already shown to go through an older head, a log that can't be
    compared is no failure, and 0 is returned.
    """
    newer, proof = end.checkpoint, end.proof
    if older is None:
        return 0
    if newer is not None and newer.size < older.size:
        raise VerificationError(
            end.head.sequence + 1,
            f"what follows may be missing: the checkpoint was signed when the log had {older.size}"
            f" heads, this export when it had {newer.size}",
        )
    if newer is not None and newer.size == older.size:
        root = newer.root
    elif newer is not None and proof.since_size == older.size:
        root = proof.since_root
    elif required:
        raise VerificationError(
            0,
            "the export has no proof that the log grew from that checkpoint; export again with"
            " --since",
        )
    else:
        return 0
    if root != older.root:
        raise VerificationError(
            0, "the log is not the one of that checkpoint: it was rewritten, or restored"
        )
    return older.size


# --- what a verifier holds from before


def read_older(lines: Iterable[str], trusted: Keys, deployment: str) -> Older:
    """Return what an older file holds: an export, its last line, or a checkpoint's signed note.

    Raises:
        VerificationError: it holds none, or not one that a trusted key signed.
    """
    note = ""
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n")
        if note or (text and text[0] != "{"):
            note += line
            if len(note) > LINE_BYTES:
                raise VerificationError(0, "the older checkpoint is longer than 16 MiB")
        elif text and not text.startswith(START) and "head" in (record := _record(number, text)):
            end = _end(text, record, trusted)
            return Older(end.head, end.checkpoint)
    if not note:
        raise VerificationError(0, "the older file has no signed head")
    try:
        return Older(None, checkpoint.open_checkpoint(note, deployment, trusted))
    except NoteError as error:
        raise VerificationError(0, f"the older checkpoint: {error}") from None


# --- how keyvault's client writes an export


def link_hash(previous_hash: bytes, body: bytes) -> bytes:
    """Return a link's hash: SHA-256 of label, hash before and body."""
    return hashlib.sha256(LABEL + previous_hash + body).digest()


def leaf_of(head: audit_pb2.ChainHead, blind: bytes) -> bytes:
    """Return the hash of the leaf that a chain's head has in the log."""
    return merkle.leaf_hash(fields(blind, head.chain, head.sequence, head.hash))


def link_line(body: str, previous_hash: str, link: str, shown: str) -> str:
    """Return the line of a link from its parts: three in base64, and the readable view."""
    return (
        f'{START}{body}", "previous_hash": "{previous_hash}", "hash": "{link}"}}, "view": {shown}}}'
    )


def event_line(event: audit_pb2.ChainedEvent) -> str:
    """Return the line of an export for one link. Raises ValueError, DecodeError: not an event."""
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
