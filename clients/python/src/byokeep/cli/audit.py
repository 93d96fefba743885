"""`byokeep audit`: export a chain, and verify an export offline."""

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
from byokeep.cli.session import Session, command, examples, group
from byokeep.cli.text import clean

if TYPE_CHECKING:
    from byokeep.auditlog import Verified
    from byokeep.keyvault.v1.audit_pb2 import ExportEventsResponse
    from byokeep.profile import TrustBundle

app = typer.Typer(no_args_is_help=True)

_EXPORT_SECONDS = 600
_RECORD = re.compile(r'\s*\{\s*"(event|head)"')
_T = TypeVar("_T")


@app.callback()
@group
def audit() -> None:
    """The audit log: a hash chain for each tenant, signed at its head."""


@app.command(
    epilog=examples(
        "byokeep audit export -o acme.jsonl", "byokeep audit export --chain system > system.jsonl"
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
) -> None:
    """Write a chain as JSON Lines: each event with its hash, then the signed head.

    A role on the operator's side, not a tenant's: keyvault's caller class auditor reads the
    chains of every tenant.
    """
    from byokeep.keyvault.v1 import audit_pb2

    if chain is not None:
        checked.chain(chain)
    connection = session.connection
    request = audit_pb2.ExportEventsRequest(parent=chain or connection.parent)
    stream = connection.audit.ExportEvents(request, timeout=_EXPORT_SECONDS)
    with _target(output) as file:
        count = _write(file, stream)
    if output is not None:
        session.out.note(f"{count} events of {request.parent} in {output}", style="")
        session.out.note(f"verify it: byokeep audit verify {output}")


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
            metavar="FILE", help="An older export, or its head: this one must contain it."
        ),
    ] = None,
) -> None:
    """Verify an export offline: no link altered, removed or cut off; name the first broken one.

    Exits 6 where it does not hold, 2 where FILE is not an export at all. Without --against,
    the newest events could be missing together with the head that counted them: keep old
    exports, or their last lines.
    """
    from byokeep import auditlog
    from byokeep.profile import load_trust

    bundle = load_trust(trust) if trust else session.profile.trust
    if not bundle.audit_log_keys:
        raise CliError("the trust bundle pins no audit log key")
    try:
        older = None
        if against is not None:
            older = _read(
                str(against), lambda lines: auditlog.read_head(lines, bundle.audit_log_keys)
            )
        result = _read(
            file,
            lambda lines: auditlog.verify(
                lines, bundle.audit_log_keys, deployment=bundle.deployment, against=older
            ),
        )
    except auditlog.VerificationError as error:
        broken = error
    else:
        _report(session, result, bundle, older.sequence if older else None)
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
            file.write(auditlog.head_line(item.head) + "\n")
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
    if file == "-":
        yield from sys.stdin
        return
    with Path(file).open(encoding="utf-8", errors="replace") as opened:
        yield from opened


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


def _report(session: Session, result: Verified, bundle: TrustBundle, older: int | None) -> None:
    head = result.head
    if session.out.as_json:
        session.out.json(
            {
                "verified": True,
                "deployment": result.deployment,
                "chain": result.chain,
                "events": result.count,
                "firstTime": result.first_time.isoformat() if result.first_time else None,
                "lastTime": result.last_time.isoformat() if result.last_time else None,
                "headHash": head.hash.hex(),
                "signTime": head.sign_time.ToJsonString(),
                "signedBy": result.signed_by,
                "against": older,
            }
        )
        return
    out = session.out
    out.print(
        f"the audit chain holds: {clean(result.chain)} of {clean(result.deployment)}", "green"
    )
    span = ""
    if result.first_time and result.last_time:
        first, last = result.first_time.astimezone(), result.last_time.astimezone()
        span = f", {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}"
    out.print(f"events   {result.count}, without a gap{span}")
    out.print(f"head     {head.hash.hex()}")
    out.print(
        f"signed   {when(head.sign_time)} by {clean(result.signed_by)}, pinned for"
        f" {bundle.deployment}"
    )
    if older is not None:
        out.print(f"contains the older head at link {older}")
