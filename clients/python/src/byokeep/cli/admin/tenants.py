"""`byokeep tenant` and `byokeep caller`: for operators."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from byokeep import names
from byokeep.cli.base import checked
from byokeep.cli.base.confirm import confirm_by_name
from byokeep.cli.base.output import message_dict, short, state_text, when
from byokeep.cli.base.session import Session, command, examples, group, pages, request_id
from byokeep.cli.base.text import clean
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import admin_pb2
from byokeep.orchestrator.v1 import tenant_pb2

if TYPE_CHECKING:
    import grpc

    from byokeep.client import Connection

_SHREDDED = {
    "immediate": "shredded, for good",
    "delayed": "shredded when the waiting period of its KEK backend ends",
    "none": "deleted; copies of the keyring, if there are any, still hold it",
}

_SECONDS = 5.0

app = typer.Typer(no_args_is_help=True)
callers = typer.Typer(no_args_is_help=True)


class RoleName(StrEnum):
    """Roles that a caller may have for a tenant."""

    SUBMITTER = "submitter"
    KEY_ADMIN = "key-admin"
    AUDITOR = "auditor"
    OPERATOR = "operator"


Name = Annotated[
    str, typer.Argument(metavar="TENANT", show_default=False, help="The tenant's name.")
]
PlanArgument = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        show_default=False,
        help="One that byokeep tenant plans lists, such as team.",
    ),
]
SpiffeId = Annotated[
    str,
    typer.Argument(
        metavar="SPIFFE_ID", show_default=False, help="Such as spiffe://acme.example/ci."
    ),
]


@app.callback()
@group
def tenant() -> None:
    """Tenants: create, suspend, delete, set a plan."""


@app.command(epilog=examples("byokeep tenant create acme --plan team"))
@command()
def create(
    session: Session,
    name: Name,
    plan: Annotated[str, typer.Option(help="The plan; default: the deployment's.")] = "",
) -> None:
    """Create a tenant, and its key-encryption key in keyvault."""
    connection, resource = session.connection, names.tenant_name(checked.tenant(name))
    if plan:
        checked.plan(plan)
    # An endpoint that is missing must not leave half of it done.
    admin = connection.admin
    # No KEK before the orchestrator, which knows who may create a tenant, has agreed.
    created, refused = _create(connection, resource, plan)
    key = admin.CreateTenantKey(
        admin_pb2.CreateTenantKeyRequest(tenant=resource, request_id=request_id())
    )
    if refused is not None and not key.created:
        raise refused
    if session.out.as_json:
        session.out.json(message_dict(created))
        return
    if refused is None:
        session.out.print(
            f"tenant {name} is created, plan {clean(created.plan)}, with its own key-encryption key"
        )
    else:
        session.out.print(f"tenant {name} was there before; its key-encryption key is created")
    session.out.note(f"allow a service: byokeep caller allow SPIFFE_ID --role ROLE --tenant {name}")


@app.command("list", epilog=examples("byokeep tenant list"))
@command()
def list_(session: Session) -> None:
    """List the tenants that this identity has any role for."""
    connection = session.connection
    request = tenant_pb2.ListTenantsRequest(page_size=500)
    found = list(pages(connection.tenants.ListTenants, request, "tenants"))
    if session.out.as_json:
        session.out.json({"tenants": [message_dict(entry) for entry in found]})
    elif found:
        rows = [
            (
                clean(names.last_of(entry.name)),
                state_text(short(tenant_pb2.TenantState, entry.state)),
                clean(entry.plan),
                when(entry.create_time),
            )
            for entry in found
        ]
        session.out.table(("TENANT", "STATE", "PLAN", "CREATED"), rows)
    else:
        session.out.print("this identity has no role for any tenant")


@app.command(epilog=examples("byokeep tenant plans"))
@command()
def plans(session: Session) -> None:
    """List the plans that a tenant may have, and what each includes."""
    request = tenant_pb2.ListPlansRequest(page_size=500)
    found = list(pages(session.connection.tenants.ListPlans, request, "plans"))
    if session.out.as_json:
        session.out.json({"plans": [message_dict(entry) for entry in found]})
        return
    rows = [
        (
            clean(entry.name) + (" (default)" if entry.default else ""),
            f"{entry.attempts_in_flight:,}",
            f"{entry.reviews_per_day:,}",
            f"{entry.reviews_waiting:,}",
            f"{entry.keys_per_provider:,}" if entry.keys_per_provider else "any",
            clean(", ".join(entry.features)) or "-",
        )
        for entry in found
    ]
    session.out.table(("PLAN", "AT ONCE", "A DAY", "WAITING", "KEYS", "FEATURES"), rows)


@app.command(epilog=examples("byokeep tenant suspend acme", "byokeep tenant suspend acme --resume"))
@command()
def suspend(
    session: Session,
    name: Name,
    resume: Annotated[bool, typer.Option("--resume", help="Take it back into service.")] = False,
) -> None:
    """Take nothing new for a tenant: no reviews, keys or leases; or resume it.

    What is queued waits, what runs goes on; byokeep admin revoke-tenant ends that too.
    """
    request = tenant_pb2.SuspendTenantRequest(
        name=names.tenant_name(checked.tenant(name)), resume=resume, request_id=request_id()
    )
    changed = session.connection.tenants.SuspendTenant(request).tenant
    if session.out.as_json:
        session.out.json(message_dict(changed))
    else:
        state = short(tenant_pb2.TenantState, changed.state)
        session.out.print(f"tenant {name} is {state}")


@app.command(epilog=examples("byokeep tenant delete acme"))
@command()
def delete(
    session: Session,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a tenant with its reviews, and destroy its keys. Can't be undone."""
    resource = names.tenant_name(checked.tenant(name))
    confirm_by_name(name, f"delete tenant {name} and destroy all of its keys", yes=yes)
    connection = session.connection
    # An endpoint that is missing must not leave half of it done.
    admin = connection.admin
    deleted = connection.tenants.DeleteTenant(
        tenant_pb2.DeleteTenantRequest(name=resource, request_id=request_id())
    )
    answer = admin.ShredTenant(
        admin_pb2.ShredTenantRequest(tenant=resource, request_id=request_id())
    )
    if session.out.as_json:
        session.out.json({**message_dict(deleted), **message_dict(answer)})
        return
    session.out.print(
        f"tenant {name} is deleted; keys destroyed: {deleted.destroyed_keys};"
        f" {shredded(answer.shred)}"
    )


@app.command("set-plan", epilog=examples("byokeep tenant set-plan acme enterprise"))
@command()
def set_plan(session: Session, name: Name, plan: PlanArgument) -> None:
    """Set a tenant's plan: what it may have, and how much of it."""
    from byokeep.orchestrator.v1 import settings_pb2

    request = settings_pb2.SetPlanRequest(
        tenant=names.tenant_name(checked.tenant(name)),
        plan=checked.plan(plan),
        request_id=request_id(),
    )
    settings = session.connection.settings.SetPlan(request).settings
    if session.out.as_json:
        session.out.json(message_dict(settings))
    else:
        session.out.print(f"tenant {name} has plan {clean(settings.plan)}")


class Custody(StrEnum):
    """Whose keys a tenant's reviews run on."""

    OWN = "own"
    MANAGED = "managed"


@app.command("set-keys", epilog=examples("byokeep tenant set-keys acme managed"))
@command()
def set_keys(
    session: Session,
    name: Name,
    custody: Annotated[
        Custody,
        typer.Argument(
            metavar="own|managed", show_default=False, help="The tenant's own, or the operator's."
        ),
    ],
) -> None:
    """Choose whose keys a tenant's reviews run on: its own, or those that you brought for it.

    Neither stands in for the other: where none is ACTIVE, reviews are refused. A managed key is
    added with byokeep key add PROVIDER --managed --tenant TENANT.
    """
    from byokeep.orchestrator.v1 import settings_pb2

    request = settings_pb2.SetKeyCustodyRequest(
        tenant=names.tenant_name(checked.tenant(name)),
        managed_keys=custody == Custody.MANAGED,
        request_id=request_id(),
    )
    settings = session.connection.settings.SetKeyCustody(request).settings
    if session.out.as_json:
        session.out.json(message_dict(settings))
    else:
        whose = "managed keys" if settings.managed_keys else "the tenant's own keys"
        session.out.print(f"reviews of tenant {name} run on {whose}, and on no others")


@callers.callback()
@group
def caller() -> None:
    """Callers: which internal service may do what for the tenant. Default: nothing."""


@callers.command(
    epilog=examples("byokeep caller allow spiffe://acme.example/ci --role submitter --tenant acme")
)
@command()
def allow(
    session: Session,
    spiffe_id: SpiffeId,
    role: Annotated[list[RoleName], typer.Option(help="A role; may be repeated.")],
    assert_users: Annotated[
        bool, typer.Option("--assert-users", help="It may say for which user it acts.")
    ] = False,
) -> None:
    """Give an identity roles for the tenant, in place of those that it had."""
    connection = session.connection
    request = tenant_pb2.AllowCallerRequest(
        parent=connection.parent,
        caller=tenant_pb2.Caller(
            spiffe_id=checked.spiffe_id(spiffe_id),
            roles=[_role(entry) for entry in dict.fromkeys(role)],
            may_assert_users=assert_users,
        ),
        request_id=request_id(),
    )
    allowed = connection.callers.AllowCaller(request).caller
    if session.out.as_json:
        session.out.json(message_dict(allowed))
    else:
        session.out.print(f"{clean(allowed.spiffe_id)}: {_roles(allowed)}")


@callers.command(epilog=examples("byokeep caller deny spiffe://acme.example/ci --tenant acme"))
@command()
def deny(session: Session, spiffe_id: SpiffeId) -> None:
    """Take every role for the tenant from an identity."""
    connection = session.connection
    connection.callers.DenyCaller(
        tenant_pb2.DenyCallerRequest(
            parent=connection.parent,
            spiffe_id=checked.spiffe_id(spiffe_id),
            request_id=request_id(),
        )
    )
    if session.out.as_json:
        session.out.json({})
    else:
        session.out.print(f"{clean(spiffe_id)} has no role for tenant {connection.tenant}")


@callers.command("list", epilog=examples("byokeep caller list --tenant acme"))
@command()
def list_callers(session: Session) -> None:
    """List the identities that have a role for the tenant."""
    connection = session.connection
    request = tenant_pb2.ListCallersRequest(parent=connection.parent, page_size=500)
    found = list(pages(connection.callers.ListCallers, request, "callers"))
    if session.out.as_json:
        session.out.json({"callers": [message_dict(entry) for entry in found]})
        return
    rows = [(clean(entry.spiffe_id), _roles(entry)) for entry in found]
    session.out.table(("SPIFFE ID", "ROLES"), rows)


def tenant_state(session: Session, timeout: float | None = None) -> str | None:
    """Return `ACTIVE`, `SUSPENDED`, `DELETED`, or `MISSING` where this identity may know that there
    is none of that name; None where it has no role for the tenant. Raises grpc.RpcError."""
    import grpc

    from byokeep.errors import error_info

    connection = session.connection
    request = tenant_pb2.ListTenantsRequest(page_size=500)
    listing = functools.partial(connection.tenants.ListTenants, timeout=timeout)
    for entry in pages(listing, request, "tenants"):
        if entry.name == connection.parent:
            return short(tenant_pb2.TenantState, entry.state)
    one = tenant_pb2.ListCallersRequest(parent=connection.parent, page_size=1)
    try:
        connection.callers.ListCallers(one, timeout=timeout)
    except grpc.RpcError as error:
        if error_info(error).reason == "NOT_FOUND":
            return "MISSING"
        if error.code() != grpc.StatusCode.PERMISSION_DENIED:
            raise
    return None


def suspended_tenants(session: Session) -> list[str] | None:
    """Return the names of suspended tenants; None where the orchestrator does not say."""
    import grpc

    request = tenant_pb2.ListTenantsRequest(page_size=500)
    listing = functools.partial(session.connection.tenants.ListTenants, timeout=_SECONDS)
    try:
        return [
            clean(names.last_of(entry.name))
            for entry in pages(listing, request, "tenants")
            if entry.state == tenant_pb2.TENANT_STATE_SUSPENDED
        ]
    except grpc.RpcError:
        return None


def out_of_service(name: str, state: str | None, spiffe_id: str) -> tuple[str, str]:
    """Return what keeps a tenant from the service of an identity, and what helps; both empty where
    nothing does."""
    create = f"byokeep tenant create {name}"
    if state == "MISSING":
        return "there is no tenant of that name", create
    if state is None:
        allow = f"byokeep caller allow {spiffe_id or 'SPIFFE_ID'} --role ROLE --tenant {name}"
        return "no role for it, or there is none of that name", f"an operator: {allow}; or {create}"
    if state == "SUSPENDED":
        what = "suspended; it takes no new reviews or keys, and gets no new lease"
        return what, f"byokeep tenant suspend {name} --resume, by an operator"
    return ("", "") if state == "ACTIVE" else (state.lower(), "its name is not given twice")


def resume_hint(name: str) -> str:
    """Return the line that gives leases to a tenant again."""
    return f"byokeep admin resume-tenant {name} --reason TEXT"


def way_out(status: admin_pb2.GetStatusResponse, name: str) -> str:
    """Return how a tenant that gets no lease gets some again; empty where it is not held."""
    if name in status.broken_tenants:
        return (
            "its stored state is not what keyvault wrote last: find out who changed it, put it back"
        )
    return resume_hint(name) if name in status.held_tenants else ""


def shredded(worth: str) -> str:
    """Return what became of a tenant's KEK; `worth`: the backend's shredding, as it declares."""
    return f"its key-encryption key is {_SHREDDED.get(worth, f'shredded ({clean(worth)})')}"


def _create(
    connection: Connection, resource: str, plan: str
) -> tuple[tenant_pb2.Tenant, grpc.RpcError | None]:
    """Return the tenant, and how the call was refused where it was there before: one that
    broke off before the KEK may have left it. Raises the refusal where it is deleted."""
    import grpc

    from byokeep.errors import error_info

    request = tenant_pb2.CreateTenantRequest(name=resource, plan=plan, request_id=request_id())
    try:
        return connection.tenants.CreateTenant(request).tenant, None
    except grpc.RpcError as error:
        if error_info(error).reason != "TENANT_EXISTS":
            raise
        every = tenant_pb2.ListTenantsRequest(page_size=500)
        listed = pages(connection.tenants.ListTenants, every, "tenants")
        found = next((entry for entry in listed if entry.name == resource), None)
        # A tenant that was deleted keeps its name, and must not get a KEK again.
        if found is None or found.state == tenant_pb2.TENANT_STATE_DELETED:
            raise
        return found, error


def _role(role: RoleName) -> options_pb2.TenantRole.ValueType:
    return options_pb2.TenantRole.Value(f"TENANT_ROLE_{role.name}")


def _roles(entry: tenant_pb2.Caller) -> str:
    named = [short(options_pb2.TenantRole, role).lower().replace("_", "-") for role in entry.roles]
    return ", ".join(named + ["may assert users"] * entry.may_assert_users)
