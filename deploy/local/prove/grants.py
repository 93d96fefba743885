"""Grants: used twice, stolen, forged, out of time."""

from __future__ import annotations

import datetime

from byokeep import hpke
from byokeep.ids import public_key_id
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.prove.attack import GotThroughError, Group, NotShownError, refused
from deploy.local.prove.attacker import Attacker
from deploy.local.prove.forge import Child, grant_for, signed

GROUP = Group("Grants: used twice, stolen, forged")
_RUNNER = "the runner's certificate"
_READ = f"{_RUNNER}, and a grant read on its way"
_BOTH = "the runner's certificate and the orchestrator's grant signing key"


@GROUP.attack("a redeemed grant, again", holds=_READ)
def grant_replayed(attacker: Attacker) -> str:
    """The very bytes that were answered a moment ago."""
    child = Child()
    request = attacker.request(attacker.victim, child)
    attacker.release(attacker.lease(request))
    return refused(lambda: attacker.lease(request), "GRANT_REFUSED")


@GROUP.attack("another child's public key", holds=_READ)
def grant_with_another_key(attacker: Attacker) -> str:
    """The grant names the digest of the key that may be sealed to."""
    request = attacker.request(attacker.victim, Child())
    request.recipient_public_key = Child().public_key
    return refused(lambda: attacker.lease(request), "GRANT_REFUSED")


@GROUP.attack("a stolen grant, presented whole", holds=_READ)
def grant_stolen_by_a_sibling(attacker: Attacker) -> str:
    """keyvault answers the runner class, but seals to the child that the grant names."""
    child, thief = Child(), Child()
    request = attacker.request(attacker.victim, child)
    lease = attacker.lease(request)
    try:
        thief.open(request, lease)
    except hpke.SealError:
        pass
    else:
        raise GotThroughError(f"the thief opened the seal of {lease.lease_id}")
    if child.open(request, lease) != attacker.victim.plaintext:
        raise NotShownError("the seal does not hold the key")
    attacker.release(lease)
    return "a seal that only the child in the grant opens"


@GROUP.attack("a grant that has expired", holds=_BOTH)
def grant_expired(attacker: Attacker) -> str:
    """Over for 20 s; keyvault allows 5 s of skew."""
    long_ago = datetime.timedelta(seconds=-50)
    return refused(lambda: attacker.take(attacker.victim, issued=long_ago), "GRANT_REFUSED")


@GROUP.attack("a grant for another deployment", holds=_BOTH)
def grant_for_another_deployment(attacker: Attacker) -> str:
    """Such as staging's, whose orchestrator shares the key."""
    return refused(lambda: attacker.take(attacker.victim, deployment="staging"), "GRANT_REFUSED")


@GROUP.attack("tenant A's grant for tenant B's key", holds=_BOTH)
def grant_across_tenants(attacker: Attacker) -> str:
    """A rogue orchestrator mixes what belongs to two customers."""
    tenant = attacker.new_tenant()
    return refused(lambda: attacker.take(attacker.victim, tenant=tenant), "GRANT_REFUSED")


@GROUP.attack("a grant that an unknown key has signed", holds=f"{_RUNNER} and a key of his own")
def grant_signed_by_a_stranger(attacker: Attacker) -> str:
    """Under his own key's id, and under the orchestrator's."""
    child, stranger = Child(), Ed25519PrivateKey.generate()
    grant = grant_for(attacker.victim, child)
    refused(lambda: attacker.lease(signed(grant, child, stranger)), "GRANT_REFUSED")
    known = public_key_id("gsk", attacker.grant_key.public_key().public_bytes_raw())
    return refused(lambda: attacker.lease(signed(grant, child, stranger, known)), "GRANT_REFUSED")


@GROUP.attack("a stolen grant, another runner class", holds="a runner's certificate, class other")
def grant_of_another_runner_class(attacker: Attacker) -> str:
    """A runner of another class is a runner, but not this grant's."""
    sibling = attacker.stack.authority.issue(attacker.loot("other"), spiffe_id="runner/other")
    return refused(lambda: attacker.take_as(sibling, attacker.victim), "GRANT_REFUSED")
