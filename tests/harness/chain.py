"""A hash chain as keyvault writes one, in memory: for fakes and for tests of the verifier."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field
from typing import Any

from byokeep import auditlog, checkpoint, dsse, ids
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tests.harness import merkle

START = datetime.datetime(2026, 3, 1, 12, 0, tzinfo=datetime.UTC)


@dataclass
class SigningKey:
    """An Ed25519 key with its id."""

    prefix: str
    private: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> Ed25519PublicKey:
        return self.private.public_key()

    @property
    def key_id(self) -> str:
        return ids.public_key_id(self.prefix, self.public.public_bytes_raw())


@dataclass
class Log:
    """A log of heads, among them those of other chains."""

    leaves: list[bytes] = field(default_factory=list)

    def others(self, count: int) -> None:
        """Take in heads of chains that nobody here knows."""
        self.leaves += [hashlib.sha256(b"other %d" % len(self.leaves)).digest()] * count

    def checkpoint(self, deployment: str, key: SigningKey) -> str:
        """Return the signed note of the log as it is."""
        origin = checkpoint.origin_of(deployment)
        root = merkle.mth(self.leaves)
        text = checkpoint.Checkpoint(origin, len(self.leaves), root).text()
        public = key.public.public_bytes_raw()
        return checkpoint.signed(text, origin, public, key.private.sign(text.encode()))


@dataclass
class Chain:
    """A chain that grows by `add`."""

    name: str = "tenants/demo"
    deployment: str = "test"
    key: SigningKey = field(default_factory=lambda: SigningKey("alk"))
    events: list[audit_pb2.AuditEvent] = field(default_factory=list)
    links: list[audit_pb2.ChainedEvent] = field(default_factory=list)
    log: Log = field(default_factory=Log)

    def add(self, kind: str, at: datetime.datetime | None = None, **values: Any) -> None:
        """Append an event; `kind` is a short name of AuditEventType."""
        event = audit_pb2.AuditEvent(
            deployment=self.deployment,
            chain=self.name,
            sequence=len(self.events) + 1,
            type=audit_pb2.AuditEventType.Value(f"AUDIT_EVENT_TYPE_{kind}"),
            **values,
        )
        event.event_time.FromDatetime(at or START + datetime.timedelta(seconds=len(self.events)))
        self.append(event)

    def append(self, event: audit_pb2.AuditEvent) -> None:
        previous = self.links[-1].hash if self.links else auditlog.FIRST_HASH
        body = event.SerializeToString()
        self.events.append(event)
        self.links.append(
            audit_pb2.ChainedEvent(
                body=body, previous_hash=previous, hash=auditlog.link_hash(previous, body)
            )
        )

    def head(self, **changes: Any) -> options_pb2.SignedEnvelope:
        """Return the signed head, with fields changed as a test needs."""
        head = audit_pb2.ChainHead(
            deployment=self.deployment,
            chain=self.name,
            sequence=len(self.links),
            hash=self.links[-1].hash if self.links else auditlog.FIRST_HASH,
        )
        head.sign_time.FromDatetime(START + datetime.timedelta(hours=1))
        head.MergeFrom(audit_pb2.ChainHead(**changes))
        payload = head.SerializeToString()
        return dsse.sign(dsse.CHAIN_HEAD, payload, self.key.key_id, self.key.private)

    def proven(self, since: int = 0) -> tuple[options_pb2.SignedEnvelope, audit_pb2.LogProof]:
        """Take the head into the log; return it, signed, with its proof."""
        index = len(self.log.leaves)
        blind = hashlib.sha256(b"blind %d" % index).digest()
        bare = audit_pb2.ChainHead.FromString(self.head().payload)
        self.log.leaves.append(auditlog.leaf_of(bare, blind))
        return self.head(log_size=index + 1), self.proof(index, blind, since)

    def proof(self, index: int, blind: bytes, since: int = 0) -> audit_pb2.LogProof:
        """Return the proof of a leaf in the log as it is."""
        leaves = self.log.leaves
        return audit_pb2.LogProof(
            leaf_index=index,
            leaf_blind=blind,
            inclusion=merkle.path(index, leaves),
            checkpoint=self.log.checkpoint(self.deployment, self.key),
            since_size=since,
            since_root=merkle.mth(leaves[:since]) if since else b"",
            consistency=merkle.proof(since, leaves),
        )

    def export(self, since: int = 0) -> list[str]:
        """Return the lines of an export."""
        return [
            *(auditlog.event_line(link) for link in self.links),
            auditlog.head_line(*self.proven(since)) if self.links else self.empty_line(),
        ]

    def empty_line(self) -> str:
        """Return the last line for a chain that is in no log."""
        return auditlog.head_line(self.head())
