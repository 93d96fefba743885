"""The whole database, put back to an older state."""

from __future__ import annotations

from byokeep.keyvault.v1 import admin_pb2

from deploy.local.processes import wait_for
from deploy.local.prove.access import SECONDS
from deploy.local.prove.attack import Group, NotShownError, refused
from deploy.local.prove.attacker import Attacker

GROUP = Group("The whole database, from a backup")
_HOLDS = "PostgreSQL's superuser, a backup of an hour ago, the grant signing key"
_ANCHORED_SECONDS = 60.0
_COPY = "keyvault_backup"


@GROUP.attack("a revoked key back to life in an old database", holds=_HOLDS, disruptive=True)
def database_restored(attacker: Attacker) -> str:
    """Everything in it is consistent and genuine; only the anchor, outside, has gone on."""
    _resume(attacker, "make prove: between two attacks")
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    _replace(attacker, "keyvault", _COPY)
    before = _anchor(attacker)
    attacker.revoke(victim)
    if not wait_for(lambda: _anchor(attacker) != before, _ANCHORED_SECONDS):
        raise NotShownError("keyvault does not move its anchor")
    _replace(attacker, _COPY, "keyvault")
    how = refused(lambda: attacker.take(victim), "DATABASE_ROLLED_BACK")
    status, said = attacker.byokeep(
        "admin", "resume-leases", "--reason", "make prove", "--profile", "operator"
    )
    if status:
        raise NotShownError(f"an operator can't resume: {said.strip()}")
    attacker.check_that_it_leases(victim)
    return f"{how}, until byokeep admin resume-leases"


def _resume(attacker: Attacker, reason: str) -> None:
    status = attacker.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=SECONDS)
    if not status.leases_allowed:
        attacker.admin.ResumeLeases(admin_pb2.ResumeLeasesRequest(reason=reason), timeout=SECONDS)


def _replace(attacker: Attacker, source: str, target: str) -> None:
    """Make one database the copy of another, while keyvault is down."""
    keyvault = attacker.stack.process("keyvault")
    keyvault.kill()
    with attacker.stack.postgres.connect() as session:
        session.execute(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)".encode())
        session.execute(
            f"CREATE DATABASE {target} OWNER byokeep_keyvault TEMPLATE {source}".encode()
        )
    keyvault.start()
    attacker.stack.wait_ready("keyvault")
    attacker.hang_up()


def _anchor(attacker: Attacker) -> bytes:
    return (attacker.state.secrets / "anchor").read_bytes()
