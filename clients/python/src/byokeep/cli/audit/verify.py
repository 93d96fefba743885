"""`byokeep audit verify`: an export checked offline, and what that showed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byokeep.cli.audit.files import read, read_older, unpinned
from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.output import moment, when
from byokeep.cli.base.session import Session, command, examples
from byokeep.cli.base.text import clean

if TYPE_CHECKING:
    from byokeep.auditlog import Older, Verified
    from byokeep.profile import TrustBundle

app = typer.Typer()


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

    Exits 6 where it does not hold or can't be verified, 2 where FILE is not an export at all.
    Long files are checked by as many processes as there are cores. Without --against
    the newest events could be missing, in a file that is older than it seems: keep exports, their
    last lines, or checkpoints.
    """
    from byokeep import auditlog
    from byokeep.profile import load_trust

    bundle = load_trust(trust) if trust else session.profile.trust
    if not bundle.audit_log_keys:
        raise CliError("the trust bundle pins no audit log key")
    try:
        older = read_older(against, bundle)
        result = read(
            file,
            lambda chunks: auditlog.verify_chunks(
                chunks,
                bundle.audit_log_keys,
                deployment=bundle.deployment,
                against=older.head,
                since=older.checkpoint,
                processes=auditlog.cores(),
            ),
        )
    except auditlog.UnpinnedKeyError as error:
        raise unpinned(error.key_id) from None
    except auditlog.OtherChainError:
        raise _unlike(file, against, older) from None
    except auditlog.VerificationError as error:
        broken = error
    else:
        _report(session, result, bundle, older)
        return
    raise CliError(
        f"the audit chain in {_named(file)} does not hold: {broken}",
        (f"is {against} the older of the two? " if against else "")
        + "keep this file; compare with older exports, and with another auditor's",
        Exit.INTEGRITY,
        "AUDIT_BROKEN",
        metadata={"sequence": str(broken.sequence), "what": broken.what},
    )


def _named(file: str) -> str:
    return "standard input" if file == "-" else file


def _unlike(file: str, against: Path | None, older: Older) -> CliError:
    """Return the error for two files of which neither says anything of the other."""
    whose = f"{clean(older.head.chain)} of {clean(older.head.deployment)}" if older.head else ""
    return CliError(
        f"{_named(file)} can't be held against {against}: that is of {whose}, and this is of"
        " another chain or deployment",
        "take an older export or checkpoint of the same chain",
        Exit.INTEGRITY,
        "AUDIT_BROKEN",
    )


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
        span = f", {moment(result.first_time)} to {moment(result.last_time)}"
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
