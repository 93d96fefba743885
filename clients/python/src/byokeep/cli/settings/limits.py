"""`byokeep limit`: the ceilings that protect the tenant's bill."""

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
    "max_diff_bytes": ("largest diff, bytes", "the deployment"),
    "max_calls_per_review": ("provider calls of one review", "the deployment"),
    "max_calls_per_day": ("provider calls in 24 hours", ""),
    "max_reviews_per_day": ("reviews in 24 hours", "the plan"),
}

_UNSET = "0: as before it was set."
Bytes = Annotated[int | None, typer.Option(min=0, max=4_194_304, metavar="N", help=_UNSET)]
Calls = Annotated[int | None, typer.Option(min=0, max=1000, metavar="N", help=_UNSET)]
Daily = Annotated[int | None, typer.Option(min=0, max=1_000_000, metavar="N", help=_UNSET)]


@app.callback()
@group
def limit() -> None:
    """Ceilings: what a review, and a day of reviews, may cost the tenant at most."""


@app.command(epilog=examples("byokeep limit show"))
@command()
def show(session: Session) -> None:
    """Show the tenant's ceilings."""
    _print(session, settings.read(session))


@app.command(
    "set",
    epilog=examples(
        "byokeep limit set --max-calls-per-day 500",
        "byokeep limit set --max-diff-bytes 1000000 --max-calls-per-review 10",
    ),
)
@command()
def set_(
    session: Session,
    max_diff_bytes: Bytes = None,
    max_calls_per_review: Calls = None,
    max_calls_per_day: Daily = None,
    max_reviews_per_day: Daily = None,
) -> None:
    """Set some of the tenant's ceilings; the others stay."""
    given = {
        "max_diff_bytes": max_diff_bytes,
        "max_calls_per_review": max_calls_per_review,
        "max_calls_per_day": max_calls_per_day,
        "max_reviews_per_day": max_reviews_per_day,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        raise CliError("say which ceiling", "byokeep limit set --help lists them")
    _print(session, settings.change(session, **values))


def _print(session: Session, now: settings_pb2.Settings) -> None:
    if session.out.as_json:
        session.out.json(message_dict(now))
        return
    rows = []
    for name, (meaning, elsewhere) in _MEANING.items():
        own, value = getattr(now, name), getattr(now.in_force, name)
        source = "the tenant's own" if value and value == own else elsewhere
        rows.append((meaning, f"{value:,}" if value else "none", source, f"--{_dashed(name)}"))
    session.out.table(("CEILING", "IS", "COMES FROM", "SET WITH"), rows)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
