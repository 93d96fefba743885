"""Checks an exported audit chain offline, against keys that the verifier pins.

An export is JSON Lines: `{"event": {"body", "previous_hash", "hash"}, "view": {…}}`
for each link (base64; `view` is the decoded body, for people), then `{"head":
{"payloadType", "payload", "keyId", "signature"}, "proof": {…}}`, where the proof ties
the head to a checkpoint of the log of all chains' heads. Chain, head and proof are
described in protos/byokeep/keyvault/v1/audit.proto. An export has one spelling: a
byte that differs is a change, whatever it means.

To be read in this order: `verify_chunks` here, `chain` (each link), `runs` (the same for
many links, fast), `end` (head, proof, checkpoints), `view` and `lines` (the spelling).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from byokeep import checkpoint
from byokeep.auditlog.chain import Chain
from byokeep.auditlog.end import End, end_of, leaf_of, since_older
from byokeep.auditlog.lines import FIRST_HASH, START, event_line, head_line, link_hash
from byokeep.auditlog.outcome import (
    Keys,
    Older,
    OtherChainError,
    UnpinnedKeyError,
    VerificationError,
    Verified,
)
from byokeep.auditlog.runs import chunks_of, cores, lines_of, overlong, runs_of
from byokeep.checkpoint import Checkpoint, NoteError
from byokeep.keyvault.v1 import audit_pb2

__all__ = [
    "FIRST_HASH",
    "Checkpoint",
    "Older",
    "OtherChainError",
    "UnpinnedKeyError",
    "VerificationError",
    "Verified",
    "chunks_of",
    "cores",
    "event_line",
    "head_line",
    "leaf_of",
    "link_hash",
    "read_head",
    "read_older",
    "verify",
    "verify_chunks",
]

_PACKED = 1000
_TOO_LONG = "is longer than 16 MiB"


def verify(
    lines: Iterable[str],
    trusted: Keys,
    *,
    deployment: str = "",
    against: audit_pb2.ChainHead | None = None,
    since: Checkpoint | None = None,
) -> Verified:
    """Verify an export that is given as lines; otherwise as `verify_chunks`."""
    return verify_chunks(
        _packed(lines), trusted, deployment=deployment, against=against, since=since
    )


def verify_chunks(
    chunks: Iterable[bytes],
    trusted: Keys,
    *,
    deployment: str = "",
    against: audit_pb2.ChainHead | None = None,
    since: Checkpoint | None = None,
    processes: int = 1,
) -> Verified:
    """Verify an export: every link, no gap, one chain, the signed head at its end, and its place
    in the log.

    `chunks` are whole lines each, as `chunks_of` reads them from a file. `deployment` is the
    one expected; empty: any. `against` is an older head that the verifier holds: the chain must
    go through it. `since` is an older checkpoint: the log must have grown from it, and the
    export must not be older than it is. Of a long file `processes` of them check the links,
    forked; the verdict is the same.

    Raises:
        VerificationError: with the first link that is broken, and what is wrong with it.
        OtherChainError: `against` is of another chain or deployment.
        UnpinnedKeyError: nothing is broken up to the head, which no pinned key signed.
    """
    chain = Chain(deployment, against)
    end = _to_end(chain, chunks, trusted, against.sequence if against else 0, processes)
    if end is None:
        raise VerificationError(
            0, f"it ends after link {chain.sequence} without a signed head: it was cut"
        )
    chain.check_end(end.head)
    return Verified(
        deployment=end.head.deployment,
        chain=end.head.chain,
        count=chain.sequence - chain.dropped,
        first_time=chain.first_time,
        last_time=chain.last_time,
        head=end.head,
        signed_by=end.signed_by,
        dropped=chain.dropped,
        checkpoint=end.checkpoint,
        since=since_older(end, since, required=not chain.passed(against)),
    )


def read_older(lines: Iterable[str], trusted: Keys, deployment: str) -> Older:
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
    note = ""
    for line in _chained(first, rest):
        note += line
        if overlong(note):
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


def _to_end(
    chain: Chain, chunks: Iterable[bytes], trusted: Keys, ask: int, processes: int
) -> End | None:
    """Take every link into the chain, in runs where that can be; return the file's last line."""
    end: End | None = None
    before = 0
    for chunk, run in runs_of(chunks, ask, processes):
        count = chunk.removesuffix(b"\n").count(b"\n") + 1
        joined = run.lines if end is None and run is not None and chain.join(run) else 0
        rest = lines_of(chunk)[joined:] if joined < count else []
        for number, line in enumerate(rest, before + joined + 1):
            if not line:
                continue
            if end is not None:
                raise VerificationError(0, "there is something after the signed head")
            record = _record(number, line)
            if "head" in record:
                end = end_of(line, record, trusted)
            else:
                chain.add(line, record)
        before += count
    return end


def _packed(lines: Iterable[str]) -> Iterator[bytes]:
    coming = iter(lines)
    while some := list(islice(coming, _PACKED)):
        text = "".join(line.removesuffix("\n") + "\n" for line in some)
        yield text.encode("utf-8", "surrogatepass")


def _chained(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _record(number: int, line: str) -> dict[str, Any]:
    if overlong(line):
        raise VerificationError(0, f"line {number} {_TOO_LONG}")
    try:
        record = json.loads(line)
    # RecursionError: brackets in brackets, a thousand deep.
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not ("event" in record) ^ ("head" in record):
        raise VerificationError(0, f"line {number} is neither an event nor a head")
    return record


def _last(lines: Iterable[str], trusted: Keys) -> End:
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n")
        if not text or text.startswith(START):
            continue
        record = _record(number, text)
        if "head" in record:
            return end_of(text, record, trusted)
    raise VerificationError(0, "the older file has no signed head")
