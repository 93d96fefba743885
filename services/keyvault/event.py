"""The audit chains: one per tenant, and `system`. They are evidence: keyvault derives no state
from them, but tells by their links whether one head of a tenant leads to another.

    hash = SHA-256("byokeep/audit/v1\\n" ‖ previous hash ‖ body)

over the body's exact bytes, which are never serialized again.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from byokeep.keyvault.v1 import audit_pb2

GENESIS: Final = bytes(32)
#: The name of the deployment's own row, and what its chain is called.
SYSTEM: Final = ""
_SYSTEM_CHAIN: Final = "system"
_TENANTS: Final = "tenants/"
_PREFIX: Final = b"byokeep/audit/v1\n"


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain is: how many operator's words there were (see `log`), the number of the last
    event, its hash."""

    generation: int = 0
    sequence: int = 0
    hash: bytes = GENESIS

    def covers(self, other: Head) -> bool:
        """Say whether it is as new as another head of the same chain."""
        return (self.generation, self.sequence) >= (other.generation, other.sequence)


@dataclass(frozen=True, slots=True)
class Link:
    """One event, ready to be stored."""

    sequence: int
    key_id: str
    body: bytes
    hash: bytes


def chain_of(name: str) -> str:
    """Return what the chain of a tenant's name is called."""
    return _TENANTS + name if name else _SYSTEM_CHAIN


def name_of(chain: str) -> str:
    """Return the tenant's name of a chain."""
    return "" if chain == _SYSTEM_CHAIN else chain.removeprefix(_TENANTS)


def link_hash(previous: bytes, body: bytes) -> bytes:
    """Return the hash of a link."""
    return hashlib.sha256(_PREFIX + previous + body).digest()


def links(
    name: str,
    head: Head,
    deployment: str,
    now: datetime.datetime,
    events: Sequence[audit_pb2.AuditEvent],
) -> list[Link]:
    """Number, stamp and chain events after a head."""
    sequence, previous, made, seconds = head.sequence, head.hash, [], now.timestamp()
    for event in events:
        sequence += 1
        event.deployment, event.chain, event.sequence = deployment, chain_of(name), sequence
        event.event_time.seconds = int(seconds)
        event.event_time.nanos = int(seconds % 1 * 1e6) * 1_000
        body = event.SerializeToString(deterministic=True)
        previous = link_hash(previous, body)
        made.append(Link(sequence, event.key_id, body, previous))
    return made


def content_digest(event: audit_pb2.AuditEvent) -> bytes:
    """Return what a lease knows its event by: all that it says but its place and time."""
    content = audit_pb2.AuditEvent()
    content.CopyFrom(event)
    for name in ("deployment", "chain", "sequence", "event_time", "state_digest"):
        content.ClearField(name)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()[:16]
