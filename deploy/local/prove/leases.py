"""Leases that a rogue orchestrator asks for with valid grants."""

from __future__ import annotations

import grpc
from byokeep.errors import error_info

from deploy.local.prove.attack import GotThroughError, Group, refused
from deploy.local.prove.attacker import Attacker

GROUP = Group("A rogue orchestrator with valid grants")
_BOTH = "the runner's certificate and the orchestrator's grant signing key"
_MOST = 2_000


@GROUP.attack("a key that is revoked", holds=_BOTH)
def lease_of_a_revoked_key(attacker: Attacker) -> str:
    """From the moment that RevokeKey returns."""
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    attacker.revoke(victim)
    return refused(lambda: attacker.take(victim), "WRONG_STATE")


@GROUP.attack("a key that is destroyed", holds=_BOTH)
def lease_of_a_destroyed_key(attacker: Attacker) -> str:
    """Its ciphertext is gone as well."""
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    attacker.destroy(victim)
    return refused(lambda: attacker.take(victim), "WRONG_STATE", "GRANT_REFUSED")


@GROUP.attack("a review on a key that is not validated yet", holds=_BOTH)
def lease_of_a_pending_key(attacker: Attacker) -> str:
    """PENDING is leased for validation alone."""
    victim = attacker.stage(attacker.new_tenant())
    return refused(lambda: attacker.take(victim), "WRONG_STATE")


@GROUP.attack("more leases than the tenant's cap", holds=_BOTH)
def lease_above_the_cap(attacker: Attacker) -> str:
    """keyvault counts, so that who signs grants can't lift it."""
    victim = attacker.active()
    for given in range(_MOST):
        try:
            attacker.take(victim)
        except grpc.RpcError as error:
            info = error_info(error)
            if info.reason != "LEASE_CAP" or not given:
                raise
            cap = info.metadata.get("cap", "")
            return f"{info.code.name} LEASE_CAP {cap} after {given} leases"
    raise GotThroughError(f"{_MOST} leases of one tenant were given at once")
