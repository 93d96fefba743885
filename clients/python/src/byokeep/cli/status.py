"""`byokeep status` and `byokeep doctor`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer

from byokeep.cli.admin.tenants import out_of_service, tenant_state, way_out
from byokeep.cli.base.errors import Exit
from byokeep.cli.base.output import message_dict, state_text
from byokeep.cli.base.session import Session, command
from byokeep.cli.base.text import clean
from byokeep.cli.keys.ref import key_state, label_of, list_keys

_MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}


@command()
def status(session: Session) -> None:
    """Say in a few lines whether byokeep answers, as whom, and how the tenant's keys are."""
    from byokeep.cli.base.identity import read_identity

    connection, profile = session.connection, session.profile
    identity = read_identity(profile)
    vault = _vault(session)
    state = tenant_state(session)
    gone = state in ("MISSING", "DELETED")
    keys = [] if gone else _keys(session)
    if session.out.as_json:
        session.out.json(
            {
                "profile": profile.name,
                "deployment": profile.trust.deployment,
                "identity": identity.spiffe_id,
                "tenant": connection.tenant,
                "tenantState": state,
                "keys": [message_dict(key) for key in keys or ()],
                "keyvault": message_dict(vault) if vault else None,
            }
        )
        return
    out = session.out
    out.print(f"orchestrator  {profile.orchestrator.address} answers")
    if vault is not None:
        remedy = way_out(vault, connection.tenant)
        leases = "answers" if remedy else "gives leases"
        if not vault.leases_allowed:
            leases = f"refuses leases ({clean(vault.refusal_reason)})"
        out.print(f"keyvault      {leases}; live leases, of all tenants: {vault.live_leases}")
        if remedy:
            out.print(f"held          tenant {connection.tenant} gets no lease", style="bold red")
            out.print(f"    → {remedy}", style="cyan")
    out.print(f"deployment    {profile.trust.deployment} (profile {profile.name})")
    out.print(f"identity      {identity.spiffe_id}")
    what, remedy = out_of_service(connection.tenant, state, identity.spiffe_id)
    out.print(f"tenant        {connection.tenant}{what and f': {what}'}")
    if remedy:
        out.print(f"    → {remedy}", style="cyan")
    if keys is None:
        out.print("keys          not shown to this identity's roles")
    elif not keys and not gone:
        out.print("keys          none; add one: byokeep key add openai")
    for key in keys or ():
        line = state_text(key_state(key))
        out.print(_labelled("key", label_of(key), line, clean(key.provider_key.hint)))


@command()
def doctor(session: Session) -> None:
    """Check configuration, certificates, both endpoints, the clock and the roles."""
    from byokeep.cli.checks import all_checks

    found = []
    for check in all_checks(session):
        found.append(check)
        if not session.out.as_json:
            _print(session, check)
    counts = Counter(check.ok for check in found)
    if session.out.as_json:
        checks = [
            {"what": entry.what, "ok": entry.ok, "found": entry.found, "remedy": entry.remedy}
            for entry in found
        ]
        session.out.json({"ok": not counts[False], "checks": checks})
    else:
        session.out.print()
        summary = "all is well" if not counts[False] else f"{counts[False]} to be mended"
        session.out.print(summary, style="bold")
    if counts[False]:
        raise typer.Exit(Exit.UNAVAILABLE)


def _keys(session: Session) -> list[Any] | None:
    """Return the tenant's keys; None where this identity may not see them."""
    import grpc

    try:
        return list_keys(session)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.PERMISSION_DENIED or session.profile.keyvault is None:
            raise
    return None


def _vault(session: Session) -> Any:
    import grpc

    from byokeep.keyvault.v1 import admin_pb2

    if session.profile.keyvault is None:
        return None
    try:
        return session.connection.admin.GetStatus(admin_pb2.GetStatusRequest())
    except grpc.RpcError as error:
        # Its state is for operators; everybody else sees the rest.
        if error.code() != grpc.StatusCode.PERMISSION_DENIED:
            raise
    return None


def _labelled(label: str, name: str, state: Any, hint: str) -> Any:
    from rich.text import Text

    return Text(f"{label:<14}{name} ").append_text(state).append(f" {hint}", style="dim")


def _print(session: Session, check: Any) -> None:
    from rich.text import Text

    mark, style = _MARKS[check.ok]
    if not session.out.unicode:
        mark = {"✓": "ok", "✗": "NO", "·": "--"}[mark]
    line = Text(f"{mark} ", style=style)
    line.append(f"{check.what}: ", style="bold").append(check.found, style="default")
    session.out.print(line)
    if check.remedy:
        session.out.print(f"    → {check.remedy}", style="cyan")
