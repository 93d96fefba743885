"""28. An orchestrator that signs whatever it likes: keyvault's own limits hold."""

from __future__ import annotations

import asyncio
import datetime

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, grant_pb2, lease_pb2

from services.keyvault import lease, limits
from tests.harness import keyvault as kv
from tests.harness.keyvault import Child, grant_for, lease_request, released, try_lease

CAPS = [
    f"{whose}_leases_{what}"
    for whose in ("tenant", "key")
    for what in ("in_flight", "per_minute", "per_day")
]


@pytest.fixture
def one_window(monkeypatch):
    """All of the test is in one minute and one day, however slow the machine."""
    monkeypatch.setattr(limits, "_MINUTE", 10**11)
    monkeypatch.setattr(limits, "_DAY", 10**11)


async def _denials(keyvault) -> list[str]:
    await keyvault.app._denials.flush(0.0, everything=True)
    events = await keyvault.events("system")
    return [one.reason for one in events if one.type == audit_pb2.AUDIT_EVENT_TYPE_DENIED]


async def _lease(keyvault, key) -> lease_pb2.LeaseKeyResponse:
    child = Child()
    request = lease_request(keyvault.deployment, grant_for(key, child), child)
    return await keyvault.leases().LeaseKey(request)


async def _in_flight(keyvault) -> int:
    """How many leases count as live against the caps."""
    usage = (await keyvault.app.ledger.read("acme")).usage
    now = keyvault.app.ledger.now().timestamp() * 1_000
    return sum(not one.ended and one.expire_millis > now for one in usage.leases)


async def test_rogue_orchestrator_revoked_key(keyvault):
    """28. A valid grant for a revoked key is refused, and on the record.

    Shown to fail: with State.REVOKED among the states of a review; and, for the record,
    without the note in Leasing.lease.
    """
    key = await keyvault.add_active()
    await keyvault.change("RevokeKey", key.name)
    assert await try_lease(keyvault, key) == "WRONG_STATE"
    assert await _denials(keyvault) == ["WRONG_STATE: REVOKED tenants/acme"]
    assert await keyvault.sql("SELECT count(*) FROM lease") == [(0,)]


@pytest.mark.parametrize("cap", CAPS)
async def test_rogue_orchestrator_caps(deployment, one_window, cap):
    """28. Valid grants above each cap are refused by keyvault itself, and on the record.

    Shown to fail: per cap, without its line in limits.check.
    """
    async with kv.running(deployment, **{cap: 2}) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert [await try_lease(keyvault, key) for _ in range(2)] == ["", ""]
        with pytest.raises(grpc.RpcError) as error:
            await _lease(keyvault, key)
        info = error_info(error.value)
        assert (info.code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LEASE_CAP")
        name = cap.replace("_leases", "")
        assert (info.metadata["cap"], info.metadata["limit"]) == (name, "2")
        assert await keyvault.sql("SELECT count(*) FROM lease") == [(2,)]
        assert await _denials(keyvault) == [f"LEASE_CAP: {name} tenants/acme"]


@pytest.mark.parametrize("cap", CAPS)
async def test_a_cap_is_exact_for_grants_that_come_at_once(deployment, one_window, cap):
    """Redeemed in one group, or in several: never one more than the cap."""
    async with kv.running(deployment, **{cap: 5}) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        reasons = await asyncio.gather(*(try_lease(keyvault, key) for _ in range(12)))
        assert sorted(reasons) == [""] * 5 + ["LEASE_CAP"] * 7


@pytest.mark.parametrize("window", ["minute", "day"])
async def test_the_next_window_counts_from_zero(deployment, monkeypatch, window):
    """A cap per minute or day is over with it; a clock that went back opens nothing."""
    monkeypatch.setattr(limits, "_MINUTE", 10**9)
    monkeypatch.setattr(limits, "_DAY", 10**9)
    async with kv.running(deployment, **{f"key_leases_per_{window}": 1}) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        edge = datetime.datetime.fromtimestamp(2 * 10**9, datetime.UTC)

        async def leased(later: int) -> str:
            now = edge + datetime.timedelta(seconds=later)
            keyvault.app.ledger.now = lambda: now
            times = {"issue_time": now, "expire_time": now + datetime.timedelta(seconds=30)}
            return await try_lease(keyvault, key, **times)

        assert [await leased(-5) for _ in range(2)] == ["", "LEASE_CAP"]
        assert [await leased(1) for _ in range(2)] == ["", "LEASE_CAP"]
        assert await leased(-5) == "LEASE_CAP"


async def test_zero_is_no_cap(deployment):
    async with kv.running(deployment, **dict.fromkeys(CAPS, 0)) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert [await try_lease(keyvault, key) for _ in range(3)] == [""] * 3


async def test_a_key_cap_is_the_keys_alone(deployment, one_window):
    """One key's leases use up nothing of another's."""
    async with kv.running(deployment, key_leases_per_day=1) as keyvault:
        await keyvault.create_tenant()
        first, second = await keyvault.add_active(), await keyvault.add_active(name="b")
        reasons = [await try_lease(keyvault, one) for one in (first, first, second)]
        assert reasons == ["", "LEASE_CAP", ""]


async def test_whatever_ends_a_lease_gives_its_place_back(deployment):
    """In flight are the leases that live: released, expired, revoked ones are not, once each.

    Shown to fail: with `ended` and the expiry left out of Leasing._check_caps, and with releases
    that leave a lease in the usage.
    """
    async with kv.running(deployment, key_leases_in_flight=5) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        leases = [(await _lease(keyvault, key)).lease_id for _ in range(5)]
        assert await _in_flight(keyvault) == 5
        assert await try_lease(keyvault, key) == "LEASE_CAP"
        for _ in range(2):  # a repeat changes nothing
            assert await released(keyvault, leases[0]) == ""
        assert await _in_flight(keyvault) == 4
        word = {"lease_id": leases[1], "reason": "test"}
        await keyvault.admin.RevokeLease(admin_pb2.RevokeLeaseRequest(**word))
        assert await _in_flight(keyvault) == 3
        rejected = lease_pb2.LEASE_OUTCOME_KEY_REJECTED
        assert await released(keyvault, leases[2], rejected) == ""
        assert await _in_flight(keyvault) == 2
        # Three places are free, and no more.
        reasons = [await try_lease(keyvault, key) for _ in range(4)]
        assert reasons == [""] * 3 + ["LEASE_CAP"]
        assert await released(keyvault, leases[1]) == ""
        assert await _in_flight(keyvault) == 5
        await keyvault.change("RevokeKey", key.name)
        assert await _in_flight(keyvault) == 0
        assert await released(keyvault, leases[4]) == ""
        assert await _in_flight(keyvault) == 0


async def test_a_lease_that_is_over_gives_its_place_back(deployment):
    """Also before the sweep that says so on the record.

    Shown to fail: with the expiry left out of Leasing._check_caps.
    """
    async with kv.running(deployment, key_leases_in_flight=1) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        real = keyvault.app.ledger.now
        then = real() - lease.LIFE - datetime.timedelta(seconds=10)
        keyvault.app.ledger.now = lambda: then
        times = {"issue_time": then, "expire_time": then + datetime.timedelta(seconds=30)}
        assert await try_lease(keyvault, key, **times) == ""
        assert await try_lease(keyvault, key, **times) == "LEASE_CAP"
        keyvault.app.ledger.now = real
        assert await try_lease(keyvault, key) == ""
        await keyvault.tend()
        (live,) = (await keyvault.app.ledger.read("acme")).usage.leases
        assert live.expire_millis > real().timestamp() * 1_000
        kinds = [one.type for one in await keyvault.events()]
        assert kinds.count(audit_pb2.AUDIT_EVENT_TYPE_LEASE_EXPIRED) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"review_id": "rev\0"},
        {"actor": "a" * 257},
        {"fence": 2**63},
        {"key_version": 2**31},
        {"attempt_id": "att\nx"},
    ],
    ids=str,
)
async def test_a_malformed_grant_takes_no_other_down(keyvault, changes):
    """What PostgreSQL would not store is refused before it gets there.

    Shown to fail: without grants._well_formed: the answer is AUDIT_UNAVAILABLE.
    """
    key = await keyvault.add_active()
    good = [try_lease(keyvault, key) for _ in range(4)]
    reasons = await asyncio.gather(*good, try_lease(keyvault, key, **changes))
    assert reasons == [""] * 4 + ["GRANT_REFUSED"]


async def test_a_group_that_fails_fails_for_the_guilty_alone(keyvault):
    """What the database refuses of one lease is refused for that one.

    Shown to fail: with every failure of a group being told to all of it (GroupCommit._do).
    """
    good, bad = await keyvault.add_active(), await keyvault.add_active(name="bad")
    bad_id = bad.name.split("/")[3]
    await keyvault.sql(f"ALTER TABLE lease ADD CONSTRAINT picky CHECK (key_id <> '{bad_id}')")
    wanted = [good, good, bad, good, good, good]
    reasons = await asyncio.gather(*(try_lease(keyvault, one) for one in wanted))
    assert reasons == ["", "", "AUDIT_UNAVAILABLE", "", "", ""]
    assert await keyvault.sql("SELECT count(*) FROM lease") == [(5,)]


async def test_a_validation_lease_is_for_validation(keyvault):
    """A pending version is leased for validation alone; a purpose that is none is refused."""
    key = await keyvault.stage()
    purposes = (
        grant_pb2.LEASE_PURPOSE_REVIEW,
        grant_pb2.LEASE_PURPOSE_VALIDATION,
        grant_pb2.LEASE_PURPOSE_UNSPECIFIED,
    )
    reasons = [await try_lease(keyvault, key, purpose=one) for one in purposes]
    assert reasons == ["WRONG_STATE", "", "GRANT_REFUSED"]
