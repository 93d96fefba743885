"""Denied calls go to the system chain, in transactions of their own, aggregated.

The first of a kind is written within a second, and one count a minute after it:
a flood neither fills a disk nor touches a tenant's chain.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault.event import SYSTEM
from services.keyvault.ledger import Ledger

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
_REPEAT_SECONDS = 60.0
_MAX_KINDS = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """What is counted together."""

    spiffe_id: str
    method: str
    reason: str


_OTHER = Kind("", "", "many kinds")


class Denials:
    """Counts denials and writes them to the system chain."""

    def __init__(self, ledger: Ledger) -> None:
        """Write to a ledger's system chain."""
        self._ledger = ledger
        self._counts: Counter[Kind] = Counter()
        self._written: dict[Kind, float] = {}

    def note(self, spiffe_id: str, method: str, reason: str) -> None:
        """Count one denial; never blocks, and holds a bounded number of kinds."""
        kind = Kind(spiffe_id[:256], method, reason)
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = _OTHER
        self._counts[kind] += 1

    async def tick(self) -> None:
        """Write what is due."""
        await self.flush(time.monotonic())

    async def flush(self, now: float, *, everything: bool = False) -> None:
        """Write kinds that are new, or were last written a minute ago."""
        for kind in [k for k, at in self._written.items() if now - at > _REPEAT_SECONDS]:
            del self._written[kind]
        due = [kind for kind in self._counts if everything or kind not in self._written]
        if not due:
            return
        counts = {kind: self._counts.pop(kind) for kind in due}
        events = [
            audit_pb2.AuditEvent(
                type=audit_pb2.AUDIT_EVENT_TYPE_DENIED,
                caller=kind.spiffe_id,
                method=kind.method,
                reason=kind.reason,
                count=count,
            )
            for kind, count in counts.items()
        ]
        try:
            await self._ledger.change(SYSTEM, lambda system: system.events.extend(events))
        except ByokeepError as error:
            logs.failure(log, "denials_not_written", error, kinds=len(counts))
            self._counts.update(counts)
            return
        self._written.update(dict.fromkeys(due, now))
