"""Checks an exported audit chain offline, against keys that the verifier pins.

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
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from byokeep import checkpoint, dsse, merkle
from byokeep.auditview import view
from byokeep.checkpoint import Checkpoint, NoteError
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

LABEL = b"byokeep/audit/v1\n"
FIRST_HASH = bytes(32)
_START = '{"event": {"body": "'
_PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED
_Keys = Mapping[str, Ed25519PublicKey]


class VerificationError(Exception):
    """The export is not what keyvault wrote. `sequence` is the first broken link; 0: no link."""

    def __init__(self, sequence: int, what: str) -> None:
        """Keep both beside the sentence."""
        super().__init__(f"link {sequence}: {what}" if sequence else what)
        self.sequence = sequence
        self.what = what


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


def link_hash(previous_hash: bytes, body: bytes) -> bytes:
    """Return a link's hash: SHA-256 of label, hash before and body."""
    return hashlib.sha256(LABEL + previous_hash + body).digest()


def leaf_of(head: audit_pb2.ChainHead, blind: bytes) -> bytes:
    """Return the hash of the leaf that a chain's head has in the log."""
    return merkle.leaf_hash(fields(blind, head.chain, head.sequence, head.hash))


def event_line(event: audit_pb2.ChainedEvent) -> str:
    """Return the line of an export for one link."""
    return _line(
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


def verify(
    lines: Iterable[str],
    trusted: _Keys,
    *,
    deployment: str = "",
    against: audit_pb2.ChainHead | None = None,
    since: Checkpoint | None = None,
) -> Verified:
    """Verify an export: every link, no gap, one chain, the signed head at its end, and its place
    in the log.

    `against` is an older head that the verifier holds: the chain must go through it.
    `since` is an older checkpoint: the log must have grown from it, and the export must
    not be older than it is. `deployment` is the one expected; empty: any.

    Raises:
        VerificationError: with the first link that is broken, and what is wrong with it.
    """
    chain = _Chain(deployment, against)
    end: _End | None = None
    for number, line in _numbered(lines):
        if end is not None:
            raise VerificationError(0, "there is something after the signed head")
        if chain.add_as_written(line):
            continue
        record = _record(number, line)
        if "head" in record:
            end = _end(line, record, trusted)
        else:
            chain.add(line, record)
    if end is None:
        raise VerificationError(
            0, f"it ends after link {chain.sequence} without a signed head: it was cut"
        )
    chain.check_end(end.head)
    return Verified(
        deployment=end.head.deployment,
        chain=end.head.chain,
        count=chain.sequence - chain.dropped,
        first_time=chain.time(chain.first),
        last_time=chain.time(chain.last),
        head=end.head,
        signed_by=end.signed_by,
        dropped=chain.dropped,
        checkpoint=end.checkpoint,
        since=_since(end, since, required=not chain.passed(against)),
    )


def read_older(lines: Iterable[str], trusted: _Keys, deployment: str) -> Older:
    """Return what an older file holds: an export, its last line, or a checkpoint's signed note.

    Raises:
        VerificationError: it holds none, or not one that a trusted key signed.
    """
    first, rest = "", iter(lines)
    for first in rest:
        if first.strip():
            break
    if first.lstrip().startswith("{"):
        end = _last(_chained(first, rest), trusted)
        return Older(end.head, end.checkpoint)
    try:
        note = "".join(_chained(first, rest))
        return Older(None, checkpoint.open_checkpoint(note, deployment, trusted))
    except NoteError as error:
        raise VerificationError(0, f"the older checkpoint: {error}") from None


def read_head(lines: Iterable[str], trusted: _Keys) -> audit_pb2.ChainHead:
    """Return the signed head of an older export, or of a file that holds the head alone.

    Raises:
        VerificationError: it has no head, or not one that a trusted key signed.
    """
    return _last(lines, trusted).head


class _Chain:
    """The links seen so far."""

    def __init__(self, deployment: str, against: audit_pb2.ChainHead | None) -> None:
        self.sequence = 0
        self.hash = FIRST_HASH
        self.name = ""
        self.deployment = deployment
        self.first: audit_pb2.AuditEvent | None = None
        self.last: audit_pb2.AuditEvent | None = None
        self.dropped = 0
        self._before = FIRST_HASH
        self._pruned: list[audit_pb2.AuditEvent] = []
        self._encoded = base64.b64encode(FIRST_HASH).decode()
        self._against = against

    def add_as_written(self, line: str) -> bool:
        """Take the next link if its line is, to the byte, what it must be; False where something
        is wrong with it, which `add` names, or where it is no link."""
        end = line.find('"', len(_START))
        if self.last is None or not line.startswith(_START) or end < 0:
            return False
        encoded = line[len(_START) : end]
        try:
            body = binascii.a2b_base64(encoded)
            event = audit_pb2.AuditEvent.FromString(body)
            shown = view(event)
        except (ValueError, DecodeError):
            return False
        digest = hashlib.sha256(LABEL + self.hash + body).digest()
        written = binascii.b2a_base64(digest, newline=False).decode()
        if (
            binascii.b2a_base64(body, newline=False).decode() != encoded
            or _line(encoded, self._encoded, written, shown) != line
            or event.sequence != self.sequence + 1
            or event.chain != self.name
            or event.deployment != self.deployment
        ):
            return False
        self._take(event, digest, written)
        return True

    def add(self, line: str, record: Mapping[str, Any]) -> None:
        """Check the next link, naming what is wrong with it, and keep it."""
        expected = self.sequence + 1
        body, previous, stated = _link(expected, record)
        event, shown = _event(expected, body)
        if self.last is None and event.sequence > 1:
            # What retention dropped before is said by an event that must follow.
            self.dropped, self._before = event.sequence - 1, previous
            self.sequence, self.hash, expected = self.dropped, previous, event.sequence
        if event.sequence != expected:
            raise VerificationError(
                expected, f"it is missing: the next one in the file is link {event.sequence}"
            )
        if previous != self.hash:
            raise VerificationError(expected, "it does not follow from the link before")
        if stated != link_hash(previous, body):
            raise VerificationError(expected, "its hash is not that of its content: altered")
        self._check_place(event)
        if record.get("view") != json.loads(shown):
            raise VerificationError(expected, "its readable view differs from its hashed body")
        link = audit_pb2.ChainedEvent(body=body, previous_hash=previous, hash=stated)
        if event_line(link) != line:
            raise VerificationError(expected, "its line is not written as keyvault's export is")
        self._take(event, stated, base64.b64encode(stated).decode())

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
        self._check_dropped()
        self._check_older(head.chain, head.deployment)
        older = self._against
        if older is not None and older.sequence > self.sequence:
            raise VerificationError(
                self.sequence + 1,
                f"it is missing: an older head counts {older.sequence} events,"
                f" this file has {self.sequence}",
            )

    def passed(self, older: audit_pb2.ChainHead | None) -> bool:
        """Say whether the file's links reach back to an older head, which they then contain."""
        return older is not None and older.sequence >= self.dropped

    @staticmethod
    def time(event: audit_pb2.AuditEvent | None) -> datetime.datetime | None:
        """Return when an event was."""
        return event.event_time.ToDatetime(datetime.UTC) if event is not None else None

    def _take(self, event: audit_pb2.AuditEvent, digest: bytes, encoded: str) -> None:
        self.sequence, self.hash, self._encoded = event.sequence, digest, encoded
        self.last = event
        self.first = self.first or event
        if event.type == _PRUNED:
            self._pruned.append(event)
        older = self._against
        if older is not None and older.sequence == event.sequence and older.hash != digest:
            raise VerificationError(event.sequence, "it is not the link that the older head names")

    def _check_dropped(self) -> None:
        older = self._against
        if older is not None and older.sequence == self.dropped != 0 and older.hash != self._before:
            raise VerificationError(self.dropped, "it is not the link that the older head names")
        stated = {(event.pruned_sequence, event.pruned_hash) for event in self._pruned}
        if self.dropped and (self.dropped, self._before) not in stated:
            raise VerificationError(
                1,
                f"it is missing: the file begins with link {self.dropped + 1}, and no event in it"
                " says that retention dropped those before",
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


@dataclass(frozen=True, slots=True)
class _End:
    """The last line of an export, verified."""

    head: audit_pb2.ChainHead
    signed_by: str
    proof: audit_pb2.LogProof | None
    checkpoint: Checkpoint | None


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


def _line(body: str, previous: str, digest: str, shown: str) -> str:
    return (
        f'{_START}{body}", "previous_hash": "{previous}", "hash": "{digest}"}}, "view": {shown}}}'
    )


def _chained(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _numbered(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        if text := line.removesuffix("\n"):
            yield number, text


def _record(number: int, line: str) -> dict[str, Any]:
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


def _event(sequence: int, body: bytes) -> tuple[audit_pb2.AuditEvent, str]:
    try:
        event = audit_pb2.AuditEvent.FromString(body)
        return event, view(event)
    # ValueError: a time that no calendar has.
    except (DecodeError, ValueError):
        raise VerificationError(sequence, "its body is not an event") from None


def _last(lines: Iterable[str], trusted: _Keys) -> _End:
    for number, line in _numbered(lines):
        if line.startswith(_START):
            continue
        record = _record(number, line)
        if "head" in record:
            return _end(line, record, trusted)
    raise VerificationError(0, "the older file has no signed head")


def _end(line: str, record: Mapping[str, Any], trusted: _Keys) -> _End:
    head, envelope = _head(record["head"], trusted)
    proof = None
    if "proof" in record:
        try:
            proof = json_format.ParseDict(record["proof"], audit_pb2.LogProof())
        except json_format.ParseError:
            raise VerificationError(0, "the proof is malformed") from None
    if head_line(envelope, proof) != line:
        raise VerificationError(0, "the head's line is not written as keyvault's export is")
    if head.log_size and proof is None:
        raise VerificationError(0, "the proof that ties the head to the log was taken out")
    return _End(head, envelope.key_id, proof, _tied(head, proof, trusted) if proof else None)


def _tied(head: audit_pb2.ChainHead, proof: audit_pb2.LogProof, trusted: _Keys) -> Checkpoint:
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


def _head(record: Any, trusted: _Keys) -> tuple[audit_pb2.ChainHead, options_pb2.SignedEnvelope]:
    try:
        envelope = json_format.ParseDict(record, options_pb2.SignedEnvelope())
        payload = dsse.verify(envelope, dsse.CHAIN_HEAD, trusted)
        return audit_pb2.ChainHead.FromString(payload), envelope
    except json_format.ParseError:
        raise VerificationError(0, "the signed head is malformed") from None
    except dsse.SignatureError as error:
        raise VerificationError(0, f"the signed head is not to be believed: {error}") from None
    except DecodeError:
        raise VerificationError(0, "the signed head is malformed") from None
