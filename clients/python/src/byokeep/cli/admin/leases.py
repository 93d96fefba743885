"""`byokeep admin revoke-lease`, `revoke-tenant`, `resume-tenant`: an operator ends leases."""

from __future__ import annotations

from typing import Annotated

import typer

from byokeep import names
from byokeep.cli.admin.tenants import Name, resume_hint
from byokeep.cli.base import checked
from byokeep.cli.base.confirm import confirm
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Session, command, examples
from byokeep.keyvault.v1 import admin_pb2

Reason = Annotated[
    str, typer.Option(help="Why; goes into the tenant's audit chain.", show_default=False)
]


@command()
def revoke_lease(
    session: Session,
    lease: Annotated[str, typer.Argument(metavar="LEASE", help="Its id, as in byokeep key trail.")],
    reason: Reason,
) -> None:
    """End one lease: the process that holds the key is killed. Its key and attempt may go on."""
    request = admin_pb2.RevokeLeaseRequest(lease_id=checked.lease(lease), reason=reason)
    answer = session.connection.admin.RevokeLease(request)
    if session.out.as_json:
        session.out.json(message_dict(answer))
    else:
        what = "is revoked" if answer.ended else "had ended before"
        session.out.print(f"lease {lease} {what}")


@command()
def revoke_tenant(
    session: Session,
    name: Name,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End every lease of a tenant, and give none until resume-tenant. Its keys stay as they are."""
    confirm(f"End every lease of tenant {name}, and give no new one?", yes=yes)
    answer = session.connection.admin.RevokeTenant(
        admin_pb2.RevokeTenantRequest(tenant=_resource(name), reason=reason)
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
        return
    session.out.print(f"tenant {name} has no leases now; this ended {answer.ended_leases}")
    session.out.note(f"to undo: {resume_hint(name)}")


@command()
def resume_tenant(session: Session, name: Name, reason: Reason) -> None:
    """Give leases to a tenant again, after revoke-tenant."""
    answer = session.connection.admin.ResumeTenant(
        admin_pb2.ResumeTenantRequest(tenant=_resource(name), reason=reason)
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
    elif answer.resumed:
        session.out.print(f"tenant {name} may have leases again")
    else:
        session.out.print(f"nothing had stopped leases of tenant {name}")


def register(app: typer.Typer) -> None:
    """Add the commands to `byokeep admin`."""
    reason = "--reason 'incident 7'"
    lease = "lea_01k0000000000000000000000a"
    for name, run, example in (
        ("revoke-lease", revoke_lease, f"byokeep admin revoke-lease {lease} {reason}"),
        ("revoke-tenant", revoke_tenant, f"byokeep admin revoke-tenant acme {reason}"),
        ("resume-tenant", resume_tenant, f"byokeep admin resume-tenant acme {reason}"),
    ):
        app.command(name, epilog=examples(example))(run)


def _resource(name: str) -> str:
    return names.tenant_name(checked.tenant(name))
