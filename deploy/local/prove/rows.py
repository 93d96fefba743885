"""Rows that somebody with PostgreSQL's superuser swaps, alters and restores."""

from __future__ import annotations

import time

from byokeep.keyvault.v1 import audit_pb2

from deploy.local.prove.attack import GotThroughError, Group, Waiting, refused
from deploy.local.prove.attacker import Attacker
from deploy.local.prove.forge import Victim

GROUP = Group("Writing to keyvault's database")
_HOLDS = "PostgreSQL's superuser, the runner's certificate, the grant signing key"
# The architecture's bound for the reconcile pass; more than that is a failure.
_RECONCILED_SECONDS = 60.0
_MISMATCH = "RECONCILE_MISMATCH"

_SWAP = """
UPDATE key_version AS mine SET envelope = other.envelope, wrapped_dek = other.wrapped_dek
FROM key_version AS other
WHERE mine.key_id = ANY(%s) AND other.key_id = ANY(%s)
  AND (mine.key_id, mine.version) <> (other.key_id, other.version)
"""
_ACTIVATE = "UPDATE key_version SET state = 2 WHERE key_id = %s"  # KEY_VERSION_STATE_ACTIVE
_READ = "SELECT * FROM key_version WHERE key_id = %s"
_DELETE = "DELETE FROM key_version WHERE key_id = %s"


@GROUP.attack("an old row restored whole: REVOKED is ACTIVE again", holds=_HOLDS)
def row_restored_whole(attacker: Attacker) -> Waiting:
    """Its MAC is genuine, of its own past; only the audit chain knows that it is past."""
    victim = attacker.active()
    (row,) = attacker.sql(_READ, victim.key_id)
    attacker.revoke(victim)
    attacker.sql(_DELETE, victim.key_id)
    attacker.sql(f"INSERT INTO key_version VALUES ({', '.join(['%s'] * len(row))})", *row)  # noqa: S608 - placeholders
    restored = time.monotonic()

    def look() -> str | None:
        if not _recorded(attacker, victim, _MISMATCH):
            return None
        seconds = time.monotonic() - restored
        how = refused(lambda: attacker.take(victim), _MISMATCH)
        return f"{how}, frozen {seconds:.0f} s later and on the record"

    return Waiting(look, _RECONCILED_SECONDS, "the reconcile pass")


@GROUP.attack("two tenants' rows swapped", holds=_HOLDS)
def row_swapped_between_tenants(attacker: Attacker) -> str:
    """Each tenant would pay for the other."""
    return _swapped(attacker, attacker.active(), attacker.active())


@GROUP.attack("two providers' rows swapped", holds=_HOLDS)
def row_swapped_between_providers(attacker: Attacker) -> str:
    """Each key would be sent to the other provider."""
    tenant = attacker.new_tenant()
    mine = attacker.active(tenant)
    return _swapped(attacker, mine, attacker.active(tenant, provider="anthropic"))


@GROUP.attack("two versions' rows swapped", holds=_HOLDS)
def row_swapped_between_versions(attacker: Attacker) -> str:
    """The old key would serve under the new one's name."""
    victim = attacker.active()
    attacker.stage(victim.tenant, key_id=victim.key_id, operation="rotate")
    return _swapped(attacker, victim)


@GROUP.attack("REVOKED set to ACTIVE", holds=_HOLDS)
def row_state_set_by_sql(attacker: Attacker) -> str:
    """A state has a MAC; where the reconcile pass is first, it has frozen the key."""
    victim = attacker.active()
    attacker.revoke(victim)
    attacker.sql(_ACTIVATE, victim.key_id)
    return refused(lambda: attacker.take(victim), "STATE_TAMPERED", _MISMATCH)


def _swapped(attacker: Attacker, *victims: Victim) -> str:
    for victim in victims:
        attacker.check_that_it_leases(victim)
    ids = [victim.key_id for victim in victims]
    attacker.sql(_SWAP, ids, ids)
    how, *_ = [_tampered(attacker, victim) for victim in victims]
    return how


def _tampered(attacker: Attacker, victim: Victim) -> str:
    how = refused(lambda: attacker.take(victim), "ROW_TAMPERED")
    if not _recorded(attacker, victim, "ROW_TAMPERED"):
        raise GotThroughError(f"{how}, but {victim.tenant}'s audit chain does not say so")
    return f"{how}, on the record"


def _recorded(attacker: Attacker, victim: Victim, reason: str) -> bool:
    events = attacker.events(f"tenants/{victim.tenant}", victim.key_id)
    return any(
        event.type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED and event.reason == reason
        for event in events
    )
