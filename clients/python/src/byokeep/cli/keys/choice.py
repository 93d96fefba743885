"""`byokeep key order`, `assign`, `unassign`: whose key a review runs on."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from byokeep import names
from byokeep.cli.base import checked
from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import message_dict, short
from byokeep.cli.base.session import Session, command, examples, request_id
from byokeep.cli.base.text import clean
from byokeep.cli.keys.ref import find_key, key_id
from byokeep.cli.settings import shared as settings
from byokeep.orchestrator.v1 import settings_pb2

app = typer.Typer()


class SourceName(StrEnum):
    """Whose key a review may run on."""

    USER = "user"
    REPOSITORY = "repository"
    TEAM = "team"


Repositories = Annotated[
    str, typer.Option("--repo", metavar="PATTERN", help="These repositories, such as 'acme/*'.")
]


@app.command(
    "order",
    epilog=examples("byokeep key order", "byokeep key order user repository team"),
)
@command()
def order(
    session: Session,
    sources: Annotated[
        list[SourceName] | None,
        typer.Argument(
            metavar="[SOURCE]...", show_default=False, help="user, repository, team; first first."
        ),
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="As without an order.")] = False,
) -> None:
    """Show or set whose key a review runs on: the first of these that has one of the provider.

    Where that one's keys are not ACTIVE the review is refused, never run on another. Without an
    order, a user's review runs on the user's own keys, all others on the repository's, else the
    team's.
    """
    if not sources and not default:
        _print(session, settings.read(session))
        return
    if sources and default:
        raise CliError("--default sets no order: leave the sources out")
    wanted = [settings_pb2.KeySource.Value(f"KEY_SOURCE_{one.name}") for one in sources or ()]
    if len(set(wanted)) < len(wanted):
        raise CliError("each source once", "byokeep key order user repository team")
    _print(session, settings.change(session, key_order=wanted))


@app.command("assign", epilog=examples("byokeep key assign ci --repo 'acme/*'"))
@command()
def assign(
    session: Session,
    reference: Annotated[
        str,
        typer.Argument(metavar="KEY", show_default=False, help="Id or name of a key of no user."),
    ],
    repo: Repositories,
) -> None:
    """Give some repositories a key of their own, in place of one of that provider."""
    _set(session, repo, key_id(find_key(session, reference)))


@app.command("unassign", epilog=examples("byokeep key unassign --repo 'acme/*'"))
@command()
def unassign(session: Session, repo: Repositories) -> None:
    """Take the keys of some repositories away; the keys stay."""
    _set(session, repo, "")


def _set(session: Session, pattern: str, key: str) -> None:
    connection = session.connection
    request = settings_pb2.SetRepositoryKeyRequest(
        parent=connection.parent,
        repository_pattern=checked.pattern(pattern),
        key=key,
        request_id=request_id(),
    )
    _print(session, connection.settings.SetRepositoryKey(request).settings)


def _print(session: Session, now: settings_pb2.Settings) -> None:
    if session.out.as_json:
        session.out.json(message_dict(now))
        return
    sources = [short(settings_pb2.KeySource, one).lower() for one in now.key_order]
    order = ", else ".join(sources) or "user's reviews: user; others: repository, else team"
    if now.managed_keys:
        session.out.print("keys: managed, the operator's; the order is of the tenant's own")
    session.out.print(f"order: {order}")
    for entry in now.repository_keys:
        provider = names.provider_id(entry.provider)
        session.out.print(f"{clean(entry.repository_pattern)}: {clean(entry.key_id)} ({provider})")
