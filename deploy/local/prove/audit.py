"""The audit log: rows that are edited or cut off, found offline from exports."""

from __future__ import annotations

import json
from pathlib import Path

from byokeep.keyvault.v1 import audit_pb2
from byokeep.names import tenant_name

from deploy.local.prove.attack import GotThroughError, Group, NotShownError
from deploy.local.prove.attacker import Attacker
from deploy.local.prove.backup import Backup
from deploy.local.prove.forge import Victim

GROUP = Group("The audit log, edited by SQL and verified offline")
_HOLDS = "PostgreSQL's superuser"
_INTEGRITY = 6

_CUT = "DELETE FROM event WHERE tenant = %s AND sequence > %s"
_HEAD = "SELECT sequence FROM tenant WHERE name = %s"
_EDIT = "UPDATE event SET body = %s WHERE tenant = %s AND sequence = %s"


@GROUP.attack("an audit row edited", holds=_HOLDS)
def audit_row_edited(attacker: Attacker) -> str:
    """Another lease's event says that somebody else asked for it."""
    victim = _leased(attacker)
    chain, path = tenant_name(victim.tenant), attacker.loot("edited.jsonl")
    event = attacker.events(chain)[-2]
    edited = audit_pb2.AuditEvent.FromString(event.SerializeToString())
    edited.actor = "somebody else"
    body = edited.SerializeToString(deterministic=True)
    attacker.sql(_EDIT, body, victim.tenant, event.sequence)
    status, said = export(attacker, chain, path)
    if status == 0:
        status, said = verify(attacker, path)
    return _broken(status, said, event.sequence)


@GROUP.attack("the newest audit rows cut off", holds=_HOLDS)
def audit_rows_deleted(attacker: Attacker) -> str:
    """The head counts them, and no SQL can move it."""
    victim = _leased(attacker)
    chain, path = tenant_name(victim.tenant), attacker.loot("cut.jsonl")
    ((sequence,),) = attacker.sql(_HEAD, victim.tenant)
    attacker.sql(_CUT, victim.tenant, sequence - 2)
    status, said = export(attacker, chain, path)
    if status == 0:
        status, said = verify(attacker, path)
    return _broken(status, said, sequence - 1)


@GROUP.attack("the newest audit rows cut off, with their head", holds=_HOLDS)
def audit_tail_cut(attacker: Attacker) -> str:
    """The chain that is left is whole, and was signed once. keyvault knows more of it."""
    victim = attacker.active()
    backup = Backup(attacker, victim.tenant)
    attacker.check_that_it_leases(victim)
    chain, older = tenant_name(victim.tenant), attacker.loot("older.jsonl")
    status, said = export(attacker, chain, older)
    if status or verify(attacker, older)[0]:
        raise NotShownError(f"the untouched export does not verify: {short(said)}")
    backup.put_back()
    newer = attacker.loot("newer.jsonl")
    status, said = export(attacker, chain, newer)
    if status == 0:
        status, said = verify(attacker, newer, "--against", str(older))
    return _broken(status, said)


def _leased(attacker: Attacker) -> Victim:
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    return victim


def export(attacker: Attacker, chain: str, path: Path) -> tuple[int, str]:
    """Export a chain as the auditor; return exit code and output."""
    return attacker.byokeep(
        "audit", "export", "--chain", chain, "-o", str(path), "--profile", "auditor", "--json"
    )


def verify(attacker: Attacker, path: Path, *more: str) -> tuple[int, str]:
    """Verify an export as the auditor; return exit code and output."""
    return attacker.byokeep("audit", "verify", str(path), *more, "--profile", "auditor", "--json")


def short(said: str) -> str:
    """Return what a command said in one line."""
    return " ".join(said.split())[:300]


def _broken(status: int, said: str, *links: int) -> str:
    """Return how keyvault refused to sign, or verify to believe: then it has to name one of these
    links, the first broken one."""
    if status != _INTEGRITY:
        raise GotThroughError(f"byokeep audit verify ends with {status}: {short(said)}")
    error = json.loads(said)["error"]
    if error["reason"] == "ROLLED_BACK":
        return f"DATA_LOSS {error['reason']}: keyvault signs no head of such a chain"
    named = error["metadata"].get("sequence")
    if named not in map(str, links):
        raise GotThroughError(f"verify names link {named}: {short(said)}")
    return f"byokeep audit verify, exit code 6: {error['message'].partition(': ')[2]}"
