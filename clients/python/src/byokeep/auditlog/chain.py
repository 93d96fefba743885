"""The chain of an export, link by link: what is wrong with the first one that is broken."""

from __future__ import annotations

import base64
import binascii
import datetime
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from byokeep.auditlog.lines import FIRST_HASH, event_line, link_hash
from byokeep.auditlog.outcome import OtherChainError, VerificationError
from byokeep.auditlog.runs import Run
from byokeep.auditlog.view import view
from byokeep.keyvault.v1 import audit_pb2

_PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED


class Chain:
    """The links seen so far."""

    def __init__(self, deployment: str, against: audit_pb2.ChainHead | None) -> None:
        """Start with no link. `deployment` is the one expected, or empty; `against` an older head
        that the chain must go through."""
        self.sequence = 0
        self.hash = FIRST_HASH
        self.name = ""
        self.deployment = deployment
        self.first_time: datetime.datetime | None = None
        self.last_time: datetime.datetime | None = None
        #: Events up to this one are not in the file, which retention must explain.
        self.dropped = 0
        self._before = FIRST_HASH
        self._stated: set[tuple[int, bytes]] = set()
        self._against = against

    def join(self, run: Run) -> bool:
        """Take a run if it goes on where the chain ends; False where something is wrong with it,
        which `add` names, line by line."""
        older = self._against
        if self.last_time is None:
            self._begin(run.start, run.start_hash)
        if (
            (run.start, run.start_hash) != (self.sequence, self.hash)
            or run.chain != (self.name or run.chain)
            or run.deployment != (self.deployment or run.deployment)
            or not self._is_of(older, run.chain, run.deployment)
            or (older is not None and run.asked not in (None, older.hash))
        ):
            return False
        self.name, self.deployment = run.chain, run.deployment
        self.sequence, self.hash = run.end, run.end_hash
        self.first_time, self.last_time = self.first_time or run.first_time, run.last_time
        self._stated.update(run.dropped)
        return True

    def add(self, line: str, record: Mapping[str, Any]) -> None:
        """Check the next link, naming what is wrong with it, and keep it."""
        expected = self.sequence + 1
        body, previous, stated = _link(expected, record)
        event, shown = _event(expected, body)
        if self.last_time is None and event.sequence:
            self._begin(event.sequence - 1, previous)
            expected = self.sequence + 1
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
        self._take(event, stated)

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

    def _begin(self, sequence: int, digest: bytes) -> None:
        if sequence > 0:
            # What retention dropped before is said by an event that must follow.
            self.dropped, self._before = sequence, digest
            self.sequence, self.hash = sequence, digest

    def _take(self, event: audit_pb2.AuditEvent, digest: bytes) -> None:
        self.sequence, self.hash = event.sequence, digest
        self.last_time = event.event_time.ToDatetime(datetime.UTC)
        self.first_time = self.first_time or self.last_time
        if event.type == _PRUNED:
            self._stated.add((event.pruned_sequence, event.pruned_hash))
        older = self._against
        if older is not None and older.sequence == event.sequence and older.hash != digest:
            raise VerificationError(event.sequence, "it is not the link that the older head names")

    def _check_dropped(self) -> None:
        older = self._against
        if older is not None and older.sequence == self.dropped != 0 and older.hash != self._before:
            raise VerificationError(self.dropped, "it is not the link that the older head names")
        if self.dropped and (self.dropped, self._before) not in self._stated:
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
        if not self._is_of(self._against, chain, deployment):
            raise OtherChainError

    @staticmethod
    def _is_of(older: audit_pb2.ChainHead | None, chain: str, deployment: str) -> bool:
        return older is None or (older.chain, older.deployment) == (chain, deployment)


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
