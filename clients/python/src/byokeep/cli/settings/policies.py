"""`byokeep policy`: what is done with a tenant's reviews by themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Session, command, examples, group
from byokeep.cli.settings import shared as settings
from byokeep.orchestrator.v1 import settings_pb2

app = typer.Typer(no_args_is_help=True)

_MEANING = {
    "keep_superseded": (
        "--keep-superseded",
        "reviews go on though a newer commit of their pull request is submitted",
        "a newer commit of a pull request ends its older reviews",
    ),
    "retry_ambiguous": (
        "--retry-ambiguous",
        "a call whose answer was lost is made again, and may be billed twice",
        "a call whose answer was lost is not made again by itself",
    ),
}


@app.callback()
@group
def policy() -> None:
    """Policies: what is done with the tenant's reviews by themselves."""


@app.command(epilog=examples("byokeep policy show"))
@command()
def show(session: Session) -> None:
    """Show the tenant's policies."""
    _print(session, settings.read(session))


@app.command("set", epilog=examples("byokeep policy set --keep-superseded"))
@command()
def set_(
    session: Session,
    keep_superseded: Annotated[
        bool | None,
        typer.Option(
            "--keep-superseded/--no-keep-superseded",
            help="Reviews go on though a newer commit of their pull request is submitted.",
            show_default=False,
        ),
    ] = None,
    retry_ambiguous: Annotated[
        bool | None,
        typer.Option(
            "--retry-ambiguous/--no-retry-ambiguous",
            help="A call whose answer was lost is made again; it may be billed twice.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Set some of the tenant's policies; the others stay."""
    given = {"keep_superseded": keep_superseded, "retry_ambiguous": retry_ambiguous}
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        raise CliError("say which policy", "byokeep policy set --help lists them")
    _print(session, settings.change(session, **values))


def _print(session: Session, now: settings_pb2.Settings) -> None:
    if session.out.as_json:
        session.out.json(message_dict(now))
        return
    rows = []
    for name, (option, on, off) in _MEANING.items():
        is_on = bool(getattr(now, name))
        other = option.replace("--", "--no-", 1) if is_on else option
        rows.append((on if is_on else off, other))
    session.out.table(("POLICY", "CHANGE WITH"), rows)
