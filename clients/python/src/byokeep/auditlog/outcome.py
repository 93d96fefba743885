"""What a verification takes and gives."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from byokeep.checkpoint import Checkpoint
from byokeep.keyvault.v1 import audit_pb2

#: The audit log keys that a verifier pins, by key id.
Keys = Mapping[str, Ed25519PublicKey]


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
