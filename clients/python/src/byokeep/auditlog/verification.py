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
import binascii
import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

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
_TOO_LONG = "is longer than 16 MiB"
_PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED
_M = TypeVar("_M", bound=Message)


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


def read_older(lines: Iterable[str], trusted: Keys, deployment: str) -> Older:
    """Return what an older file holds: an export, its last line, or a checkpoint's signed note.

    Raises:
        VerificationError: it holds none, or not one that a trusted key signed.
    """
    rest = iter(lines)
    first = next((line for line in rest if line.strip()), "")
    if first.lstrip().startswith("{"):
        end = _last(chain([first], rest), trusted)
        return Older(end.head, end.checkpoint)
    note = ""
    for line in chain([first], rest):
        note += line
        if len(note) > LINE_BYTES:
            raise VerificationError(0, f"the older checkpoint {_TOO_LONG}")
    try:
        return Older(None, checkpoint.open_checkpoint(note, deployment, trusted))
    except NoteError as error:
        raise VerificationError(0, f"the older checkpoint: {error}") from None


def read_head(lines: Iterable[str], trusted: Keys) -> audit_pb2.ChainHead:
    """Return the signed head of an older export, or of a file that holds the head alone.

    Raises:
        VerificationError: it has no head, or not one that a trusted key signed.
    """
    return _last(lines, trusted).head


# --- how keyvault's client writes it


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


# --- the links, then the end


@dataclass(frozen=True, slots=True)
class _End:
    """The last line of an export, verified."""

    head: audit_pb2.ChainHead
    signed_by: str
    proof: audit_pb2.LogProof | None
    checkpoint: Checkpoint | None


class Export:
    """What was read of an export so far, all of it in order."""

    def __init__(
        self, trusted: Keys, deployment: str = "", against: audit_pb2.ChainHead | None = None
    ) -> None:
        """Start with no line; otherwise as `verify`."""
        self.sequence = 0
        self.hash = FIRST_HASH
        self.chain = ""
        self.deployment = deployment
        self.against = against
        self.first_time: datetime.datetime | None = None
        self.last_time: datetime.datetime | None = None
        #: What events say that retention dropped: up to which link, and that one's hash.
        self.stated: set[tuple[int, bytes]] = set()
        self.ended = False
        self._trusted = trusted
        self._end: _End | None = None
        # Links up to this one are not in the file, which an event must state.
        self._dropped, self._dropped_hash = 0, FIRST_HASH

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
            self._link(line, record)

    def begin_after(self, sequence: int, digest: bytes) -> None:
        """Begin behind a link that is not in the file: what retention dropped is stated later."""
        self.sequence, self.hash = self._dropped, self._dropped_hash = sequence, digest

    def verified(self, since: Checkpoint | None) -> Verified:
        """Return what the whole of it proves. Raises VerificationError."""
        end = self._end
        if end is None:
            raise VerificationError(
                0, f"it ends after link {self.sequence} without a signed head: it was cut"
            )
        self._check_end(end.head)
        older = self.against
        # Links that reach back to an older head contain it.
        contained = older is not None and older.sequence >= self._dropped
        return Verified(
            deployment=end.head.deployment,
            chain=end.head.chain,
            count=self.sequence - self._dropped,
            first_time=self.first_time,
            last_time=self.last_time,
            head=end.head,
            signed_by=end.signed_by,
            dropped=self._dropped,
            checkpoint=end.checkpoint,
            since=_since(end, since, required=not contained),
        )

    def of_older(self, name: str, deployment: str) -> bool:
        """Whether the older head, if there is one, is of this chain and deployment."""
        older = self.against
        return older is None or (older.chain, older.deployment) == (name, deployment)

    def _link(self, line: str, record: Mapping[str, Any]) -> None:
        expected = self.sequence + 1
        body, previous, digest = _parts(expected, record)
        event, shown = _event(expected, body)
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
        if not self.of_older(event.chain, event.deployment):
            raise OtherChainError
        if record.get("view") != json.loads(shown):
            raise VerificationError(expected, "its readable view differs from its hashed body")
        link = audit_pb2.ChainedEvent(body=body, previous_hash=previous, hash=digest)
        if event_line(link) != line:
            raise VerificationError(expected, "its line is not written as keyvault's export is")
        older = self.against
        if older is not None and older.sequence == expected and older.hash != digest:
            raise VerificationError(expected, "it is not the link that the older head names")
        self.chain, self.deployment = event.chain, event.deployment
        self.sequence, self.hash = expected, digest
        self.last_time = event.event_time.ToDatetime(datetime.UTC)
        self.first_time = self.first_time or self.last_time
        if event.type == _PRUNED:
            self.stated.add((event.pruned_sequence, event.pruned_hash))

    def _check_end(self, head: audit_pb2.ChainHead) -> None:
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
        older, dropped, before = self.against, self._dropped, self._dropped_hash
        if older is not None and older.sequence == dropped != 0 and older.hash != before:
            raise VerificationError(dropped, "it is not the link that the older head names")
        if dropped and (dropped, before) not in self.stated:
            raise VerificationError(
                1,
                f"it is missing: the file begins with link {dropped + 1}, and no event in it"
                " says that retention dropped those before",
            )
        if not self.of_older(head.chain, head.deployment):
            raise OtherChainError
        if older is not None and older.sequence > self.sequence:
            raise VerificationError(
                self.sequence + 1,
                f"it is missing: an older head counts {older.sequence} events,"
                f" this file has {self.sequence}",
            )


def _record(number: int, line: str) -> dict[str, Any]:
    if len(line) > LINE_BYTES:
        raise VerificationError(0, f"line {number} {_TOO_LONG}")
    try:
        record = json.loads(line)
    # RecursionError: brackets in brackets, a thousand deep.
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not ("event" in record) ^ ("head" in record):
        raise VerificationError(0, f"line {number} is neither an event nor a head")
    return record


def _parts(sequence: int, record: Mapping[str, Any]) -> tuple[bytes, bytes, bytes]:
    event = record["event"]
    try:
        body, previous, stated = (
            base64.b64decode(event[name], validate=True)
            for name in ("body", "previous_hash", "hash")
        )
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise VerificationError(sequence, "it lacks body, previous_hash or hash") from None
    return body, previous, stated


def _event(sequence: int, body: bytes) -> tuple[audit_pb2.AuditEvent, str]:
    try:
        event = audit_pb2.AuditEvent.FromString(body)
        return event, view(event)
    # ValueError: a time that no calendar has.
    except (DecodeError, ValueError):
        raise VerificationError(sequence, "its body is not an event") from None


def _last(lines: Iterable[str], trusted: Keys) -> _End:
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n")
        if not text or text.startswith(START):
            continue
        record = _record(number, text)
        if "head" in record:
            return _end(text, record, trusted)
    raise VerificationError(0, "the older file has no signed head")


def _end(line: str, record: Mapping[str, Any], trusted: Keys) -> _End:
    """Verify the last line of an export."""
    head, envelope = _head(record["head"], trusted)
    proof = None
    if "proof" in record:
        proof = _parsed(record["proof"], audit_pb2.LogProof(), "proof")
    if head_line(envelope, proof) != line:
        raise VerificationError(0, "the head's line is not written as keyvault's export is")
    if head.log_size and proof is None:
        raise VerificationError(0, "the proof that ties the head to the log was taken out")
    return _End(head, envelope.key_id, proof, _tied(head, proof, trusted) if proof else None)


def _tied(head: audit_pb2.ChainHead, proof: audit_pb2.LogProof, trusted: Keys) -> Checkpoint:
    """Return the checkpoint that a proof leads to."""
    try:
        newer = checkpoint.open_checkpoint(proof.checkpoint, head.deployment, trusted)
        if newer.size != head.log_size:
            raise VerificationError(0, "the checkpoint is not the one that the head was signed for")
        leaf = leaf_of(head, proof.leaf_blind)
        merkle.verify_inclusion(leaf, proof.leaf_index, newer.size, proof.inclusion, newer.root)
        older_root = proof.since_root if proof.since_size else merkle.EMPTY
        merkle.verify_consistency(
            proof.since_size, older_root, newer.size, newer.root, proof.consistency
        )
    except (NoteError, merkle.ProofError) as error:
        what = str(error)
    else:
        if proof.since_size or not proof.since_root:
            return newer
        what = "it names the root of an older log without its size"
    raise VerificationError(0, f"the head is not in the log: {what}")


def _head(record: Any, trusted: Keys) -> tuple[audit_pb2.ChainHead, options_pb2.SignedEnvelope]:
    envelope = _parsed(record, options_pb2.SignedEnvelope(), "signed head")
    if envelope.key_id not in trusted:
        raise UnpinnedKeyError(envelope.key_id)
    try:
        payload = dsse.verify(envelope, dsse.CHAIN_HEAD, trusted)
        head = audit_pb2.ChainHead.FromString(payload)
        view(head)
    except dsse.SignatureError as error:
        raise VerificationError(0, f"the signed head is not to be believed: {error}") from None
    # ValueError: a time that no calendar has.
    except (DecodeError, ValueError):
        raise VerificationError(0, "the signed head is malformed") from None
    return head, envelope


def _parsed(record: Any, message: _M, what: str) -> _M:
    try:
        return json_format.ParseDict(record, message)
    # Of a record that is no object, or has a name that is no text, it says so otherwise.
    except (json_format.ParseError, TypeError, ValueError, SystemError):
        raise VerificationError(0, f"the {what} is malformed") from None


def _since(end: _End, older: Checkpoint | None, *, required: bool) -> int:
    """Check that the export's log continues an older checkpoint; return that one's size.

    Where the chain was already shown to go through an older head, a log that can't be
    compared is no failure, and 0 is returned.
    """
    newer, proof = end.checkpoint, end.proof
    if older is None or newer is None or proof is None:
        if not required or older is None:
            return 0
        raise VerificationError(
            0, "the export is not tied to the log: it can't be held against a checkpoint"
        )
    if newer.size < older.size:
        raise VerificationError(
            end.head.sequence + 1,
            f"what follows may be missing: the checkpoint was signed when the log had {older.size}"
            f" heads, this export when it had {newer.size}",
        )
    if newer.size == older.size:
        proven = newer.root == older.root
    elif proof.since_size != older.size:
        if not required:
            return 0
        raise VerificationError(
            0,
            "the export has no proof that the log grew from that checkpoint; export again with"
            " --since",
        )
    else:
        proven = proof.since_root == older.root
    if not proven:
        raise VerificationError(
            0, "the log is not the one of that checkpoint: it was rewritten, or restored"
        )
    return older.size
