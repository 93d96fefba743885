"""`byokeep admin rotate-kek`, `rewrap`, `migrate-kek`, `list-keks`, `rotate-system-key`."""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import Annotated

import typer

from byokeep import names
from byokeep.cli.admin.commands import resource
from byokeep.cli.admin.tenants import Name
from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.output import message_dict, short
from byokeep.cli.base.session import Session, command, examples, pages, request_id
from byokeep.cli.base.text import clean
from byokeep.keyvault.v1 import admin_pb2

app = typer.Typer()

_JOB_SECONDS = 24 * 3600
_DONE = admin_pb2.KEK_JOB_PHASE_DONE

Trim = Annotated[
    bool,
    typer.Option(
        "--trim",
        help="At the end destroy the old versions of the KEK, and with migrate-kek the KEK that"
        " was left. Database backups from before can't be opened then.",
    ),
]


class SystemKey(StrEnum):
    """Keys of keyvault's own."""

    INTAKE_SIGNING = "intake-signing"
    AUDIT_LOG = "audit-log"
    STATE_MAC = "state-mac"


@app.command(
    "rotate-kek",
    epilog=examples("byokeep admin rotate-kek acme", "byokeep admin rotate-kek acme --rewrap"),
)
@command()
def rotate_kek(
    session: Session,
    name: Name,
    rewrap: Annotated[
        bool, typer.Option("--rewrap", help="Then wrap the tenant's data keys again.")
    ] = False,
    trim: Trim = False,
) -> None:
    """Make a new version of a tenant's KEK: what is stored from now on is under it."""
    if trim and not rewrap:
        raise CliError("--trim needs --rewrap: old versions go when nothing is left under them")
    answer = session.connection.admin.RotateTenantKey(
        admin_pb2.RotateTenantKeyRequest(tenant=resource(name), request_id=request_id())
    )
    if session.out.as_json:
        (session.out.json_line if rewrap else session.out.json)(message_dict(answer))
    else:
        session.out.print(f"KEK of tenant {name} is at v{answer.version}")
    if rewrap:
        _rewrap(session, name, trim=trim)
    else:
        session.out.note(f"next: byokeep admin rewrap {name}")


@app.command(epilog=examples("byokeep admin rewrap acme", "byokeep admin rewrap acme --trim"))
@command()
def rewrap(session: Session, name: Name, trim: Trim = False) -> None:
    """Wrap a tenant's data keys again under the newest version of its KEK, while it is in use.

    keyvault goes on with it if this command ends. With --json: a line for each step.
    """
    _rewrap(session, name, trim=trim)


@app.command(
    "migrate-kek",
    epilog=examples(
        "byokeep admin migrate-kek acme", "byokeep admin migrate-kek --to vault --all --trim"
    ),
)
@command()
def migrate_kek(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(metavar="TENANT", help="The tenant's name; or --all.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every tenant.")] = False,
    to: Annotated[
        str, typer.Option(metavar="BACKEND", help="Refuse unless this is keyvault's primary one.")
    ] = "",
    trim: Trim = False,
) -> None:
    """Move tenants' data keys to keyvault's primary KEK backend, while they are in use.

    At the end it says until when the backend that was left is still needed. With --json: a line
    for each step, and one for that.
    """
    if (name is None) is not every:
        raise CliError("name one tenant, or --all")
    failed = []
    for tenant in _tenants(session) if name is None else [name]:
        try:
            _rewrap(session, tenant, trim=trim, to=to)
        except CliError as error:
            if not every or error.reason != "REWRAP_FAILED":
                raise
            failed.append(tenant)
            session.out.warn(error.message)
    backends = session.connection.admin.ListKekBackends(admin_pb2.ListKekBackendsRequest())
    if session.out.as_json:
        session.out.json_line(message_dict(backends))
    else:
        _say_what_is_needed(session, backends)
    if failed:
        raise CliError(
            f"not all data keys of {len(failed)} tenants could be moved: {', '.join(failed)}",
            "byokeep admin migrate-kek TENANT names them",
            Exit.INTEGRITY,
            "REWRAP_FAILED",
        )


@app.command("list-keks", epilog=examples("byokeep admin list-keks"))
@command()
def list_keks(session: Session) -> None:
    """List tenants, and which backends and KEK versions wrap their data keys."""
    request = admin_pb2.ListTenantKeysRequest(page_size=500)
    found = list(pages(session.connection.admin.ListTenantKeys, request, "tenant_keys"))
    backends = session.connection.admin.ListKekBackends(admin_pb2.ListKekBackendsRequest())
    if session.out.as_json:
        tenants = [message_dict(entry) for entry in found]
        session.out.json({"tenantKeys": tenants} | message_dict(backends))
        return
    rows = [
        (
            clean(names.last_of(entry.tenant)),
            clean(holding.backend) or ("destroyed" if entry.kek_destroyed else "(no keys)"),
            _span(holding.oldest_version, holding.newest_version),
            str(holding.rows),
        )
        for entry in found
        for holding in entry.holdings or (admin_pb2.KekHolding(),)
    ]
    session.out.table(("TENANT", "BACKEND", "VERSIONS", "DATA KEYS"), rows)
    _say_what_is_needed(session, backends)


@app.command(
    "rotate-system-key",
    epilog=examples(
        "byokeep admin rotate-system-key intake-signing",
        "byokeep admin rotate-system-key intake-signing --activate isk_0123456789abcdef",
    ),
)
@command()
def rotate_system_key(
    session: Session,
    kind: Annotated[
        SystemKey,
        typer.Argument(metavar="KIND", help="intake-signing, audit-log or state-mac."),
    ],
    activate: Annotated[
        str, typer.Option(metavar="KEY_ID", help="Have this prepared key used.")
    ] = "",
) -> None:
    """Rotate a key of keyvault's own, in two steps.

    First it prints the new public key: add it to every client's trust.json and keep the old
    one there. Then repeat the command with --activate, and the new key signs. The key state-mac
    has no public part: no client knows it.
    """
    admin, number = session.connection.admin, _kind(kind)
    if activate:
        admin.ActivateSystemKey(admin_pb2.ActivateSystemKeyRequest(kind=number, key_id=activate))
        if session.out.as_json:
            session.out.json({})
        else:
            keep = "" if kind is SystemKey.STATE_MAC else "; keep the older keys in trust.json"
            session.out.print(f"{activate} is in use{keep}")
        return
    answer = admin.PrepareSystemKey(admin_pb2.PrepareSystemKeyRequest(kind=number))
    key_id, public = clean(answer.key_id), base64.b64encode(answer.public_key).decode()
    field = f"{kind.value.replace('-', '_')}_keys"
    if session.out.as_json:
        session.out.json({field: {key_id: public}})
        return
    if kind is SystemKey.STATE_MAC:
        session.out.print(f"{key_id} is ready")
    else:
        session.out.print(f'add to "{field}" of every trust.json:  "{key_id}": "{public}"')
    session.out.note(f"then: byokeep admin rotate-system-key {kind.value} --activate {key_id}")


def _rewrap(session: Session, name: str, *, trim: bool, to: str = "") -> None:
    request = admin_pb2.RewrapTenantRequest(
        tenant=resource(name), request_id=request_id(), trim=trim, target_backend=to
    )
    latest = admin_pb2.RewrapTenantResponse()
    with session.out.bar(name) as bar:
        for latest in session.connection.admin.RewrapTenant(request, timeout=_JOB_SECONDS):
            phase = short(admin_pb2.KekJobPhase, latest.phase).lower()
            bar(latest.done + latest.failed, latest.total, f"{name}: {phase}")
            if session.out.as_json:
                session.out.json_line(message_dict(latest))
    if not session.out.as_json:
        now = f"; all are under {clean(latest.backend)} v{latest.version} or newer"
        count = f"rewrapped {latest.done} of {latest.total} data keys"
        session.out.print(
            f"tenant {name}: {count if latest.total else 'nothing to rewrap'}"
            f"{now if latest.phase == _DONE else ''}"
            f"{'; its older versions are destroyed' if trim and latest.phase == _DONE else ''}"
        )
        for one in latest.failures:
            session.out.print(f"  {clean(one.key_id)} v{one.version}: {clean(one.reason)}")
    if latest.phase != _DONE:
        raise CliError(
            f"tenant {name}: {latest.failed} data keys could not be wrapped again; nothing was"
            f" trimmed ({short(admin_pb2.KekJobPhase, latest.phase)})",
            "replace or destroy those keys, then run this again",
            Exit.INTEGRITY,
            "REWRAP_FAILED",
        )


def _say_what_is_needed(session: Session, found: admin_pb2.ListKekBackendsResponse) -> None:
    """Say of every backend that is not the primary one when it may be switched off."""
    for one in found.backends:
        if not one.primary:
            session.out.note(f"backend {clean(one.backend)}: {_needed(one)}")


def _needed(one: admin_pb2.KekBackend) -> str:
    parts = []
    if one.data_keys:
        parts.append(
            f"{one.data_keys} data keys of {one.tenants} tenants (byokeep admin migrate-kek --all)"
        )
    if one.system_keys:
        parts.append(f"{one.system_keys} of keyvault's own keys (its migrate moves them)")
    if one.HasField("epochs_end_time"):
        end = one.epochs_end_time.ToDatetime()
        parts.append(f"content and intake keys until {end:%Y-%m-%d %H:%M} UTC")
    if not parts:
        return "nothing needs it; take it out of keyvault's settings"
    return f"still needed for {', '.join(parts)}; keyvault does not start without it"


def _tenants(session: Session) -> list[str]:
    request = admin_pb2.ListTenantKeysRequest(page_size=500)
    found = pages(session.connection.admin.ListTenantKeys, request, "tenant_keys")
    return [names.last_of(entry.tenant) for entry in found if entry.holdings]


def _span(oldest: int, newest: int) -> str:
    if not newest:
        return ""
    return f"v{newest}" if oldest == newest else f"v{oldest} to v{newest}"


def _kind(kind: SystemKey) -> admin_pb2.SystemKeyKind.ValueType:
    return admin_pb2.SystemKeyKind.Value(f"SYSTEM_KEY_KIND_{kind.name}")
