"""What a tenant, its keys and their versions may become, and what a grant may be used for: decided
without any I/O, from the state alone."""

from __future__ import annotations

import datetime

import pytest
from byokeep.keyvault.v1 import grant_pb2, state_pb2

from services.common.errors import ByokeepError
from services.keyvault import lifecycle, limits
from services.keyvault.lifecycle import WHOLE, State
from services.keyvault.limits import Caps

NOW = datetime.datetime(2030, 1, 1, 12, 0, 30, tzinfo=datetime.UTC)
SECONDS = int(NOW.timestamp())
DAY = 86_400


def key(*states: State, backend: str = "vault", kek: int = 1, ago: int = 0) -> state_pb2.KeyState:
    made = state_pb2.KeyState(key_id="key_1", provider="openai", revision=7)
    for number, state in enumerate(states, 1):
        made.versions.add(
            version=number,
            state=state.value,
            state_time=SECONDS - ago,
            state_sequence=number,
            kek_backend=backend,
            kek_version=kek,
        )
    return made


def after(before: state_pb2.KeyState, changes: list[lifecycle.Change]) -> list[State]:
    states = {one.version: State(one.state) for one in before.versions}
    for change in changes:
        states[change.version] = lifecycle.STATE_AFTER[change.event]
    return [states[number] for number in sorted(states)]


def tenant(*keys: state_pb2.KeyState, **changes) -> state_pb2.TenantState:
    state = state_pb2.TenantState(**changes)
    state.parts.append(lifecycle.summary(0, state_pb2.PartState(keys=keys), b""))
    return state


def reason(act) -> str:
    with pytest.raises(ByokeepError) as refused:
        act()
    return refused.value.reason


P, A, S, N, R, D = (
    State.PENDING,
    State.ACTIVE,
    State.SUPERSEDED,
    State.NEEDS_REKEY,
    State.REVOKED,
    State.DESTROYED,
)


@pytest.mark.parametrize(
    ("before", "number", "destroyed", "expected"),
    [
        ((P,), 1, False, [A]),
        ((A, P), 2, False, [S, A]),
        ((A, P), 2, True, [D, A]),
        # What was replaced before has no way back any more.
        ((S, A, P), 3, False, [D, S, A]),
        ((N, P), 2, False, [D, A]),
        ((A,), 1, False, [A]),
    ],
)
def test_a_promotion(before, number, destroyed, expected):
    one = key(*before)
    changes = lifecycle.promote(one, number, destroy_previous=destroyed)
    assert after(one, changes) == expected


@pytest.mark.parametrize("state", [S, N, R, D])
def test_only_a_pending_version_is_promoted(state):
    assert reason(lambda: lifecycle.promote(key(state), 1, destroy_previous=False)) == "WRONG_STATE"


def test_a_version_that_there_is_not_is_not_promoted():
    assert reason(lambda: lifecycle.promote(key(P), 2, destroy_previous=False)) == "NOT_FOUND"


def test_a_rollback_within_its_grace_and_not_after_it():
    one = key(S, A, P)
    assert after(one, lifecycle.roll_back(one, NOW)) == [A, D, D]
    late = key(S, A, ago=DAY + 1)
    assert reason(lambda: lifecycle.roll_back(late, NOW)) == "WRONG_STATE"
    assert reason(lambda: lifecycle.roll_back(key(A), NOW)) == "WRONG_STATE"


def test_the_end_of_a_key_is_of_every_version():
    one = key(D, R, S, A, P)
    assert after(one, lifecycle.end(one, R)) == [D, R, R, R, R]
    assert after(one, lifecycle.end(one, D)) == [D] * 5
    assert lifecycle.end(key(R, D), R) == []


def test_the_active_version_is_destroyed_only_with_its_key():
    assert reason(lambda: lifecycle.destroy_version(key(A), 1)) == "WRONG_STATE"
    assert after(key(A, P), lifecycle.destroy_version(key(A, P), 2)) == [A, D]
    assert lifecycle.destroy_version(key(A, D), 2) == []


@pytest.mark.parametrize("state", [R, D])
def test_no_version_is_added_to_a_key_that_is_gone(state):
    assert reason(lambda: lifecycle.stage_over(key(state))) == "WRONG_STATE"


def test_a_new_version_destroys_the_one_that_was_pending():
    one = key(A, P)
    assert after(one, lifecycle.stage_over(one)) == [A, D]


def test_grace_ends_after_a_day_and_not_before():
    assert lifecycle.expired(key(S, A, ago=DAY - 1), NOW) == []
    one = key(S, A, ago=DAY + 1)
    assert after(one, lifecycle.expired(one, NOW)) == [D, A]


def test_an_etag_is_of_one_revision():
    lifecycle.check_etag(key(A), "7")
    lifecycle.check_etag(key(A), "")
    assert reason(lambda: lifecycle.check_etag(key(A), "6")) == "ETAG_MISMATCH"


def test_the_version_that_counts():
    assert lifecycle.current(key(S, A, P)).version == 2
    assert lifecycle.current(key(D, P)).version == 2
    assert lifecycle.current(key(D, D)).version == 2


@pytest.mark.parametrize("field", ["trimming", "trimmed"])
def test_nothing_is_stored_where_a_kek_is_about_to_be_destroyed(field):
    state = state_pb2.TenantState()
    state.keks.add(backend="vault", version=3, **{field: 3})
    assert not lifecycle.may_store(state, "vault", 2)
    assert lifecycle.may_store(state, "vault", 3)
    assert lifecycle.may_store(state, "local", 1)


def test_what_a_part_says_of_its_keys():
    one, two = key(D, A, kek=2), key(S, A, kek=5)
    two.versions[0].unopened_time = 1
    found = lifecycle.summary(3, state_pb2.PartState(keys=[one, two, key(D, kek=9)]), b"d")
    assert (found.part, found.digest, found.keys) == (3, b"d", 2)
    assert found.grace_end == SECONDS + DAY
    (held,) = found.holdings
    assert (held.living, held.oldest, held.newest, held.unopened) == (3, 2, 5, 1)
    assert held.destroyed == 9


def test_a_destroyed_version_is_owed_a_trim_until_its_kek_version_is_gone():
    state = tenant(key(D, A, kek=4))
    assert lifecycle.owed(state) == {"vault": 4}
    state.keks.add(backend="vault", version=5, trimmed=4)
    assert lifecycle.owed(state) == {"vault": 4}
    state.keks[0].trimmed = 5
    assert lifecycle.owed(state) == {}
    assert lifecycle.owed(tenant(key(A))) == {}


@pytest.mark.parametrize(
    ("backend", "kek", "expected"), [("vault", 4, False), ("vault", 3, True), ("local", 9, True)]
)
def test_what_is_left_to_be_wrapped(backend, kek, expected):
    state = tenant(key(D, A, backend=backend, kek=kek), target_backend="vault", target_version=4)
    assert lifecycle.left(state) is expected
    assert lifecycle.at_target(state, key(A, backend=backend, kek=kek).versions[0]) is not expected


def test_a_tenant_without_a_target_has_nothing_left():
    assert not lifecycle.left(tenant(key(A)))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"trim": True, "target_backend": "vault", "target_version": 4}, True),
        ({"trim": False, "target_backend": "vault", "target_version": 4}, False),
        ({"trim": True, "target_backend": "vault", "target_version": 2}, False),
        ({"trim": True, "target_backend": "local", "target_version": 1}, True),
        ({"shredded": True}, True),
    ],
)
def test_what_is_to_be_trimmed(state, expected):
    made = state_pb2.TenantState(**state)
    made.keks.add(backend="vault", version=4, trimmed=2)
    assert bool(lifecycle.untrimmed(made)) is expected
    made.keks[0].trimmed = WHOLE
    assert not lifecycle.untrimmed(made)


def test_when_something_is_to_be_done():
    usage = state_pb2.TenantUsage()

    def due(state: state_pb2.TenantState) -> float:
        """In seconds after NOW."""
        return (lifecycle.due(state, usage, NOW, 30) - NOW).total_seconds()

    never = (lifecycle.NEVER - NOW).total_seconds()
    assert due(tenant(key(A))) == never
    assert due(tenant(key(S, A))) == DAY + 1
    assert due(tenant(key(D, A), owed_since=SECONDS)) == 30
    aimed = tenant(key(A), target_backend="vault", target_version=2)
    assert due(aimed) == 0
    aimed.shredded = True
    assert due(aimed) == never
    blocked = tenant(key(A), target_backend="vault", target_version=2)
    blocked.parts[0].holdings[0].unopened = 1
    assert due(blocked) == DAY
    usage.leases.add(expire_millis=(SECONDS + 60) * 1_000)
    assert due(tenant(key(A))) == 65


def grant(number: int, expires: int = SECONDS + 60) -> grant_pb2.Grant:
    made = grant_pb2.Grant(grant_id=f"gra_{number}")
    made.expire_time.seconds = expires
    return made


def test_a_grant_is_used_once():
    usage = state_pb2.TenantUsage()
    limits.redeem(usage, grant(1), NOW, 5)
    assert limits.used(usage, grant(1))
    assert not limits.used(usage, grant(2))


def test_a_grant_that_is_over_is_forgotten_and_refused_by_its_end():
    usage = state_pb2.TenantUsage()
    limits.redeem(usage, grant(1, SECONDS - 11), NOW, 5)
    limits.redeem(usage, grant(2, SECONDS - 9), NOW, 5)
    limits.redeem(usage, grant(3), NOW, 5)
    assert len(usage.grants) == 2 * 20
    assert [limits.used(usage, grant(number)) for number in (2, 3)] == [True, True]
    # Whatever some clock says of it later.
    assert limits.used(usage, grant(1, SECONDS - 11))
    assert not limits.used(usage, grant(4, SECONDS - 9))


def test_a_full_list_refuses_what_it_can_not_tell_from_a_used_grant():
    usage = state_pb2.TenantUsage()
    for number in range(1_025):
        limits.redeem(usage, grant(number, SECONDS + 10 + number), NOW, 5)
    assert len(usage.grants) == 1_024 * 20
    assert limits.used(usage, grant(0, SECONDS + 10))
    assert limits.used(usage, grant(9_999, SECONDS + 10))
    assert not limits.used(usage, grant(9_999, SECONDS + 2_000))


def test_a_clock_that_goes_back_opens_no_window_anew():
    meter = state_pb2.Meter()
    limits.count(meter, NOW)
    limits.count(meter, NOW - datetime.timedelta(days=1))
    assert (meter.minute_count, meter.day_count) == (2, 2)
    limits.count(meter, NOW + datetime.timedelta(minutes=1))
    assert (meter.minute_count, meter.day_count) == (1, 3)
    limits.count(meter, NOW + datetime.timedelta(days=1))
    assert (meter.minute_count, meter.day_count) == (1, 1)


@pytest.mark.parametrize(
    ("caps", "live", "cap"),
    [
        (Caps(in_flight=2), 2, "tenant_in_flight"),
        (Caps(per_minute=3), 0, "tenant_per_minute"),
        (Caps(per_day=3), 0, "tenant_per_day"),
    ],
)
def test_a_cap_is_held_exactly(caps, live, cap):
    meter = state_pb2.Meter()
    for _ in range(2):
        limits.count(meter, NOW)
    limits.check("tenant", caps, live - 1, meter, NOW)
    limits.count(meter, NOW)
    with pytest.raises(ByokeepError) as refused:
        limits.check("tenant", caps, live, meter, NOW)
    assert refused.value.metadata["cap"] == cap
    limits.check("tenant", Caps(), 10**6, meter, NOW)
