"""The end of an export: its signed head, and the proof that ties that to the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from byokeep import checkpoint, dsse, merkle
from byokeep.auditlog.lines import head_line
from byokeep.auditlog.outcome import Keys, UnpinnedKeyError, VerificationError
from byokeep.auditlog.view import view
from byokeep.checkpoint import Checkpoint, NoteError
from byokeep.common.v1 import options_pb2
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class End:
    """The last line of an export, verified."""

    head: audit_pb2.ChainHead
    signed_by: str
    proof: audit_pb2.LogProof | None
    checkpoint: Checkpoint | None


def leaf_of(head: audit_pb2.ChainHead, blind: bytes) -> bytes:
    """Return the hash of the leaf that a chain's head has in the log."""
    return merkle.leaf_hash(fields(blind, head.chain, head.sequence, head.hash))


def end_of(line: str, record: Mapping[str, Any], trusted: Keys) -> End:
    """Verify the last line of an export. Raises VerificationError."""
    head, envelope = _head(record["head"], trusted)
    proof = None
    if "proof" in record:
        proof = _parsed(record["proof"], audit_pb2.LogProof(), "proof")
    if head_line(envelope, proof) != line:
        raise VerificationError(0, "the head's line is not written as keyvault's export is")
    if head.log_size and proof is None:
        raise VerificationError(0, "the proof that ties the head to the log was taken out")
    return End(head, envelope.key_id, proof, _tied(head, proof, trusted) if proof else None)


def since_older(end: End, older: Checkpoint | None, *, required: bool) -> int:
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
