"""`byokeep audit`: export a chain, hold checkpoints, and verify an export offline."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from byokeep.cli.audit import verify as auditverify
from byokeep.cli.audit.files import read_older, target, unpinned
from byokeep.cli.base import checked
from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Session, command, examples, group, pages

if TYPE_CHECKING:
    from byokeep.common.v1.options_pb2 import SignedEnvelope
    from byokeep.keyvault.v1.audit_pb2 import ExportEventsResponse, GetCheckpointResponse

app = typer.Typer(no_args_is_help=True)
app.add_typer(auditverify.app)

_EXPORT_SECONDS = 600


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
    with target(output) as file:
        connection = session.connection
        request = audit_pb2.ExportEventsRequest(parent=chain or connection.parent, since_size=size)
        stream = connection.audit.ExportEvents(request, timeout=_EXPORT_SECONDS)
        count, head = _write(file, stream)
    if head.key_id not in session.profile.trust.audit_log_keys:
        session.out.warn(str(unpinned(head.key_id)))
    if output is None:
        return
    if session.out.as_json:
        session.out.json({"output": str(output), "events": count, "head": _stated(head)})
        return
    session.out.note(f"{count} events of {request.parent} in {output}", style="")
    session.out.note(f"verify it: byokeep audit verify {shlex.quote(str(output))}")


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

    if listed and save is not None:
        raise CliError("--list and --save exclude each other")
    if listed:
        _list_checkpoints(session)
        return
    if chain is not None:
        checked.chain(chain)
    if save is not None:
        with target(save) as file:
            answer, size = _checkpoint(session, chain)
            proof = answer.proof if answer.HasField("proof") else None
            file.write(auditlog.head_line(answer.head, proof) + "\n")
        _report_saved(session, save, size, answer.head)
    else:
        _print_note(session, _checkpoint(session, chain)[0].checkpoint)


def _checkpoint(session: Session, chain: str | None) -> tuple[GetCheckpointResponse, int]:
    """Return a checkpoint with a chain's place in it, and the log's size."""
    from byokeep.checkpoint import NoteError, open_checkpoint
    from byokeep.keyvault.v1 import audit_pb2

    connection, bundle = session.connection, session.profile.trust
    answer = connection.audit.GetCheckpoint(
        audit_pb2.GetCheckpointRequest(parent=chain or connection.parent)
    )
    if answer.head.key_id not in bundle.audit_log_keys:
        raise unpinned(answer.head.key_id)
    try:
        taken = open_checkpoint(answer.checkpoint, bundle.deployment, bundle.audit_log_keys)
    except NoteError as error:
        refused = str(error)
    else:
        return answer, taken.size
    raise CliError(f"keyvault's checkpoint: {refused}", "", Exit.INTEGRITY, "AUDIT_BROKEN")


def _report_saved(session: Session, save: Path, size: int, head: SignedEnvelope) -> None:
    if session.out.as_json:
        session.out.json({"output": str(save), "logSize": size, "head": _stated(head)})
        return
    session.out.note(f"the log at {size} heads, in {save}", style="")
    session.out.note(f"hold later exports against it: --since {save}, and verify --against {save}")


def _stated(head: SignedEnvelope) -> dict[str, object]:
    from byokeep.keyvault.v1.audit_pb2 import ChainHead

    return {**message_dict(ChainHead.FromString(head.payload)), "keyId": head.key_id}


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


def _write(file: TextIO, stream: Iterable[ExportEventsResponse]) -> tuple[int, SignedEnvelope]:
    """Write an export; return how many events it has, and its head."""
    from byokeep import auditlog

    count = 0
    for item in stream:
        if item.HasField("event"):
            count += 1
            file.write(auditlog.event_line(item.event) + "\n")
        elif item.HasField("head"):
            proof = item.proof if item.HasField("proof") else None
            file.write(auditlog.head_line(item.head, proof) + "\n")
            return count, item.head
    raise CliError("the export ended without a signed head", "repeat it", Exit.UNAVAILABLE)


def _held_size(session: Session, file: Path | None) -> int:
    older = read_older(file, session.profile.trust)
    if file is not None and older.checkpoint is None:
        raise CliError(f"{file} holds no checkpoint", "byokeep audit checkpoint --save FILE")
    return older.checkpoint.size if older.checkpoint else 0
