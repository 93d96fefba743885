"""`byokeep key trail`: the life of a key as a vertical timeline."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from byokeep.cli.base.session import Session, pages
from byokeep.cli.base.text import clean, count
from byokeep.cli.keys.history import Entry, Summary, merge
from byokeep.cli.keys.ref import key_id, key_state, label_of
from byokeep.keyvault.v1 import audit_pb2
from byokeep.orchestrator.v1 import key_pb2

if TYPE_CHECKING:
    from rich.text import Text

    from byokeep.orchestrator.v1.key_pb2 import Key

_STYLES = {"recorded": "green", "reported": "yellow"}
_GLYPHS = {"recorded": ("●", "*"), "reported": ("○", "o")}


def show(session: Session, key: Key) -> None:
    """Print a key's life; with JSON, a line for each entry and one for the summary."""
    events = _events(session, key_id(key))
    entries, summary = merge(events, _uses(session, key))
    out = session.out
    if out.as_json:
        for entry in entries:
            stamp = entry.time.isoformat().replace("+00:00", "Z")
            out.json_line({"time": stamp, "source": entry.source, **entry.data})
        out.json_line({"summary": dataclasses.asdict(summary)})
        return
    kept = key.provider_key
    out.print(
        f"{key_id(key)}  {label_of(key)}  {clean(kept.hint)}  {key_state(key)}".rstrip(),
        style="bold",
    )
    for lead, line, rest in _timeline(entries, ascii_only=not out.unicode):
        out.hanging(lead, line, rest)
    for line in _closing(summary):
        out.print(line)


def _events(session: Session, identifier: str) -> Sequence[audit_pb2.AuditEvent] | None:
    import grpc

    from byokeep.profile import ProfileError

    connection = session.connection
    request = audit_pb2.ListEventsRequest(
        parent=connection.parent, key_id=identifier, page_size=1000
    )
    try:
        return list(pages(connection.audit.ListEvents, request, "events"))
    except ProfileError:
        why = "the profile has no keyvault address"
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.PERMISSION_DENIED:
            raise
        why = "this identity is not an auditor at keyvault"
    session.out.warn(f"keyvault's recorded events are missing: {why}; only reports are shown")
    return None


def _uses(session: Session, key: Key) -> Iterable[key_pb2.KeyUse]:
    request = key_pb2.ListKeyUsesRequest(name=key.provider_key.name, page_size=500)
    return pages(session.connection.keys.ListKeyUses, request, "uses")


def _timeline(entries: Sequence[Entry], *, ascii_only: bool) -> Iterable[tuple[Text, Text, Text]]:
    """Yield each line's beginning, what follows it, and the beginning of where it is wrapped;
    details are under their entry's title."""
    from rich.text import Text

    bar = "|" if ascii_only else "│"
    day: datetime.date | None = None
    for number, entry in enumerate(entries):
        local = entry.time.astimezone()
        if local.date() != day:
            day = local.date()
            margin = Text(f"{bar if number else ' '} ", "dim")
            yield margin, Text(day.isoformat(), "dim"), margin
        lead = Text(_GLYPHS[entry.source][ascii_only], style=_STYLES[entry.source])
        lead.append(f" {local:%H:%M:%S}.{local.microsecond // 1000:03d} ", style="dim")
        lead.append(f" {entry.source}  ", style=_STYLES[entry.source])
        gap = Text(f"{bar if number < len(entries) - 1 else ' ':<{lead.cell_len}}", "dim")
        yield lead, Text(entry.title, "bold red" if entry.ends_badly else "default"), gap
        for detail in entry.details:
            yield gap, Text(detail, "dim"), gap


def _closing(summary: Summary) -> Iterable[Text]:
    from rich.text import Text

    processes = count(summary.processes, "process", "processes")
    line = Text()
    line.append(f"plaintext existed in {processes}")
    line.append(f" for {summary.plaintext_ms} ms in all; ")
    if summary.alive:
        line.append(f"{summary.alive} may be alive", style="bold red")
    else:
        line.append("none is alive", style="green")
    if summary.end_unknown:
        line.append(f" ({summary.end_unknown} without a reported end)", style="yellow")
    live = str(summary.live_leases) if summary.recorded else "unknown"
    line.append(f"; leases live now: {live}", style="bold red" if summary.live_leases else "")
    yield Text()
    yield line
    if summary.recorded:
        yield Text(
            f"keyvault itself opened it {count(summary.staged + summary.leased, 'time')}:"
            f" {summary.staged} to store it, {summary.leased} to lease it."
            " Recorded: keyvault's hash chain (byokeep audit export, then verify)."
            " Reported: the runner's word.",
            style="dim",
        )
