"""The audit log: rows that are edited or cut off, found offline from exports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byokeep.keyvault.v1 import audit_pb2

from deploy.local.prove.attack import GotThroughError, Group, NotShownError
from deploy.local.prove.attacker import Attacker

# What is edited here, the reconcile pass may see and stop every lease for.
GROUP = Group("The audit log, edited by SQL and verified offline")
_HOLDS = "PostgreSQL's superuser"
_INTEGRITY = 6

_ROWS = "SELECT * FROM audit_event WHERE chain = %s AND sequence >= %s ORDER BY sequence"
_CUT = "DELETE FROM audit_event WHERE chain = %s AND sequence >= %s"
_HEAD = "SELECT sequence, hash FROM chain WHERE chain = %s"
_SET_HEAD = "UPDATE chain SET (sequence, hash) = (%s, %s) WHERE chain = %s"
_EDIT = "UPDATE audit_event SET body = %s WHERE chain = %s AND sequence = %s"


@GROUP.attack("an audit row edited", holds=_HOLDS, disruptive=True)
def audit_row_edited(attacker: Attacker) -> str:
    """Another lease's event says that somebody else asked for it."""
    chain = _chain_with_a_lease(attacker)
    event = attacker.events(chain)[-2]
    (before,) = attacker.sql(f"{_ROWS} LIMIT 1", chain, event.sequence)
    edited = audit_pb2.AuditEvent.FromString(event.SerializeToString())
    edited.actor = "somebody else"
    body = edited.SerializeToString(deterministic=True)
    with _undone(attacker, chain, [before]):
        attacker.sql(_EDIT, body, chain, event.sequence)
        status, said = _export(attacker, chain, attacker.loot("edited.jsonl"))
        if status == 0:
            status, said = _verify(attacker, attacker.loot("edited.jsonl"))
    return _broken(status, said, event.sequence)


@GROUP.attack("the newest audit rows cut off, with their head", holds=_HOLDS, disruptive=True)
def audit_tail_cut(attacker: Attacker) -> str:
    """The chain that is left is whole. keyvault followed more of it; so does an older export."""
    chain = _chain_with_a_lease(attacker)
    older, newer = attacker.loot("older.jsonl"), attacker.loot("newer.jsonl")
    status, said = _export(attacker, chain, older)
    if status or _verify(attacker, older)[0]:
        raise NotShownError(f"the untouched export does not verify: {_short(said)}")
    ((sequence, digest),) = attacker.sql(_HEAD, chain)
    tail = attacker.sql(_ROWS, chain, sequence - 1)
    ((previous,),) = attacker.sql(
        "SELECT hash FROM audit_event WHERE chain = %s AND sequence = %s", chain, sequence - 2
    )
    with _undone(attacker, chain, tail):
        attacker.sql(_CUT, chain, sequence - 1)
        attacker.sql(_SET_HEAD, sequence - 2, previous, chain)
        status, said = _export(attacker, chain, newer)
        attacker.sql(_SET_HEAD, sequence, digest, chain)
    if status == 0:
        status, said = _verify(attacker, newer, "--against", str(older))
    # An export may end before what was cut: at the last head that the log has.
    return _broken(status, said, *range(1, sequence))


def _chain_with_a_lease(attacker: Attacker) -> str:
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    return f"tenants/{victim.tenant}"


@contextmanager
def _undone(attacker: Attacker, chain: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """Put the rows back at the end: the attacks that follow need a keyvault that leases."""
    columns = ", ".join(["%s"] * len(rows[0]))
    try:
        yield
    finally:
        with attacker.stack.postgres.connect("keyvault") as session, session.transaction():
            for row in rows:
                session.execute(
                    "DELETE FROM audit_event WHERE chain = %s AND sequence = %s", row[:2]
                )
                session.execute(f"INSERT INTO audit_event VALUES ({columns})".encode(), row)  # noqa: S608


def _export(attacker: Attacker, chain: str, path: Path) -> tuple[int, str]:
    return attacker.byokeep(
        "audit", "export", "--chain", chain, "-o", str(path), "--profile", "auditor", "--json"
    )


def _verify(attacker: Attacker, path: Path, *more: str) -> tuple[int, str]:
    return attacker.byokeep("audit", "verify", str(path), *more, "--profile", "auditor", "--json")


def _short(said: str) -> str:
    return " ".join(said.split())[:300]


def _broken(status: int, said: str, *links: int) -> str:
    """Return how keyvault refused to sign, or verify to believe: then it has to name one of these
    links, the first broken one."""
    if status != _INTEGRITY:
        raise GotThroughError(f"byokeep audit verify ends with {status}: {_short(said)}")
    error = json.loads(said)["error"]
    if error["reason"] == "RECONCILE_MISMATCH":
        return f"DATA_LOSS {error['reason']}: keyvault signs no head of such a chain"
    named = error["metadata"].get("sequence")
    if named not in map(str, links):
        raise GotThroughError(f"link {links[-1]} was touched, and verify names {named}")
    return f"byokeep audit verify, exit code 6: {error['message'].partition(': ')[2]}"
