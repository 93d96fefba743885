"""Grants: mutated, replayed, raced, presented by the wrong one."""

from __future__ import annotations

import asyncio
import datetime

import grpc
import pytest
from byokeep import dsse
from byokeep.errors import error_info
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, grant_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.harness import keyvault as kv
from tests.harness.keyvault import Child, grant_for, lease_request, refusal, try_lease

_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
UNIFORM = (grpc.StatusCode.PERMISSION_DENIED, "GRANT_REFUSED", "the grant was refused")


async def _uniformly_refused(keyvault, request, runner="runner", what=""):
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.leases(runner).LeaseKey(request)
    info = error_info(error.value)
    assert (info.code, info.reason, info.message) == UNIFORM, what


def _now(seconds=0.0):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


MUTATIONS = {
    "grant_id": "",
    "deployment": "other",
    "tenant": "evil",
    "owner": "ann",
    "provider": 2,
    "key_id": "key_" + "0" * 26,
    "key_version": 9,
    "attempt_id": "",
    "purpose": 0,
    "runner_class": "other",
    "recipient_key_sha256": b"x" * 32,
}
_TIMES = {
    "expired past the skew": (-40, -6),
    "not yet valid past the skew": (6, 30),
    "too long a life": (0, 61),
    "ends before it starts": (0, -1),
}


async def test_grant_mutation_signed(keyvault):
    """25. A correctly signed grant with one wrong field gets the one uniform answer.

    Shown to fail: per field, by removing its check in grants.verify, grants.check_holder
    or Redemption._check_key.
    """
    await keyvault.create_tenant("evil")
    key = await keyvault.add_active()
    child = Child()
    for field, value in MUTATIONS.items():
        grant = grant_for(key, child, **{field: value})
        request = lease_request(keyvault.deployment, grant, child)
        await _uniformly_refused(keyvault, request, what=field)


async def test_grant_mutation_unsigned(keyvault):
    """25. Any field changed after signing breaks the signature.

    Shown to fail: with dsse.verify returning the payload without verifying.
    """
    key = await keyvault.add_active(owner="ann")
    child = Child()
    for field in grant_pb2.Grant.DESCRIPTOR.fields_by_name:
        request = lease_request(keyvault.deployment, grant_for(key, child), child)
        changed = grant_pb2.Grant.FromString(request.grant.payload)
        changed.ClearField(field)
        request.grant.payload = changed.SerializeToString()
        await _uniformly_refused(keyvault, request, what=field)


async def test_grant_mutation_times(keyvault):
    """25. Life of at most 60 s, by the database's clock, with 5 s of skew.

    Shown to fail: with MAX_LIFE_SECONDS of an hour, and without check_time.
    """
    key = await keyvault.add_active()
    child = Child()
    for what, (issued, expires) in _TIMES.items():
        grant = grant_for(key, child, issue_time=_now(issued), expire_time=_now(expires))
        request = lease_request(keyvault.deployment, grant, child)
        await _uniformly_refused(keyvault, request, what=what)


async def test_grant_mutation_within_the_skew(keyvault):
    """25. The tolerance is there."""
    key = await keyvault.add_active()
    for issued, expires in ((-33, -3), (3, 33)):
        changes = {"issue_time": _now(issued), "expire_time": _now(expires)}
        assert await try_lease(keyvault, key, **changes) == ""


async def test_grant_mutation_signers(keyvault, deployment):
    """25. Wrong payload type, unknown key, and another's key id are refused.

    Shown to fail: with the payload type left out of dsse.verify.
    """
    key = await keyvault.add_active()
    child = Child()
    grant = grant_for(key, child)
    stranger = Ed25519PrivateKey.generate()
    known = kv.public_key_id("gsk", deployment.grant_key.public_key().public_bytes_raw())
    for request in (
        lease_request(deployment, grant, child, payload_type=dsse.INTAKE_KEY),
        lease_request(deployment, grant, child, signer=stranger),
        lease_request(deployment, grant, child, signer=stranger, key_id=known),
    ):
        await _uniformly_refused(keyvault, request)


async def test_grant_mutation_is_on_the_record(keyvault):
    """25. The system chain knows the reason that the caller was not told."""
    key = await keyvault.add_active()
    await try_lease(keyvault, key, runner_class="other")
    await keyvault.app._denials.flush(0.0)
    last = (await keyvault.events("system"))[-1]
    assert last.type == audit_pb2.AUDIT_EVENT_TYPE_DENIED
    assert (last.reason, last.count) == ("grant: runner class", 1)


async def test_grant_race(keyvault):
    """26. 50 redemptions of one grant at once: exactly one succeeds.

    Shown to fail: without the look at used grants in Leasing._may_lease.
    """
    key = await keyvault.add_active()
    child = Child()
    request = lease_request(keyvault.deployment, grant_for(key, child), child)
    reasons = await asyncio.gather(
        *(refusal(keyvault.leases().LeaseKey(request)) for _ in range(50))
    )
    assert sorted(reasons) == [""] + ["GRANT_REFUSED"] * 49
    leased = [e for e in await keyvault.events() if e.type == audit_pb2.AUDIT_EVENT_TYPE_LEASED]
    assert len(leased) == 1


async def test_grant_race_with_a_restart(keyvault, deployment):
    """26. After a restart a redeemed grant stays redeemed."""
    key = await keyvault.add_active()
    child = Child()
    request = lease_request(deployment, grant_for(key, child), child)
    assert await refusal(keyvault.leases().LeaseKey(request)) == ""
    async with kv.running(deployment) as second:
        assert await refusal(second.leases().LeaseKey(request)) == "GRANT_REFUSED"


async def test_confused_deputy_other_key(keyvault):
    """27. Attempt A's grant does not fetch B's key: key and tenant are what was signed."""
    await keyvault.create_tenant("evil")
    mine = await keyvault.add_active(tenant="evil")
    theirs = await keyvault.add_active()
    child = Child()
    grant = grant_for(mine, child, key_id=theirs.name.split("/")[3])
    await _uniformly_refused(keyvault, lease_request(keyvault.deployment, grant, child))


async def test_confused_deputy_outside_the_runner_class(keyvault):
    """27. A stolen grant is worth nothing to a runner of another class.

    Shown to fail: without the class comparison in grants.check_holder.
    """
    key = await keyvault.add_active()
    child = Child()
    request = lease_request(keyvault.deployment, grant_for(key, child), child)
    await _uniformly_refused(keyvault, request, runner="sibling")


async def test_confused_deputy_substituted_public_key(keyvault):
    """27. Another public key than the signed one is refused.

    Shown to fail: without the digest comparison in grants.check_holder.
    """
    key = await keyvault.add_active()
    child, thief = Child(), Child()
    request = lease_request(keyvault.deployment, grant_for(key, child), child)
    request.recipient_public_key = thief.public_key
    await _uniformly_refused(keyvault, request)


async def test_confused_deputy_sibling_can_not_open(keyvault):
    """27. Who presents a sibling's grant gets a seal that only the sibling's child opens.

    Shown to fail: by sealing to a key of keyvault's own choice, trivially.
    """
    key = await keyvault.add_active()
    child, thief = Child(), Child()
    request = lease_request(keyvault.deployment, grant_for(key, child), child)
    answer = await keyvault.leases().LeaseKey(request)
    with pytest.raises(kv.hpke.SealError):
        thief.open(request, answer)
    assert child.open(request, answer) == kv.PROVIDER_KEY


async def test_rogue_orchestrator_in_flight_cap(deployment):
    """28, in part (see test_rogue_orchestrator.py). Valid grants above the tenant's cap are
    refused by keyvault itself."""
    async with kv.running(deployment, tenant_leases_in_flight=3) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        reasons = [await try_lease(keyvault, key) for _ in range(5)]
        assert reasons == ["", "", "", "LEASE_CAP", "LEASE_CAP"]


async def test_a_revocation_that_commits_first_wins(keyvault, deployment):
    """A lease that waits for the tenant's lock sees what a revocation at another replica did
    meanwhile.

    Shown to fail: without FOR UPDATE in _ROWS_TO_WRITE, and with _PARTS read by the same statement
    that waits: PostgreSQL then returns the parts as they were before the wait.
    """
    key = await keyvault.add_active()
    async with kv.running(deployment) as second, kv.database(deployment) as watching:

        async def waiting(number: int) -> None:
            async with asyncio.timeout(60):
                while (await (await watching.execute(_WAITING)).fetchone())[0] < number:
                    await asyncio.sleep(0.02)

        async with keyvault.app.database.transaction() as connection:
            await connection.execute("SELECT 1 FROM tenant WHERE name = 'acme' FOR UPDATE")
            revoked = asyncio.create_task(second.change("RevokeKey", key.name))
            await waiting(1)
            lease = asyncio.create_task(try_lease(keyvault, key))
            await waiting(2)
        assert await lease == "WRONG_STATE"
        assert (await revoked).state == custody_pb2.KEY_VERSION_STATE_REVOKED
