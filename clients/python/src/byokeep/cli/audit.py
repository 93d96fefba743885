"""`byokeep audit`: export a chain, hold checkpoints, and verify an export offline."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, TypeVar

import typer

from byokeep.cli import checked
from byokeep.cli.errors import CliError, Exit
from byokeep.cli.output import when
from byokeep.cli.session import Session, command, examples, group, pages
from byokeep.cli.text import clean

if TYPE_CHECKING:
    from byokeep.auditlog import Older, Verified
    from byokeep.keyvault.v1.audit_pb2 import ExportEventsResponse
    from byokeep.profile import TrustBundle

app = typer.Typer(no_args_is_help=True)

_EXPORT_SECONDS = 600
_RECORD = re.compile(r'\s*\{\s*"(event|head)"|byokeep/.+/audit$')
_T = TypeVar("_T")


@app.callback()
@group
def audit() -> None:
    """The audit log: a hash chain for each tenant, tied to one log with signed checkpoints."""


@app.command(
    epilog=examples(
        "byokeep audit export -o acme.jsonl",
        "byokeep audit export -o acme.jsonl --since last-month.jsonl",
        "byokeep audit export --chain system > system.jsonl",
    )
)
@command()
def export(
    session: Session,
    chain: Annotated[
        str | None,
        typer.Option(metavar="CHAIN", help="tenants/NAME or system; default: the tenant's."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: standard output."),
    ] = None,
    since: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A checkpoint or export that you hold: prove that the log only grew since.",
        ),
    ] = None,
) -> None:
    """Write a chain as JSON Lines: each event with its hash, then the signed head with its proof.

    A role on the operator's side, not a tenant's: keyvault's caller class auditor reads the
    chains of every tenant.
    """
    from byokeep.keyvault.v1 import audit_pb2

    if chain is not None:
        checked.chain(chain)
    size = _held_size(session, since)
    connection = session.connection
    request = audit_pb2.ExportEventsRequest(parent=chain or connection.parent, since_size=size)
    stream = connection.audit.ExportEvents(request, timeout=_EXPORT_SECONDS)
    with _target(output) as file:
        count = _write(file, stream)
    if output is not None:
        session.out.note(f"{count} events of {request.parent} in {output}", style="")
        session.out.note(f"verify it: byokeep audit verify {output}")


@app.command(
    epilog=examples(
        "byokeep audit checkpoint --save acme-2026-11.json", "byokeep audit checkpoint --list"
    )
)
@command()
def checkpoint(
    session: Session,
    chain: Annotated[
        str | None,
        typer.Option(metavar="CHAIN", help="tenants/NAME or system; default: the tenant's."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep it with the chain's place in it, for --against."),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List those that keyvault signed, newest first.")
    ] = False,
) -> None:
    """Print a signed checkpoint of the log of all chains' heads (C2SP tlog-checkpoint).

    Whoever holds one can show later that the log was not rewritten. With --save it is kept
    together with the chain's signed head: that also shows a chain whose end was cut off.
    """
    from byokeep import auditlog
    from byokeep.checkpoint import NoteError, open_checkpoint
    from byokeep.keyvault.v1 import audit_pb2

    if listed and save is not None:
        raise CliError("--list and --save exclude each other")
    if listed:
        _list_checkpoints(session)
        return
    if chain is not None:
        checked.chain(chain)
    connection, bundle = session.connection, session.profile.trust
    answer = connection.audit.GetCheckpoint(
        audit_pb2.GetCheckpointRequest(parent=chain or connection.parent)
    )
    try:
        taken = open_checkpoint(answer.checkpoint, bundle.deployment, bundle.audit_log_keys)
    except NoteError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        raise CliError(f"keyvault's checkpoint: {refused}", "", Exit.INTEGRITY, "AUDIT_BROKEN")
    if save is None:
        _print_note(session, answer.checkpoint)
        return
    proof = answer.proof if answer.HasField("proof") else None
    with _target(save) as file:
        file.write(auditlog.head_line(answer.head, proof) + "\n")
    session.out.note(f"the log at {taken.size} heads, in {save}", style="")
    session.out.note(f"hold later exports against it: --since {save}, and verify --against {save}")


def _list_checkpoints(session: Session) -> None:
    from byokeep.keyvault.v1 import audit_pb2

    request = audit_pb2.ListCheckpointsRequest()
    stub = session.connection.audit
    for note in pages(stub.ListCheckpoints, request, "checkpoints"):
        _print_note(session, note)


def _print_note(session: Session, note: str) -> None:
    # To the byte, so that the output can be kept and held against later exports.
    if session.out.as_json:
        session.out.json_line({"checkpoint": note})
    else:
        sys.stdout.write(note)


@app.command(
    epilog=examples(
        "byokeep audit verify acme.jsonl",
        "byokeep audit verify acme.jsonl --trust trust.json --against last-month.jsonl",
    )
)
@command()
def verify(
    session: Session,
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", show_default=False, help="An export; - is stdin.")
    ],
    trust: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Trust bundle; default: that of the profile."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An older export, saved checkpoint or signed note: this one continues it.",
        ),
    ] = None,
) -> None:
    """Verify an export offline: no link altered, removed or cut off; name the first broken one.

    Exits 6 where it does not hold, 2 where FILE is not an export at all. Without --against
    the newest events could be missing, in a file that is older than it seems: keep exports,
    their last lines, or checkpoints.
    """
    from byokeep import auditlog
    from byokeep.profile import load_trust

    bundle = load_trust(trust) if trust else session.profile.trust
    if not bundle.audit_log_keys:
        raise CliError("the trust bundle pins no audit log key")
    try:
        older = _older(against, bundle)
        result = _read(
            file,
            lambda lines: auditlog.verify(
                lines,
                bundle.audit_log_keys,
                deployment=bundle.deployment,
                against=older.head,
                since=older.checkpoint,
            ),
        )
    except auditlog.VerificationError as error:
        broken = error
    else:
        _report(session, result, bundle, older)
        return
    raise CliError(
        f"the audit chain does not hold: {broken}",
        "keep this file; compare with older exports, and with another auditor's",
        Exit.INTEGRITY,
        "AUDIT_BROKEN",
        metadata={"sequence": str(broken.sequence), "what": broken.what},
    )


def _write(file: TextIO, stream: Iterable[ExportEventsResponse]) -> int:
    from byokeep import auditlog

    count, ended = 0, False
    for item in stream:
        if item.HasField("event"):
            count += 1
            file.write(auditlog.event_line(item.event) + "\n")
        elif item.HasField("head"):
            ended = True
            proof = item.proof if item.HasField("proof") else None
            file.write(auditlog.head_line(item.head, proof) + "\n")
    if not ended:
        raise CliError("the export ended without a signed head", "repeat it", Exit.UNAVAILABLE)
    return count


@contextmanager
def _target(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    # A file that is there is whole: an export that breaks off leaves the older one alone.
    scratch = output.with_name(f".{output.name}.part")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            yield file
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)


def _lines(file: str) -> Iterator[str]:
    # Bytes, with one end of line only: a byte that becomes another one is a change.
    if file == "-":
        yield from (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
        return
    with Path(file).open("rb") as opened:
        yield from (line.decode("utf-8", "replace") for line in opened)


def _older(file: Path | None, bundle: TrustBundle) -> Older:
    from byokeep import auditlog

    if file is None:
        return auditlog.Older()
    trusted = bundle.audit_log_keys
    return _read(str(file), lambda lines: auditlog.read_older(lines, trusted, bundle.deployment))


def _held_size(session: Session, file: Path | None) -> int:
    older = _older(file, session.profile.trust)
    if file is not None and older.checkpoint is None:
        raise CliError(f"{file} holds no checkpoint", "byokeep audit checkpoint --save FILE")
    return older.checkpoint.size if older.checkpoint else 0


class _Export:
    """Lines of a file, and whether any of them is of an export, whole or not."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._found = False

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self._found = self._found or bool(_RECORD.match(line))
            yield line

    def recognised(self) -> bool:
        # One line that is altered must not make an export pass for another file.
        return self._found or any(map(_RECORD.match, self._lines))


def _read(file: str, read: Callable[[Iterable[str]], _T]) -> _T:
    from byokeep.auditlog import VerificationError

    lines = _Export(_lines(file))
    try:
        return read(lines)
    except VerificationError:
        if lines.recognised():
            raise
    name = "standard input" if file == "-" else file
    raise CliError(f"{name} is not an audit export", "byokeep audit export -o FILE writes one")


def _report(session: Session, result: Verified, bundle: TrustBundle, older: Older) -> None:
    if session.out.as_json:
        session.out.json(_as_json(result, older))
        return
    head, log = result.head, result.checkpoint
    out = session.out
    out.print(
        f"the audit chain holds: {clean(result.chain)} of {clean(result.deployment)}", "green"
    )
    span = ""
    if result.first_time and result.last_time:
        first, last = result.first_time.astimezone(), result.last_time.astimezone()
        span = f", {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}"
    out.print(f"events   {result.count}, without a gap{span}")
    if result.dropped:
        out.print(f"dropped  events up to link {result.dropped}: retention, as the chain states")
    out.print(f"head     {head.hash.hex()}")
    out.print(
        f"signed   {when(head.sign_time)} by {clean(result.signed_by)}, pinned for"
        f" {bundle.deployment}"
    )
    if log is None:
        out.print("log      not in it: the export is not tied to a checkpoint")
    else:
        out.print(f"log      the head is in the signed log of {log.size} heads")
    for line in _compared(result, older):
        out.print(line)


def _compared(result: Verified, older: Older) -> Iterator[str]:
    if older.head is None and older.checkpoint is None:
        yield "newest?  not shown: hold it --against an older export or checkpoint"
    if older.head is not None and older.head.sequence >= result.dropped:
        yield f"contains the older head at link {older.head.sequence}: nothing before it was cut"
    elif older.head is not None:
        yield f"the older head at link {older.head.sequence} was dropped by retention"
    if result.since:
        yield f"the log grew from the older checkpoint of {result.since} heads: not rewritten"
    elif older.checkpoint is not None:
        yield "the logs were not compared: that takes an export made with --since"


def _as_json(result: Verified, older: Older) -> dict[str, object]:
    log = result.checkpoint
    return {
        "verified": True,
        "deployment": result.deployment,
        "chain": result.chain,
        "events": result.count,
        "dropped": result.dropped,
        "firstTime": result.first_time.isoformat() if result.first_time else None,
        "lastTime": result.last_time.isoformat() if result.last_time else None,
        "headHash": result.head.hash.hex(),
        "signTime": result.head.sign_time.ToJsonString(),
        "signedBy": result.signed_by,
        "logSize": log.size if log else None,
        "logRoot": log.root.hex() if log else None,
        "against": older.head.sequence if older.head else None,
        "since": result.since or None,
    }
