"""`byokeep admin reconcile-vault`: Vault's audit log held against keyvault's."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.session import Session, command, examples, pages
from byokeep.cli.base.text import clean
from byokeep.names import tenant_of

if TYPE_CHECKING:
    from byokeep.vaultlog import Access, Chains, Finding

app = typer.Typer()

_EXPORT_SECONDS = 600
_SHOWN = 100


@app.command(
    "reconcile-vault",
    epilog=examples(
        "byokeep admin reconcile-vault /var/log/vault/audit.log",
        "byokeep admin reconcile-vault vault.log --export acme.jsonl --export globex.jsonl",
    ),
)
@command()
def reconcile_vault(
    session: Session,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|-", show_default=False, help="Vault's audit log (JSON Lines); - is stdin."
        ),
    ],
    export: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Export of a tenant's chain, verified before; repeat it. Default: ask keyvault,"
            " as an auditor.",
        ),
    ] = None,
    mount: Annotated[str, typer.Option(help="Mount of the Transit engine.")] = "transit",
    prefix: Annotated[str, typer.Option(help="What keyvault's Transit keys start with.")] = (
        "byokeep-"
    ),
    namespace: Annotated[
        str | None,
        typer.Option(
            help="Vault's namespace that keyvault's keys are in; default: every one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Hold Vault's audit log against leases: show every data key that was opened without one.

    Each opening of a tenant's data key must name a lease of that tenant, given within a minute
    of it, and no lease opens two. Keys that are taken out of Vault are shown as well. Exits 6
    where there is anything to show, and where keyvault gave leases and the log has no opening.

    What is not in Vault's log can't be seen: keep it where Vault's administrators can't edit it.
    """
    from byokeep import vaultlog

    try:
        accesses = list(
            vaultlog.read(_lines(file), mount=mount, prefix=prefix, namespace=namespace)
        )
    except vaultlog.VaultLogError as error:
        name = "standard input" if file == "-" else file
        raise CliError(f"{name}: {error}", "vault audit enable file format=json …") from None
    tenants = sorted({access.tenant for access in accesses if access.tenant})
    chains = _from_files(export) if export else _from_keyvault(session, tenants)
    findings = list(vaultlog.unexplained(accesses, chains))
    _report(session, accesses, findings)
    if not tenants:
        _nothing_compared(session, bool(chains.leases) if export else _any_lease(session))
    if findings:
        raise CliError(
            f"{len(findings)} of {len(accesses)} accesses in Vault's log have no lease",
            _advice(accesses),
            Exit.INTEGRITY,
            "VAULT_ACCESS_UNEXPLAINED",
        )


def _advice(accesses: list[Access]) -> str:
    if not any(access.purpose for access in accesses):
        return "does Vault audit the header X-Byokeep-Lease? deploy/vault/setup.sh makes it"
    return "treat the token with that accessor as stolen: revoke it, then re-key the tenant"


def _nothing_compared(session: Session, leased: bool) -> None:
    # An empty log is what somebody leaves who wants nothing to be seen.
    what = "nothing was compared: the log has no opening of a tenant's data key"
    if leased:
        raise CliError(
            f"{what}, and keyvault gave leases",
            "is it the log of keyvault's Vault, from the time of those leases, and are --mount and"
            " --prefix right?",
            Exit.INTEGRITY,
            "VAULT_LOG_EMPTY",
        )
    session.out.warn(f"{what}, and keyvault gave no lease")


def _any_lease(session: Session) -> bool:
    """Say whether any tenant's chain has a lease."""
    from byokeep.keyvault.v1 import admin_pb2

    request = admin_pb2.ListTenantKeysRequest()
    listed = pages(session.connection.admin.ListTenantKeys, request, "tenant_keys")
    tenants = [tenant_of(one.tenant) for one in listed]
    return any(_from_keyvault(session, [tenant]).leases for tenant in tenants)


def _from_keyvault(session: Session, tenants: list[str]) -> Chains:
    from byokeep import vaultlog
    from byokeep.keyvault.v1 import audit_pb2

    chains = vaultlog.Chains()
    with session.out.progress("reading the chains …") as progress:
        for tenant in tenants:
            progress(f"reading the chain of {tenant} …")
            request = audit_pb2.ExportEventsRequest(parent=f"tenants/{tenant}")
            try:
                for item in session.connection.audit.ExportEvents(request, timeout=_EXPORT_SECONDS):
                    if item.HasField("event"):
                        chains.add(audit_pb2.AuditEvent.FromString(item.event.body))
            except Exception as error:
                if not _unknown(error):
                    raise
    return chains


def _unknown(error: Exception) -> bool:
    """Say whether keyvault knows no such tenant: then no lease explains what was opened."""
    import grpc

    return isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def _from_files(files: list[Path]) -> Chains:
    import base64
    import json

    from google.protobuf.message import DecodeError

    from byokeep import vaultlog
    from byokeep.keyvault.v1 import audit_pb2

    chains = vaultlog.Chains()
    for path in files:
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    if "event" in record:
                        body = base64.b64decode(record["event"]["body"])
                        chains.add(audit_pb2.AuditEvent.FromString(body))
                except (ValueError, KeyError, TypeError, RecursionError, DecodeError):
                    raise CliError(
                        f"{path} is not an audit export", "byokeep audit verify FILE"
                    ) from None
    return chains


def _lines(file: str) -> Iterator[str]:
    if file == "-":
        yield from sys.stdin
        return
    try:
        with Path(file).open(encoding="utf-8", errors="replace") as opened:
            yield from opened
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from None


def _report(session: Session, accesses: list[Access], findings: list[Finding]) -> None:
    held = [access for access in accesses if access.tenant]
    others = len(accesses) - len(held)
    if session.out.as_json:
        session.out.json(
            {
                "openings": len(held),
                "notHeldAgainstLeases": others,
                "unexplained": [
                    {
                        "time": finding.access.time.isoformat(),
                        "path": finding.access.path,
                        "tenant": finding.access.tenant,
                        "lease": finding.access.purpose,
                        "what": finding.what,
                        "accessor": finding.access.accessor,
                        "remoteAddress": finding.access.remote_address,
                    }
                    for finding in findings
                ],
            }
        )
        return
    out = session.out
    for finding in itertools.islice(findings, _SHOWN):
        access = finding.access
        out.print(
            f"{access.time:%Y-%m-%d %H:%M:%S}Z  {clean(access.path)}  {finding.what}", "bold red"
        )
        out.print(
            f"    lease {clean(access.purpose) or '-'}, from {clean(access.remote_address)},"
            f" token accessor {clean(access.accessor)}"
        )
    if len(findings) > _SHOWN:
        out.print(f"… and {len(findings) - _SHOWN} more; --json shows all")
    out.print(f"{len(held)} openings of tenants' data keys, {len(findings)} without a lease")
    if others:
        out.note(f"{others} of keyvault's own, intake and content keys: not held against leases")
