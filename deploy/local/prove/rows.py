"""Rows that somebody with PostgreSQL's superuser swaps, alters, plants and restores."""

from __future__ import annotations

import hashlib
from functools import partial

from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, state_pb2
from byokeep.names import tenant_name

from deploy.local.material import DEPLOYMENT
from deploy.local.prove.access import SECONDS
from deploy.local.prove.attack import GotThroughError, Group, NotShownError, refused
from deploy.local.prove.attacker import Attacker
from deploy.local.prove.audit import export, short, verify
from deploy.local.prove.backup import Backup
from deploy.local.prove.forge import Child, Victim

GROUP = Group("Writing to keyvault's database")
_HOLDS = "PostgreSQL's superuser, the runner's certificate, the grant signing key"
_LINK = b"byokeep/audit/v1\n"

_SWAP = """
UPDATE key_secret AS mine SET envelope = other.envelope, wrapped_dek = other.wrapped_dek
FROM key_secret AS other
WHERE mine.key_id = ANY(%s) AND other.key_id = ANY(%s)
  AND (mine.key_id, mine.version) <> (other.key_id, other.version)
"""
_OLD_CIPHERTEXT = """
UPDATE key_secret AS mine SET envelope = old.envelope, wrapped_dek = old.wrapped_dek
FROM key_secret AS old
WHERE mine.key_id = %s AND old.key_id = mine.key_id AND mine.version = 2 AND old.version = 1
"""
_PARTS = "SELECT part, state FROM tenant_part WHERE tenant = %s"
_SET_PART = "UPDATE tenant_part SET state = %s WHERE tenant = %s"
_SWAP_PARTS = """
UPDATE tenant_part AS mine SET state = other.state, usage = other.usage
FROM tenant_part AS other
WHERE mine.tenant = ANY(%s) AND other.tenant = ANY(%s) AND mine.tenant <> other.tenant
"""
_RESET = "UPDATE tenant SET usage = '' WHERE name = %s"
_FORGET = "DELETE FROM lease WHERE tenant = %s"
_HEAD = "SELECT generation, sequence, head_hash FROM tenant WHERE name = %s"
_PLANT_EVENT = (
    "INSERT INTO event (tenant, sequence, key_id, body, hash) VALUES (%s, %s, %s, %s, %s)"
)
_PLANT_LEAF = """
INSERT INTO log_leaf SELECT max(index) + 1, %s, %s, %s, %s, sha256('blind'), sha256('leaf')
FROM log_leaf
"""


@GROUP.attack("an old row restored whole: REVOKED is ACTIVE again", holds=_HOLDS)
def row_restored_whole(attacker: Attacker) -> str:
    """Its MAC is genuine, of its own past; only keyvault's memory and its log know that."""
    victim = attacker.active()
    backup = Backup(attacker, victim.tenant)
    attacker.revoke(victim)
    backup.put_back("tenant", "tenant_part", "key_secret")
    return f"{_rolled_back(attacker, victim)}, at once"


@GROUP.attack("a tenant of an hour ago, with its audit chain", holds=_HOLDS)
def tenant_restored_whole(attacker: Attacker) -> str:
    """Row, keys, ciphertext and events: whole, genuine, and over."""
    victim = attacker.active()
    attacker.check_that_it_leases(victim)
    backup = Backup(attacker, victim.tenant)
    attacker.revoke(victim)
    backup.put_back()
    return _rolled_back(attacker, victim)


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


@GROUP.attack("a new version with the old one's ciphertext", holds=_HOLDS)
def row_of_another_version(attacker: Attacker) -> str:
    """What was rotated because it had leaked would be used on."""
    first = attacker.active()
    second = attacker.stage(first.tenant, key_id=first.key_id, operation="rotate")
    attacker.custody.PromoteKeyVersion(
        custody_pb2.PromoteKeyVersionRequest(
            name=second.name, version=second.version, request_id=new_id("req"), actor="make prove"
        ),
        timeout=SECONDS,
    )
    attacker.check_that_it_leases(second)
    attacker.sql(_OLD_CIPHERTEXT, second.key_id)
    return _tampered(attacker, second)


@GROUP.attack("REVOKED set to ACTIVE", holds=_HOLDS)
def row_state_set_by_sql(attacker: Attacker) -> str:
    """A tenant's row has the digest of each of its parts, under one MAC."""
    victim = attacker.active()
    attacker.revoke(victim)
    ((_, raw),) = attacker.sql(_PARTS, victim.tenant)
    part = state_pb2.PartState.FromString(raw)
    part.keys[0].versions[0].state = custody_pb2.KEY_VERSION_STATE_ACTIVE
    attacker.sql(_SET_PART, part.SerializeToString(deterministic=True), victim.tenant)
    return refused(lambda: attacker.take(victim), "STATE_TAMPERED")


@GROUP.attack("two tenants' keys swapped", holds=_HOLDS)
def part_swapped_between_tenants(attacker: Attacker) -> str:
    """With what each of them used."""
    victims = attacker.active(), attacker.active()
    for victim in victims:
        attacker.check_that_it_leases(victim)
    tenants = [victim.tenant for victim in victims]
    attacker.sql(_SWAP_PARTS, tenants, tenants)
    how = ""
    for victim in victims:
        how = refused(partial(attacker.take, victim), "STATE_TAMPERED")
    return how


@GROUP.attack("a tenant's usage reset, a redeemed grant again", holds=_HOLDS)
def usage_reset(attacker: Attacker) -> str:
    """Single use and caps rest on the MAC."""
    victim = attacker.active()
    request = attacker.request(victim, Child())
    attacker.release(attacker.lease(request))
    attacker.sql(_RESET, victim.tenant)
    return refused(lambda: attacker.lease(request), "STATE_TAMPERED")


@GROUP.attack("a tenant's usage put back, a redeemed grant again", holds=_HOLDS)
def usage_put_back(attacker: Attacker) -> str:
    """With the row that it was in: a lease moves the head, so that row is old."""
    victim = attacker.active()
    backup = Backup(attacker, victim.tenant)
    request = attacker.request(victim, Child())
    attacker.release(attacker.lease(request))
    backup.put_back()
    how = refused(lambda: attacker.lease(request), "ROLLED_BACK")
    _rolled_back(attacker, victim)
    return how


@GROUP.attack("a lease's row deleted, its grant again", holds=_HOLDS)
def lease_row_deleted(attacker: Attacker) -> str:
    """That table is an index for people alone."""
    victim = attacker.active()
    request = attacker.request(victim, Child())
    attacker.lease(request)
    attacker.sql(_FORGET, victim.tenant)
    how = refused(lambda: attacker.lease(request), "GRANT_REFUSED")
    attacker.check_that_it_leases(victim)
    return how


@GROUP.attack("an event planted past the head of a chain", holds=_HOLDS)
def event_planted(attacker: Attacker) -> str:
    """Well linked, and it says that a revoked key is ACTIVE: nothing follows from an event."""
    victim = attacker.active()
    attacker.revoke(victim)
    chain = tenant_name(victim.tenant)
    ((_, sequence, digest),) = attacker.sql(_HEAD, victim.tenant)
    event = audit_pb2.AuditEvent(
        deployment=DEPLOYMENT,
        chain=chain,
        sequence=sequence + 1,
        type=audit_pb2.AUDIT_EVENT_TYPE_PROMOTED,
        key_id=victim.key_id,
        key_version=victim.version,
    )
    event.event_time.GetCurrentTime()
    body = event.SerializeToString(deterministic=True)
    link = hashlib.sha256(_LINK + digest + body).digest()
    attacker.sql(_PLANT_EVENT, victim.tenant, sequence + 1, victim.key_id, body, link)
    how = refused(lambda: attacker.take(victim), "WRONG_STATE")
    path = attacker.loot("planted.jsonl")
    status, said = export(attacker, chain, path)
    if status == 0:
        status, said = verify(attacker, path)
    if status:
        raise NotShownError(f"the chain before it does not verify: {short(said)}")
    if len(path.read_text().splitlines()) != sequence + 1:
        raise GotThroughError("the planted event is in an export that verifies")
    return f"{how}, and no export has it"


@GROUP.attack("a leaf planted in the log, for an old head", holds=_HOLDS)
def leaf_planted(attacker: Attacker) -> str:
    """The newest leaf of a tenant says what its newest head is, had SQL the key of its blind."""
    victim = attacker.active()
    backup = Backup(attacker, victim.tenant)
    ((generation, sequence, digest),) = attacker.sql(_HEAD, victim.tenant)
    attacker.revoke(victim)
    attacker.sql(_PLANT_LEAF, generation, victim.tenant, sequence, digest)
    backup.put_back()
    how = _rolled_back(attacker, victim)
    # Another tenant's next change is anchored behind it.
    attacker.check_that_it_leases(attacker.active())
    return how


def _rolled_back(attacker: Attacker, victim: Victim) -> str:
    """An old row stops its own tenant: all of what there is, and nothing else."""
    how = refused(lambda: attacker.take(victim), "ROLLED_BACK")
    attacker.check_that_it_leases(attacker.victim)
    return how


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
