"""`byokeep key`: add, list, show, check, rotate, revoke, destroy, roll back, trail."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

import typer

from byokeep import ids, names
from byokeep.cli.base import checked
from byokeep.cli.base.confirm import confirm
from byokeep.cli.base.errors import CliError
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Session, command, examples, group, request_id
from byokeep.cli.keys import trail
from byokeep.cli.keys.input import read_key
from byokeep.cli.keys.ref import (
    ENDED,
    OPERATOR,
    called,
    find_key,
    key_id,
    key_state,
    key_to_end,
    list_keys,
    provider_of,
)
from byokeep.cli.keys.verdict import follow, follow_check
from byokeep.cli.keys.view import key_row, print_change, print_key
from byokeep.cli.settings import shared as tenant_settings
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2

app = typer.Typer(no_args_is_help=True)


class ProviderName(StrEnum):
    """Providers, as the command line spells them."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"


Reference = Annotated[
    str,
    typer.Argument(
        metavar="KEY",
        show_default=False,
        help="Id, unique prefix of an id, name, or provider if it has one key.",
    ),
]
Stdin = Annotated[bool, typer.Option("--stdin", help="Read the key from standard input.")]
FromEnv = Annotated[
    str | None,
    typer.Option(metavar="VAR", help="Read the key from this environment variable."),
]
Wait = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0, help="Wait this long for the verdict; 0: not at all."),
]


@app.callback()
@group
def key() -> None:
    """Provider keys: add, watch over, rotate, revoke.

    No command takes a key as an argument: it would stay in the shell's history.
    """


@app.command(
    epilog=examples(
        "byokeep key add openai",
        "byokeep key add gemini --name ci --stdin < FILE",
        "byokeep key add anthropic --from-env ANTHROPIC_API_KEY",
    )
)
@command()
def add(
    session: Session,
    provider: Annotated[
        ProviderName, typer.Argument(metavar="PROVIDER", help="openai, anthropic or gemini.")
    ],
    name: Annotated[str, typer.Option(help="Name of the key.")] = "default",
    user: Annotated[str, typer.Option(help="User that owns it; default: the tenant.")] = "",
    managed: Annotated[
        bool,
        typer.Option("--managed", help="The operator's, for the tenant's reviews: for operators."),
    ] = False,
    stdin: Stdin = False,
    from_env: FromEnv = None,
    wait: Wait = 60,
) -> None:
    """Seal a key here, add it, and show its provider's verdict as it comes.

    Asks for the key at a hidden prompt, unless --stdin or --from-env is given.
    """
    from byokeep.errors import CallError

    checked.key_name(name)
    checked.user(user)
    if managed and user:
        raise CliError("a managed key is no user's: --managed and --user exclude each other")
    user = OPERATOR if managed else user
    connection = session.connection
    sealed = _seal(session, provider, ids.new_id("key"), "add", user, (stdin, from_env))
    answer = connection.keys.AddKey(
        key_pb2.AddKeyRequest(
            parent=connection.parent,
            key_id=sealed.key_id,
            provider=names.provider_value(provider),
            user=user,
            display_name=name,
            sealed_key=sealed.key,
            request_id=sealed.request_id,
        )
    )
    follow(session, answer.key, wait)
    if wait and not user:
        # The key is there, whether this can be looked up or not.
        with contextlib.suppress(CallError):
            _say_that_a_model_is_needed(session)


def _say_that_a_model_is_needed(session: Session) -> None:
    """With keys of one provider its default model is taken; of several, none is."""
    providers = {
        provider_of(key)
        for key in list_keys(session)
        if key_state(key) == "ACTIVE" and not key.provider_key.owner
    }
    if len(providers) > 1 and not tenant_settings.read(session).default_model:
        session.out.note(
            "there are keys of several providers now, and reviews that name no model are refused"
        )
        session.out.note("  choose one: byokeep model set PROVIDER/MODEL", style="cyan")


@app.command(epilog=examples("byokeep key rotate openai", "byokeep key rotate key_01k --now"))
@command()
def rotate(
    session: Session,
    reference: Reference,
    stdin: Stdin = False,
    from_env: FromEnv = None,
    now: Annotated[
        bool,
        typer.Option(
            "--now", help="Destroy the version before it at once, without a grace of 24 h."
        ),
    ] = False,
    wait: Wait = 60,
) -> None:
    """Add a version to a key; the one before serves until the new one is validated."""
    found = find_key(session, reference)
    owner = found.provider_key.owner
    # Before anybody is asked for a key that could go nowhere.
    if found.provider_key.state in ENDED:
        raise CliError(
            f"{key_id(found)} is {key_state(found)}, for good",
            f"byokeep key add {provider_of(found)}; of a revoked one, byokeep key destroy frees the"
            " name",
            reason="WRONG_STATE",
        )
    sealed = _seal(session, provider_of(found), key_id(found), "rotate", owner, (stdin, from_env))
    answer = session.connection.keys.RotateKey(
        key_pb2.RotateKeyRequest(
            name=found.provider_key.name,
            sealed_key=sealed.key,
            destroy_previous=now,
            request_id=sealed.request_id,
        )
    )
    follow(session, answer.key, wait)


@app.command("list", epilog=examples("byokeep key list", "byokeep key list --json"))
@command()
def list_(
    session: Session,
    all_: Annotated[bool, typer.Option("--all", help="Also destroyed keys.")] = False,
) -> None:
    """List the tenant's keys; the keys themselves can't be read back."""
    keys = list_keys(session, show_destroyed=all_)
    if session.out.as_json:
        session.out.json({"keys": [message_dict(key) for key in keys]})
    elif not keys:
        session.out.print(
            f"tenant {session.connection.tenant} has no key; add one: byokeep key add openai"
        )
    else:
        columns = ("ID", "PROVIDER", "NAME", "OWNER", "STATE", "HINT", "VERDICT")
        session.out.table(columns, [key_row(key) for key in keys])


@app.command(epilog=examples("byokeep key show openai"))
@command()
def show(session: Session, reference: Reference) -> None:
    """Show a key: its versions, their states, and what its provider said."""
    found = find_key(session, reference)
    if session.out.as_json:
        session.out.json(message_dict(found))
        return
    print_key(session, found)


@app.command(epilog=examples("byokeep key check openai"))
@command()
def check(session: Session, reference: Reference, wait: Wait = 60) -> None:
    """Ask a key's provider now whether it still takes it, and which models it can use.

    A key that the provider rejects is NEEDS_REKEY then. With --json: a line for each change.
    """
    name = find_key(session, reference).provider_key.name
    request = key_pb2.CheckKeyRequest(name=name, request_id=request_id())
    follow_check(session, session.connection.keys.CheckKey(request).key, wait)


@app.command(epilog=examples("byokeep key revoke openai"))
@command()
def revoke(
    session: Session,
    reference: Reference,
    yes: Annotated[
        bool, typer.Option("--yes", help="Changes nothing: no question is asked anyway.")
    ] = False,
) -> None:
    """Revoke a key: no new lease from now on, running attempts end. Can't be undone.

    It is for emergencies, so no question is asked. By its whole id, one that can't be shown any
    more is revoked too.
    """
    del yes
    name = key_to_end(session, reference)
    request = key_pb2.RevokeKeyRequest(name=name, request_id=request_id())
    key = session.connection.keys.RevokeKey(request).key
    gone = key.provider_key.state == custody_pb2.KEY_VERSION_STATE_DESTROYED
    print_change(session, key, "destroyed already" if gone else "revoked")


@app.command(epilog=examples("byokeep key destroy key_01k", "byokeep key destroy openai --yes"))
@command()
def destroy(
    session: Session,
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Revoke a key and delete its ciphertext; a tombstone stays. Can't be undone."""
    name = key_to_end(session, reference)
    if not yes:
        confirm(f"Destroy {called(session, name)}? It can't be undone", yes=False)
    request = key_pb2.DestroyKeyRequest(name=name, request_id=request_id())
    print_change(session, session.connection.keys.DestroyKey(request).key, "destroyed")


@app.command("roll-back", epilog=examples("byokeep key roll-back openai"))
@command()
def roll_back(session: Session, reference: Reference) -> None:
    """Make the version before ACTIVE again, within 24 hours of its replacement.

    The newer version is destroyed; that can't be undone.
    """
    found = find_key(session, reference)
    request = key_pb2.RollBackKeyRequest(
        name=found.provider_key.name, request_id=request_id(), etag=found.provider_key.etag
    )
    answer = session.connection.keys.RollBackKey(request)
    gone = "".join(f"; version {number} is destroyed" for number in answer.destroyed_versions)
    active = answer.key.provider_key.active_version
    print_change(session, answer.key, f"rolled back to version {active}{gone}")


@app.command(
    "trail", epilog=examples("byokeep key trail openai", "byokeep key trail openai --json")
)
@command()
def trail_(session: Session, reference: Reference) -> None:
    """Draw the life of a key: where its plaintext was, for how long, and that it is gone.

    Keyvault's hash-chained events are recorded; process and time of the plaintext are
    reported by the runner. With --json: one line of JSON for each entry, then a summary.
    """
    trail.show(session, find_key(session, reference))


@dataclass(frozen=True, slots=True)
class _Sealed:
    key: custody_pb2.SealedKey
    key_id: str
    request_id: str


def _seal(
    session: Session,
    provider: str,
    key_id: str,
    operation: Literal["add", "rotate"],
    owner: str,
    source: tuple[bool, str | None],
) -> _Sealed:
    connection, identifier = session.connection, request_id()
    profile = connection.profile
    where = (
        f"sealing for tenant {connection.tenant} of deployment {connection.trust.deployment}"
        f" (profile {profile.name} of {profile.source})"
    )
    asks = source == (False, None)
    if asks:
        # Whoever types a key knows first where it goes.
        session.out.note(where)
    text = read_key(provider, stdin=source[0], from_env=source[1])
    if not asks:
        session.out.note(where)
    sealed = connection.seal(provider, text, key_id, operation, identifier, owner)
    return _Sealed(sealed, key_id, identifier)
