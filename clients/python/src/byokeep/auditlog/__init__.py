"""Exported audit chains, checked offline: `verification` is what an auditor reads, `fast` the same
for long files, `view` the readable copy of an event."""

from byokeep.auditlog.fast import chunks_of, cores, verify_chunks
from byokeep.auditlog.verification import (
    FIRST_HASH,
    Older,
    OtherChainError,
    UnpinnedKeyError,
    VerificationError,
    Verified,
    event_line,
    head_line,
    leaf_of,
    link_hash,
    read_older,
    verify,
)
from byokeep.checkpoint import Checkpoint

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
    "read_older",
    "verify",
    "verify_chunks",
]
