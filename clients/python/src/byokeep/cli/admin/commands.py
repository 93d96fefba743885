"""`byokeep admin`: keyvault's administration, for operators."""

from __future__ import annotations

from typing import Annotated

import typer

from byokeep import names
from byokeep.cli.admin import leases as admin_leases
from byokeep.cli.admin.tenants import Name, shredded, suspended_tenants, way_out
from byokeep.cli.base import checked
from byokeep.cli.base.confirm import confirm_by_name
from byokeep.cli.base.output import message_dict, when
from byokeep.cli.base.session import Session, command, examples, group, request_id
from byokeep.cli.base.text import clean
from byokeep.keyvault.v1 import admin_pb2

app = typer.Typer(no_args_is_help=True)
admin_leases.register(app)


@app.callback()
@group
def admin() -> None:
    """Administration of keyvault: its state, and tenants' key-encryption keys (KEK)."""


@app.command(epilog=examples("byokeep admin status"))
@command()
def status(session: Session) -> None:
    """Say how keyvault is: backend, leases, its anchor, tenants out of service."""
    answer = session.connection.admin.GetStatus(admin_pb2.GetStatusRequest())
    suspended = suspended_tenants(session)
    if session.out.as_json:
        session.out.json({**message_dict(answer), "suspendedTenants": suspended})
        return
    healthy = "answers" if answer.kek_backend_healthy else "does not answer"
    leases = "given" if answer.leases_allowed else f"refused: {clean(answer.refusal_reason)}"
    anchored = when(answer.reconcile_time) if answer.HasField("reconcile_time") else "not yet"
    out = session.out
    out.print(f"deployment   {clean(answer.deployment)}")
    state = f" ({clean(answer.kek_backend_detail)})" if answer.kek_backend_detail else ""
    out.print(
        f"KEK backend  {clean(answer.kek_backend)}, {healthy}{state}; shred: {clean(answer.shred)}"
    )
    out.print(f"leases       {leases}; live now: {answer.live_leases}")
    out.print(f"tenants      {answer.tenants}")
    out.print(f"anchor       agreed with the database {anchored}")
    _print_held(session, answer)
    if suspended is None:
        out.print("suspended    not known: the orchestrator does not say")
    for name in suspended or ():
        out.print(f"suspended    tenant {name} gets no new lease", style="yellow")
        out.print(f"    → byokeep tenant suspend {name} --resume", style="cyan")
    out.print(
        f"rewraps      {answer.open_kek_jobs} tenants open;"
        f" undecryptable keys: {answer.undecryptable_keys}"
    )


@app.command("create-tenant-key", epilog=examples("byokeep admin create-tenant-key acme"))
@command()
def create_tenant_key(session: Session, name: Name) -> None:
    """Create a tenant's KEK; nothing changes where it exists."""
    answer = session.connection.admin.CreateTenantKey(
        admin_pb2.CreateTenantKeyRequest(tenant=resource(name), request_id=request_id())
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
        return
    what = "is created" if answer.created else "was there before"
    session.out.print(f"KEK of tenant {name} {what}: {clean(answer.backend)} v{answer.version}")


@app.command("shred-tenant", epilog=examples("byokeep admin shred-tenant acme"))
@command()
def shred_tenant(
    session: Session,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy a tenant's KEK, and with it every key of the tenant. Can't be undone."""
    confirm_by_name(name, f"destroy every key of tenant {name}", yes=yes)
    answer = session.connection.admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant=resource(name), request_id=request_id())
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
        return
    session.out.print(
        f"tenant {name}: {shredded(answer.shred)};"
        f" versions that died with it: {answer.destroyed_versions}"
    )


@app.command(
    "resume-leases", epilog=examples("byokeep admin resume-leases --reason 'restored on purpose'")
)
@command()
def resume_leases(
    session: Session,
    reason: Annotated[str, typer.Option(help="Why; goes into the audit log.", show_default=False)],
) -> None:
    """Give leases again, after the database was found to be older than its anchor."""
    request = admin_pb2.ResumeLeasesRequest(reason=reason)
    answer = session.connection.admin.ResumeLeases(request)
    if session.out.as_json:
        session.out.json(message_dict(answer))
    elif answer.resumed:
        session.out.print("leases are given again; the audit log has the reason")
    else:
        session.out.print("nothing had stopped leases; the audit log has the reason all the same")


def _print_held(session: Session, answer: admin_pb2.GetStatusResponse) -> None:
    for name in sorted({*answer.held_tenants, *answer.broken_tenants}):
        session.out.print(f"held         tenant {clean(name)} gets no lease", style="bold red")
        session.out.print(f"    → {clean(way_out(answer, name))}", style="cyan")


def resource(name: str) -> str:
    """Return a tenant's resource name. Raises CliError."""
    return names.tenant_name(checked.tenant(name))
