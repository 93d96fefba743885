"""The life of a key, merged from what keyvault recorded and what runners reported.

Recorded: an event of keyvault's hash chain. Reported: what a runner said of its child
process; nothing proves it. The merge is pure.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from byokeep.cli.base.output import message_dict, short
from byokeep.cli.base.text import clean, count
from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2

Source = Literal["recorded", "reported"]
_MILLISECOND = datetime.timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One point of a key's life. `data` is the message that says it, as proto JSON."""

    time: datetime.datetime
    source: Source
    title: str
    details: tuple[str, ...] = ()
    ends_badly: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the entries come to. `recorded` is False where keyvault's events are missing."""

    processes: int
    plaintext_ms: int
    alive: int
    end_unknown: int
    live_leases: int
    staged: int
    leased: int
    recorded: bool


@dataclass(slots=True)
class _Lease:
    lease_id: str
    leased: audit_pb2.AuditEvent | None = None
    ended: audit_pb2.AuditEvent | None = None
    use: key_pb2.KeyUse | None = None

    def report(self) -> lease_pb2.PlaintextReport | None:
        """Return what was said of the process, by whichever way it came."""
        if self.use is not None and self.use.HasField("open_time"):
            return lease_pb2.PlaintextReport(
                process_id=self.use.process_id,
                open_time=self.use.open_time,
                close_time=self.use.close_time if self.use.HasField("close_time") else None,
            )
        if self.ended is not None and self.ended.report.HasField("open_time"):
            return self.ended.report
        return None


def merge(
    events: Sequence[audit_pb2.AuditEvent] | None, uses: Iterable[key_pb2.KeyUse]
) -> tuple[list[Entry], Summary]:
    """Return the entries, oldest first, and their summary; `events` is None where unreadable."""
    recorded = list(events or ())
    leases = _leases(recorded, uses)
    placed: list[tuple[datetime.datetime, Entry]] = []
    for event in recorded:
        if event.lease_id not in leases:
            placed.append(_place(_recorded(event, None), None))
    for lease in leases.values():
        after: datetime.datetime | None = None
        for entry in _lease_entries(lease):
            # Three clocks: what follows within a lease must not be drawn before its cause.
            placed.append(_place(entry, after))
            after = placed[-1][0]
    placed.sort(key=lambda pair: pair[0])
    return [entry for _, entry in placed], _summary(recorded, leases, events is not None)


def _place(entry: Entry, after: datetime.datetime | None) -> tuple[datetime.datetime, Entry]:
    return (max(entry.time, after) if after else entry.time), entry


def _leases(
    events: Iterable[audit_pb2.AuditEvent], uses: Iterable[key_pb2.KeyUse]
) -> dict[str, _Lease]:
    leases: dict[str, _Lease] = {}
    for event in events:
        if event.type == audit_pb2.AUDIT_EVENT_TYPE_LEASED:
            leases.setdefault(event.lease_id, _Lease(event.lease_id)).leased = event
        elif event.type in _ENDS and event.lease_id:
            leases.setdefault(event.lease_id, _Lease(event.lease_id)).ended = event
    for use in uses:
        key = use.lease_id or use.attempt_id
        leases.setdefault(key, _Lease(key)).use = use
    return leases


def _lease_entries(lease: _Lease) -> Iterable[Entry]:
    if lease.leased is not None:
        yield _recorded(lease.leased, lease.use)
    yield from _reported(lease)
    if lease.ended is not None:
        yield _recorded(lease.ended, lease.use)


def _reported(lease: _Lease) -> Iterable[Entry]:
    report = lease.report()
    if report is None:
        return
    opened, process = _time(report.open_time), f"process {report.process_id}"
    data = {"use": message_dict(lease.use)} if lease.use else {"report": message_dict(report)}
    about: tuple[str, ...] = ()
    if lease.leased is None and lease.use is not None:
        about = (_attempt(lease.use.attempt_id, lease.use.review_id, lease.use),)
    yield Entry(
        opened,
        "reported",
        f"{process} opened the seal: plaintext of {clean(lease.lease_id)}",
        about,
        data={"type": "OPENED", **data},
    )
    if report.HasField("close_time"):
        closed = _time(report.close_time)
        state = _how(lease.use) if lease.use else ""
        yield Entry(
            closed,
            "reported",
            f"{process} is gone{f' ({state})' if state else ''};"
            f" plaintext existed {_milliseconds(report)} ms",
            ends_badly=state.startswith("FAILED"),
            data={"type": "CLOSED", **data},
        )


def _how(use: key_pb2.KeyUse) -> str:
    """Return how an attempt ended: its state, why, and what was unreachable."""
    parts = [
        clean(use.state).removeprefix("ATTEMPT_STATE_"),
        short(review_pb2.FailureReason, use.failure),
        short(key_pb2.UnreachableCause, use.unreachable_cause).lower().replace("_", " "),
    ]
    return ", ".join(part for part in parts if part)


def _recorded(event: audit_pb2.AuditEvent, use: key_pb2.KeyUse | None) -> Entry:
    kind = short(audit_pb2.AuditEventType, event.type)
    titled = _TITLES.get(event.type)
    title = titled(event) if titled else kind.lower().replace("_", " ")
    return Entry(
        _time(event.event_time),
        "recorded",
        title,
        tuple(_details(event, use)),
        event.type in _BAD
        or event.outcome
        in (lease_pb2.LEASE_OUTCOME_KEY_REJECTED, lease_pb2.LEASE_OUTCOME_CHILD_LOST),
        {"type": kind, "event": message_dict(event)},
    )


def _details(event: audit_pb2.AuditEvent, use: key_pb2.KeyUse | None) -> Iterable[str]:
    if event.type == audit_pb2.AUDIT_EVENT_TYPE_LEASED:
        yield _attempt(event.attempt_id, event.review_id, use)
        yield f"runner {clean(event.caller)}"
    elif event.type not in _ENDS:
        through = f", through {clean(event.caller)}" if event.caller else ""
        if event.actor or event.caller:
            yield f"for {clean(event.actor) or 'nobody named'}{through}"
    if event.shred:
        yield f"shredding of the backend: {clean(event.shred)}"
    if event.reason:
        yield f"reason: {clean(event.reason)}"


def _attempt(attempt_id: str, review_id: str, use: key_pb2.KeyUse | None) -> str:
    parts = [clean(review_id)] if review_id else []
    if use is not None and use.label:
        parts.append(clean(use.label))
    parts.append(f"attempt {clean(attempt_id)}")
    if use is not None:
        parts[-1] += f" (number {use.number})"
        parts.append(f"{count(use.calls_started, 'provider call')} started")
    return ", ".join(parts)


def _leased(event: audit_pb2.AuditEvent) -> str:
    purpose = short(grant_pb2.LeasePurpose, event.purpose).lower() or "an unknown purpose"
    lease = clean(event.lease_id)
    return f"v{event.key_version} leased to one process for {purpose}: {lease}"


def _released(event: audit_pb2.AuditEvent) -> str:
    outcome = short(lease_pb2.LeaseOutcome, event.outcome)
    after = f"; v{event.key_version} is {clean(event.detail)}" if event.detail else ""
    return f"lease {clean(event.lease_id)} released: {outcome}{after}"


_Title = Callable[[audit_pb2.AuditEvent], str]
_TITLES: Mapping[int, _Title] = {
    audit_pb2.AUDIT_EVENT_TYPE_STAGED: lambda e: f"v{e.key_version} sealed, opened once, stored",
    audit_pb2.AUDIT_EVENT_TYPE_PROMOTED: lambda e: f"v{e.key_version} is ACTIVE",
    audit_pb2.AUDIT_EVENT_TYPE_SUPERSEDED: lambda e: f"v{e.key_version} is SUPERSEDED",
    audit_pb2.AUDIT_EVENT_TYPE_ROLLED_BACK: lambda e: f"rolled back to v{e.key_version}",
    audit_pb2.AUDIT_EVENT_TYPE_REJECTED: lambda e: f"v{e.key_version} rejected by its provider",
    audit_pb2.AUDIT_EVENT_TYPE_REVOKED: lambda e: (
        f"v{e.key_version} is REVOKED" if e.key_version else "REVOKED as a whole"
    ),
    audit_pb2.AUDIT_EVENT_TYPE_DESTROYED: lambda e: (
        f"v{e.key_version} destroyed: tombstone" if e.key_version else "destroyed as a whole"
    ),
    audit_pb2.AUDIT_EVENT_TYPE_LEASED: _leased,
    audit_pb2.AUDIT_EVENT_TYPE_RELEASED: _released,
    audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED: lambda e: (
        f"lease {clean(e.lease_id)} ended without a release"
    ),
}
_ENDS = {audit_pb2.AUDIT_EVENT_TYPE_RELEASED, audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED}
_BAD = {
    audit_pb2.AUDIT_EVENT_TYPE_REJECTED,
    audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED,
    audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED,
}


def _summary(
    events: Iterable[audit_pb2.AuditEvent], leases: Mapping[str, _Lease], recorded: bool
) -> Summary:
    spent = processes = alive = end_unknown = 0
    for lease in leases.values():
        report = lease.report()
        if report is None:
            # Leased and not ended: its process lives, and has said nothing yet.
            alive += lease.leased is not None and lease.ended is None
            continue
        processes += 1
        if report.HasField("close_time"):
            spent += _milliseconds(report)
        elif lease.ended is None:
            alive += 1
        else:
            end_unknown += 1
    kinds = [event.type for event in events]
    return Summary(
        processes=processes,
        plaintext_ms=spent,
        alive=alive,
        end_unknown=end_unknown,
        live_leases=sum(
            lease.leased is not None and lease.ended is None for lease in leases.values()
        ),
        staged=kinds.count(audit_pb2.AUDIT_EVENT_TYPE_STAGED),
        leased=kinds.count(audit_pb2.AUDIT_EVENT_TYPE_LEASED),
        recorded=recorded,
    )


def _time(stamp: Any) -> datetime.datetime:
    value: datetime.datetime = stamp.ToDatetime(datetime.UTC)
    return value


def _milliseconds(report: lease_pb2.PlaintextReport) -> int:
    return round((_time(report.close_time) - _time(report.open_time)) / _MILLISECOND)
