"""Holds the audit log of a Vault against keyvault's: which data keys were opened, and why.

keyvault names the lease in a header of each request that opens a tenant's data key, and
Vault's audit device records it (deploy/vault makes it do so). An opening that names no
lease, one that the tenant's chain does not know, or one that was used already, was not
keyvault's doing, or keyvault did not tell.

Vault's audit log is JSON Lines, https://developer.hashicorp.com/vault/docs/audit/schema.
What it holds back is hashed by Vault; paths, times and the header stand in the clear.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from byokeep.keyvault.v1 import audit_pb2

#: How far the clocks of Vault and of keyvault's database, and a slow call, may be apart.
WINDOW = datetime.timedelta(seconds=60)
_HEADER = "x-byokeep-lease"
_TAKES_A_KEY_OUT = ("export/", "backup/", "byok-export/")


class VaultLogError(Exception):
    """The file is not an audit log of Vault; the text says where."""


@dataclass(frozen=True, slots=True)
class Access:
    """One successful request that opened a data key or took a key out of Vault."""

    time: datetime.datetime
    path: str
    #: Tenant whose key it was; "" for keyvault's own, an intake key's or a content key's.
    tenant: str
    #: What the header named: a lease, or a key that moves between backends (`move_…`).
    purpose: str
    #: How many data keys it opened; 0 where it took out a key-encryption key.
    opened: int
    accessor: str
    remote_address: str


@dataclass(frozen=True, slots=True)
class Finding:
    """An access that nothing explains, and what is wrong with it."""

    access: Access
    what: str


@dataclass(slots=True)
class Chains:
    """What tenants' chains tell of leases and moves."""

    leases: dict[str, tuple[str, datetime.datetime]] = field(default_factory=dict)
    #: When the last rewrap or move of each tenant was over.
    moves: dict[str, datetime.datetime] = field(default_factory=dict)

    def add(self, event: audit_pb2.AuditEvent) -> None:
        """Take an event in, of any chain."""
        kind, tenant = event.type, event.chain.removeprefix("tenants/")
        time = event.event_time.ToDatetime(datetime.UTC)
        if kind == audit_pb2.AUDIT_EVENT_TYPE_LEASED:
            self.leases[event.lease_id] = (tenant, time)
        elif kind == audit_pb2.AUDIT_EVENT_TYPE_REWRAPPED:
            self.moves[tenant] = max(time, self.moves.get(tenant, time))


def read(
    lines: Iterable[str], *, mount: str, prefix: str, namespace: str | None = None
) -> Iterator[Access]:
    """Yield what the log tells of Transit keys with a prefix, at a mount; of one namespace, or
    of all of them.

    Raises:
        VaultLogError: a line is not of an audit log.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            asked = entry["type"] == "response" and _in(entry["request"], namespace)
            found = _access(entry, mount, prefix) if asked else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise VaultLogError(f"line {number} is not of a Vault audit log") from None
        if found is not None:
            yield found


def unexplained(accesses: Iterable[Access], chains: Chains) -> Iterator[Finding]:
    """Yield the accesses to tenants' keys that no lease explains."""
    used: set[str] = set()
    for access in accesses:
        what = _fault(access, chains, used)
        if what:
            yield Finding(access, what)


def _fault(access: Access, chains: Chains, used: set[str]) -> str:
    if not access.opened:
        return "a key-encryption key was taken out of Vault"
    if not access.tenant:
        return ""
    if access.opened > 1:
        return f"{access.opened} data keys were opened at once, which keyvault never does"
    if not access.purpose:
        return "no lease is named"
    if access.purpose.startswith("move_"):
        end = chains.moves.get(access.tenant)
        moved = end is not None and access.time <= end + WINDOW
        return "" if moved else "a move between backends is named that the chain does not have"
    tenant, time = chains.leases.get(access.purpose, ("", access.time))
    if tenant != access.tenant:
        return "a lease is named that the tenant's chain does not have"
    if access.purpose in used:
        return "a lease is named that opened a data key before"
    used.add(access.purpose)
    if abs(access.time - time) > WINDOW:
        return f"the lease it names was given at another time, {time:%Y-%m-%d %H:%M:%S}Z"
    return ""


def _in(request: Mapping[str, Any], namespace: str | None) -> bool:
    path: str = (request.get("namespace") or {}).get("path", "")
    return namespace is None or path.strip("/") == namespace.strip("/")


def _access(entry: Mapping[str, Any], mount: str, prefix: str) -> Access | None:
    request = entry["request"]
    path: str = request.get("path", "")
    if not path.startswith(f"{mount}/") or entry.get("error"):
        return None
    data = (entry.get("response") or {}).get("data") or {}
    action = path.removeprefix(f"{mount}/")
    if "error" in data:
        return None
    if action.startswith(f"decrypt/{prefix}"):
        opened = len(data.get("batch_results") or [None])
    elif action.startswith(_TAKES_A_KEY_OUT) and prefix in action:
        opened = 0
    else:
        return None
    headers = {name.lower(): values for name, values in (request.get("headers") or {}).items()}
    return Access(
        time=_time(entry["time"]),
        path=path,
        tenant=_tenant(action, prefix),
        purpose=(headers.get(_HEADER) or [""])[0],
        opened=opened,
        accessor=(entry.get("auth") or {}).get("accessor", ""),
        remote_address=request.get("remote_address", ""),
    )


def _tenant(action: str, prefix: str) -> str:
    key = action.split("/", 1)[1]
    _, found, name = key.partition(f"{prefix}tenant-")
    # A name that ends in "-" has "_" after it in Vault.
    return (name[:-1] if name.endswith("-_") else name).split("/")[0] if found else ""


def _time(text: str) -> datetime.datetime:
    # Nanoseconds, of which Python reads six digits.
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment + datetime.timedelta(microseconds=int(fraction[:6].ljust(6, "0") or 0))
