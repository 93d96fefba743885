"""53. waits: a review that nobody can run now waits, says why and since when, and goes on itself.

Over real gRPC and a real database, between a keyvault and runners that tests bend.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2, grant_pb2
from byokeep.names import last_of
from byokeep.orchestrator.v1 import key_pb2, review_pb2, tenant_pb2
from byokeep.runner.v1 import runner_pb2

from services.orchestrator.policy import failures
from services.orchestrator.store import endings, picks
from tests.harness.orchestrator import (
    Conversation,
    RunnerGone,
    Stack,
    fails,
    finding,
    one_chunk,
    replica,
    request_id,
    running,
    verdict,
)

COMPLETED = review_pb2.REVIEW_STATE_COMPLETED
FAILED = review_pb2.REVIEW_STATE_FAILED
QUEUED = review_pb2.REVIEW_STATE_QUEUED
NEEDS_REKEY = custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        await started.until_room(16)
        yield started


def refuses(reason: str, **outcome: Any):
    """A runner that gets no lease for its child."""

    async def script(talk: Conversation) -> None:
        await talk.say(accepted=runner_pb2.Accepted(public_key=b"p" * 32, process_id=4711))
        await talk.end(review_pb2.FailureReason.Value(f"FAILURE_REASON_{reason}"), **outcome)

    return script


def key_of(stack: Stack) -> str:
    return last_of(next(iter(stack.keyvault.keys)))


async def over(stack: Stack, review: review_pb2.Review, reason: str) -> None:
    """It waited uncounted, in one attempt, and completes."""
    async with stack.hurrying():
        ended = await stack.ended(review, 40)
    assert (ended.state, ended.attempts) == (COMPLETED, 1)
    assert not ended.HasField("wait")
    assert await stack.sql("SELECT DISTINCT tries FROM attempt WHERE kind = 'REVIEW'") == [(1,)]


@pytest.mark.parametrize("reason", ["KEYVAULT_UNAVAILABLE", "LEASE_CAP", "TENANT_SUSPENDED"])
async def test_what_keyvault_refuses_now_is_waited_for(stack: Stack, reason: str) -> None:
    """More often than anything that counts. Shown to fail where such a reason ENDs, or is counted
    (RETRY): the review fails, or its attempts are more."""
    stack.runner.scripts = [refuses(reason, retry_after_ms=300) for _ in range(6)]
    review = await stack.submit()
    waits = await stack.waiting(review, reason)
    assert waits.state == QUEUED
    assert waits.wait.message
    begun = waits.wait.since.ToDatetime(UTC)
    assert begun <= datetime.now(UTC) + timedelta(seconds=1)
    day = waits.wait.give_up_time.ToDatetime(UTC) - begun
    assert day == timedelta(hours=24)
    await over(stack, review, reason)


async def test_lease_cap_pauses_its_key_alone(stack: Stack) -> None:
    """Until keyvault said; not each attempt finds out by itself, and no other key waits.

    Shown to fail with LEASE_CAP's Holds.ATTEMPT in the table: each of the ten tries.
    """
    capped = key_of(stack)
    stack.runner.default = refuses("LEASE_CAP", retry_after_ms=60_000)
    await stack.runner.tell(places=1)
    first = await stack.submit()
    await stack.waiting(first, "LEASE_CAP")
    tried = len(stack.runner.talks)
    others = [await stack.submit() for _ in range(9)]
    for one in others:
        waits = await stack.waiting(one, "LEASE_CAP")
        assert waits.wait.next_try_time.ToDatetime(UTC) > datetime.now(UTC)
    assert len(stack.runner.talks) == tried
    stack.runner.default = one_chunk
    await stack.tenant("other")
    stack.keyvault.add("other")
    assert (await stack.ended(await stack.submit("other"))).state == COMPLETED
    assert (await stack.get(first)).state == QUEUED
    # Its minute is over.
    await stack.sql("UPDATE pause SET until = now() WHERE key_id = %s", capped)
    for one in (first, *others):
        assert (await stack.ended(one)).attempts == 1


async def test_what_the_provider_says_of_later_is_kept(stack: Stack) -> None:
    """700 s, though the budget of retries and of calls is small. The refused call takes none."""
    await stack.sql("UPDATE tenant SET max_calls_per_review = 1")
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_RATE_LIMITED, retry_after_ms=700_000)]
    review = await stack.submit()
    waits = await stack.waiting(review, "RATE_LIMITED")
    left = waits.wait.next_try_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(seconds=600) < left <= timedelta(seconds=700)
    await stack.hurry()
    ended = await stack.ended(review)
    assert (ended.state, ended.attempts, ended.calls_started) == (COMPLETED, 2, 2)
    assert await stack.sql("SELECT tries FROM attempt ORDER BY number") == [(1,), (1,)]


async def test_a_tenant_has_a_budget_of_retries(stack: Stack, monkeypatch) -> None:
    """A provider that fails for all of a tenant's reviews is asked again by a few at once, then by
    one after the other; another tenant has a budget of its own. None is lost. Shown to fail where
    the budget is asked for nothing."""
    monkeypatch.setattr(endings, "RETRIES_AT_ONCE", 3)
    await stack.tenant("other")
    stack.keyvault.add("other")
    stack.runner.default = fails(review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE)
    reviews = [await stack.submit(repository=f"acme/r{number}") for number in range(5)]
    await stack.until("SELECT 1 WHERE (SELECT count(*) FROM attempt WHERE number = 2) = 5")
    delays = "SELECT extract(epoch FROM due_time - create_time)::float8 FROM attempt"
    delays += " WHERE number = 2 AND tenant = %s ORDER BY 1"
    seconds = [delay for (delay,) in await stack.sql(delays, "acme")]
    assert max(seconds[:3]) < 5
    assert 10 < seconds[3] < 17
    assert 25 < seconds[4] < 32
    other = await stack.submit("other")
    await stack.until("SELECT 1 FROM attempt WHERE number = 2 AND tenant = 'other'")
    assert (await stack.sql(delays, "other"))[0][0] < 5
    stack.runner.default = one_chunk
    await stack.hurry()
    for review in (*reviews, other):
        assert (await stack.ended(review)).state == COMPLETED


async def test_runners_that_are_away_are_waited_for(stack: Stack) -> None:
    """Nothing is tried meanwhile. Shown to fail where `lack` tells nobody."""
    await stack.runner.tell(silent=True)
    await stack.until_room(0)
    review = await stack.submit()
    waits = await stack.waiting(review, "RUNNER_UNAVAILABLE")
    assert "runner" in waits.wait.message
    assert stack.runner.talks == []
    await stack.runner.tell(silent=False)
    await over(stack, review, "RUNNER_UNAVAILABLE")


@pytest.mark.parametrize(
    ("how", "reason"),
    [({"places": 0}, "RUNNERS_FULL"), ({"draining": True}, "KEYVAULT_UNAVAILABLE")],
)
async def test_runners_without_room_are_waited_for(stack: Stack, how, reason: str) -> None:
    await stack.runner.tell(**how)
    await stack.until_room(0)
    review = await stack.submit()
    await stack.waiting(review, reason)
    assert stack.runner.refused == 0
    await stack.runner.tell(places=16, draining=False)
    await over(stack, review, reason)


async def test_no_more_is_given_than_there_is_room_for(stack: Stack) -> None:
    """Shown to fail where `pick` asks for the process's own concurrency alone: runners refuse."""
    await stack.runner.tell(places=3)
    await stack.until_room(3)
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.accept("c1")
        await go.wait()
        await talk.end(review_pb2.FAILURE_REASON_REFUSED)

    stack.runner.default = slow
    reviews = [await stack.submit() for _ in range(10)]
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING' HAVING count(*) = 3")
    assert stack.runner.refused == 0
    async with replica(stack):
        await asyncio.sleep(1)
        assert await stack.sql("SELECT count(*) FROM attempt WHERE state = 'RUNNING'") == [(3,)]
        go.set()
        for review in reviews:
            assert (await stack.ended(review)).failure == review_pb2.FAILURE_REASON_REFUSED
    # Two replicas may both have heard of one free place: the runner refuses one, which waits on.
    assert stack.runner.most == 3


async def one_at_a_time(stack: Stack) -> tuple[asyncio.Event, list[str]]:
    """One place; attempts wait for each set event, and are noted by repository."""
    order: list[str] = []
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        order.append(talk.assign.input.repository)
        await talk.accept("c1")
        await go.wait()
        await talk.call("c1")
        await talk.result("c1")
        await talk.end()

    stack.runner.default = slow
    await stack.runner.tell(places=1)
    await stack.until_room(1)
    return go, order


async def test_who_comes_last_is_next_where_another_floods(stack: Stack) -> None:
    """41. fair: the next free place is the other tenant's, however many of the first one wait.

    Shown to fail with PICK's order by time alone.
    """
    await stack.tenant("other")
    stack.keyvault.add("other")
    go, order = await one_at_a_time(stack)
    flood = [await stack.submit(repository=f"acme/r{number}") for number in range(40)]
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING'")
    last = await stack.submit("other", repository="other/only")
    go.set()
    await stack.ended(last)
    assert order.index("other/only") == 1
    await stack.ended(flood[-1], 60)
    assert order[2:] == [f"acme/r{number}" for number in range(1, 40)]


async def a_backlog(stack: Stack, reviews: int, tenant: str) -> None:
    """Have reviews wait, on three keys each; `tenant` is SQL that says whose number i is."""
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    await stack.sql(
        f"INSERT INTO tenant (id, plan) SELECT DISTINCT {tenant}, 'team'"
        " FROM generate_series(1, %s) i ON CONFLICT DO NOTHING",
        reviews,
    )
    await stack.sql(
        "INSERT INTO review (id, tenant, repository, model, key_id, actor)"
        f" SELECT 'rev_' || i, {tenant}, 'a/b', 'openai/x', 'key_' || i %% 3, 'me'"
        " FROM generate_series(1, %s) i",
        reviews,
    )
    await stack.sql(
        "INSERT INTO attempt (id, kind, tenant, review_id, key_id, key_version)"
        " SELECT 'att_' || substr(id, 5), 'REVIEW', tenant, id, key_id, 1 FROM review"
    )


async def test_a_tenant_with_nothing_to_pick_is_looked_at_when_something_calls(
    stack: Stack,
) -> None:
    """And not before: not while a key is paused, a plan's places are taken, or nothing waits; and
    the others are served meanwhile. Shown to fail without the trigger, and without the look that
    goes on past those that are held back."""
    # More than one look takes in are held back, and were served before all others.
    await a_backlog(stack, 300, "'held-' || i %% 100")
    await stack.sql(
        "INSERT INTO pause (tenant, key_id, reason, until)"
        " SELECT id, '', 'TENANT_SUSPENDED', 'infinity' FROM tenant WHERE id LIKE 'held-%%'"
    )
    await stack.sql("UPDATE turn SET served = '-infinity'")
    review = await stack.submit()
    await stack.sql("UPDATE turn SET served = now() WHERE tenant = 'acme'")
    await stack.runner.tell(draining=False)
    assert (await stack.ended(review)).state == COMPLETED
    # Nothing waits any more, and that is known.
    await stack.until("SELECT 1 FROM turn WHERE tenant = 'acme' AND due = 'infinity'")
    assert (await stack.ended(await stack.submit())).state == COMPLETED
    # One pick goes on until it has what there are places for.
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    await stack.submit()
    await stack.sql("UPDATE turn SET due = now() WHERE tenant LIKE 'held-%%'")
    assert [work.tenant for work in await stack.app.picks.pick(1)] == ["acme"]


@pytest.mark.parametrize("tenant", ["'acme'", "'t-' || i / 3"])
async def test_a_pick_reads_the_first_of_each_lane_alone(stack: Stack, tenant: str) -> None:
    """However many wait behind, or beside: no plan reads a lane, the table, or all who wait. Shown
    to fail where validations are looked for by a join with their tenants: all that waits is read
    then, and thrown away; and with no LIMIT for the tenants that are looked at."""
    await a_backlog(stack, 5000, tenant)
    plans = {"plans": ["team"], "places": [16], "otherwise": 16}
    connection = await psycopg.AsyncConnection.connect(stack.database_url)
    async with connection:
        explained = await connection.execute(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {picks.PICK}", {"room": 4, "look": 68, **plans}
        )
        ((plan,),) = await explained.fetchone()
    read: list[float] = []

    def walk(node: dict[str, Any]) -> None:
        # Of each loop; heap fetches are of all.
        rows = node.get("Actual Rows", 0) + node.get("Rows Removed by Filter", 0)
        read.append(rows * node.get("Actual Loops", 1) + node.get("Heap Fetches", 0))
        for child in node.get("Plans", ()):
            walk(child)

    walk(plan["Plan"])
    # 68 tenants, of three lanes each.
    assert max(read) < 300


async def test_two_that_flood_take_turns(stack: Stack) -> None:
    await stack.tenant("other")
    stack.keyvault.add("other")
    go, order = await one_at_a_time(stack)
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    for tenant in ("acme", "other"):
        for number in range(6):
            last = await stack.submit(tenant, repository=f"{tenant}/r{number}")
    go.set()
    await stack.runner.tell(draining=False)
    await stack.ended(last)
    pairs = [{one.partition("/")[0] for one in order[at : at + 2]} for at in range(0, 12, 2)]
    assert pairs == [{"acme", "other"}] * 6


async def test_interactive_goes_before_batch(stack: Stack) -> None:
    go, order = await one_at_a_time(stack)
    for number in range(3):
        await stack.submit(repository=f"acme/b{number}", priority=review_pb2.PRIORITY_BATCH)
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING'")
    soon = await stack.submit(repository="acme/soon")
    go.set()
    await stack.ended(soon)
    assert order[:2] == ["acme/b0", "acme/soon"]


async def test_places_of_a_tenant_hold_for_all_replicas(stack: Stack) -> None:
    """starter has two. Shown to fail where PICK_LOCK is left out."""
    await stack.tenant("small", plan="starter")
    stack.keyvault.add("small")
    go, _ = await one_at_a_time(stack)
    await stack.runner.tell(places=0)
    await stack.until_room(0)
    reviews = [await stack.submit("small") for _ in range(6)]
    async with replica(stack), replica(stack):
        await stack.runner.tell(places=16)
        await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING' HAVING count(*) >= 2")
        await asyncio.sleep(1)
        assert await stack.sql("SELECT count(*) FROM attempt WHERE state = 'RUNNING'") == [(2,)]
        go.set()
        for review in reviews:
            assert (await stack.ended(review)).state == COMPLETED


async def test_suspended_tenant_waits_until_it_is_resumed(stack: Stack) -> None:
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    review = await stack.submit()
    tenants = stack.client("operator").tenants
    suspend = {"name": "tenants/acme"}
    await tenants.SuspendTenant(tenant_pb2.SuspendTenantRequest(**suspend, request_id=request_id()))
    await stack.runner.tell(draining=False)
    waits = await stack.waiting(review, "TENANT_SUSPENDED")
    assert not waits.wait.HasField("next_try_time")
    await tenants.SuspendTenant(
        tenant_pb2.SuspendTenantRequest(**suspend, resume=True, request_id=request_id())
    )
    await over(stack, review, "TENANT_SUSPENDED")


# --- a key that a provider rejected


def looked_at(value: key_pb2.ValidationVerdict.ValueType, stack: Stack, asked: list[int]):
    """A runner whose provider rejects reviews, and answers the look at the key."""
    answers = verdict(value, "gpt-6.1-terra")

    async def script(talk: Conversation) -> None:
        if talk.assign.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION:
            asked.append(talk.assign.fence)
            if value == key_pb2.VALIDATION_VERDICT_INVALID:
                stack.keyvault.set_state("acme", key_of(stack), NEEDS_REKEY)
            await answers(talk)
            return
        await fails(review_pb2.FAILURE_REASON_KEY_REJECTED)(talk)

    return script


async def test_one_rejected_call_retires_no_key(stack: Stack) -> None:
    """One look at the model list, and the review goes on. Shown to fail where a rejected review
    ends, and where CHECK_KEY is never run: it waits for ever."""
    asked: list[int] = []
    good = looked_at(key_pb2.VALIDATION_VERDICT_VALID, stack, asked)
    stack.runner.scripts = [good, good]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts, len(asked)) == (COMPLETED, 2, 1)
    key = stack.keyvault.keys[f"tenants/acme/providerKeys/{key_of(stack)}"]
    assert key.state == custody_pb2.KEY_VERSION_STATE_ACTIVE
    assert await stack.sql("SELECT * FROM pause WHERE until = 'infinity'") == []


async def test_a_key_that_is_always_rejected_ends_the_review(stack: Stack) -> None:
    """Though its model list is given: counted, so that it has an end."""
    asked: list[int] = []
    stack.runner.default = looked_at(key_pb2.VALIDATION_VERDICT_VALID, stack, asked)
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure) == (FAILED, review_pb2.FAILURE_REASON_KEY_REJECTED)
    assert review.attempts == failures.MAX_TRIES
    assert "Add a new version of key_" in review.failure_message


async def test_reviews_wait_for_a_new_key_and_run_on_it(stack: Stack) -> None:
    """What waits says where to get one; what comes meanwhile is refused at once; the list shows no
    VALID beside NEEDS_REKEY. Shown to fail where `resume_key` is not called on promotion (it takes
    the ten seconds of the chore), and where it leaves versions as they are."""
    added = await stack.validated(await stack.add_key(display_name="second"))
    second = last_of(added.provider_key.name)
    stack.keyvault.set_state("acme", key_of(stack), custody_pb2.KEY_VERSION_STATE_REVOKED)
    asked: list[int] = []

    def gone(key_id: str) -> None:
        stack.keyvault.set_state("acme", key_id, NEEDS_REKEY)

    async def rejects(talk: Conversation) -> None:
        if talk.assign.purpose == grant_pb2.LEASE_PURPOSE_VALIDATION:
            asked.append(talk.assign.fence)
            gone(second)
            await verdict(key_pb2.VALIDATION_VERDICT_INVALID)(talk)
            return
        await fails(review_pb2.FAILURE_REASON_KEY_REJECTED)(talk)

    stack.runner.default = rejects
    await stack.runner.tell(places=0)
    await stack.until_room(0)
    reviews = [await stack.submit() for _ in range(5)]
    await stack.runner.tell(places=1)
    for review in reviews:
        waits = await stack.waiting(review, "KEY_NEEDS_REKEY")
        assert f"a new version of {second}" in waits.wait.message
        assert "console" in waits.wait.message
        assert not waits.wait.HasField("next_try_time")
    assert len(asked) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    assert error_info(refused.value).reason == "KEY_NEEDS_REKEY"
    shown = await stack.client("acme").keys.GetKey(
        key_pb2.GetKeyRequest(name=added.provider_key.name)
    )
    assert shown.key.provider_key.state == NEEDS_REKEY
    assert shown.key.validation.verdict == key_pb2.VALIDATION_VERDICT_INVALID

    stack.runner.default = one_chunk
    rotated = await stack.client("acme").keys.RotateKey(
        key_pb2.RotateKeyRequest(
            name=added.provider_key.name,
            sealed_key=custody_pb2.SealedKey(
                intake_key_id="ink_" + "0" * 26, suite=1, ciphertext=b"x" * 64
            ),
            request_id=request_id(),
        )
    )
    assert (await stack.validated(rotated.key)).provider_key.active_version == 2
    for review in reviews:
        ended = await stack.ended(review, 8)
        assert (ended.state, ended.key_id) == (COMPLETED, second)
    versions = await stack.sql(
        "SELECT DISTINCT key_version FROM attempt WHERE kind = 'REVIEW' AND state = 'COMPLETED'"
    )
    assert versions == [(2,)]


async def test_a_promotion_that_nobody_told_us_of_is_found(stack: Stack) -> None:
    """As after a crash between keyvault's promotion and our note of it."""
    stack.runner.scripts = [refuses("KEY_NEEDS_REKEY")]
    stack.keyvault.set_state("acme", key_of(stack), custody_pb2.KEY_VERSION_STATE_ACTIVE)
    review = await stack.submit()
    stack.keyvault.set_state("acme", key_of(stack), NEEDS_REKEY)
    await stack.waiting(review, "KEY_NEEDS_REKEY")
    stack.keyvault.add_version("acme", key_of(stack))
    await stack.app.sweeper.paused_keys()
    await over(stack, review, "KEY_NEEDS_REKEY")
    assert await stack.sql("SELECT key_version FROM attempt") == [(2,)]


async def test_revoked_in_a_call_says_revoked(stack: Stack) -> None:
    async def revoked(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        stack.keyvault.set_state("acme", key_of(stack), custody_pb2.KEY_VERSION_STATE_REVOKED)
        await talk.end(review_pb2.FAILURE_REASON_KEY_REVOKED, ambiguous_call=True)

    stack.runner.scripts = [revoked]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure) == (FAILED, review_pb2.FAILURE_REASON_KEY_REVOKED)
    assert review.ambiguous_calls == 1
    assert "may have been billed" in review.failure_message


async def test_a_lease_that_an_operator_ended_is_no_revoked_key(stack: Stack) -> None:
    """The key serves on: the attempt is made again, and waits where the tenant is held."""
    stack.runner.scripts = [
        fails(review_pb2.FAILURE_REASON_KEY_REVOKED, call=False),
        refuses("TENANT_SUSPENDED"),
    ]
    review = await stack.submit()
    await stack.waiting(review, "CHILD_LOST")
    await stack.hurry()
    await stack.waiting(review, "TENANT_SUSPENDED")
    ended = await stack.ended(review)
    assert (ended.state, ended.attempts) == (COMPLETED, 2)


# --- the limit, and what a wait outlives


@pytest.mark.parametrize("reason", ["TENANT_SUSPENDED", "RATE_LIMITED"])
async def test_what_waits_too_long_fails_with_that_reason(
    orchestrator_database_url, tmp_path, reason: str
) -> None:
    async with running(orchestrator_database_url, tmp_path, wait_seconds=1) as stack:
        await stack.tenant()
        stack.keyvault.add("acme")
        made = {"RATE_LIMITED": fails(review_pb2.FAILURE_REASON_RATE_LIMITED, retry_after_ms=10**6)}
        stack.runner.default = made.get(reason, refuses(reason, retry_after_ms=10**6))
        review = await stack.ended(await stack.submit())
        assert review.state == FAILED
        assert failures.reason_of(review.failure) == reason
        assert "etry the review" in review.failure_message
        stack.runner.default = one_chunk
        await stack.sql("DELETE FROM pause")
        again = await stack.client("acme").reviews.RetryReview(
            review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
        )
        assert (await stack.ended(again.review)).state == COMPLETED


async def test_who_waits_now_for_this_and_now_for_that_has_one_day(stack: Stack) -> None:
    """Shown to fail where each reason has a clock of its own: the review waits for ever. When a
    chunk is done the clock begins anew."""

    async def does_a_chunk(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        await talk.call("c1")
        await talk.result("c1", finding())
        await talk.end(review_pb2.FAILURE_REASON_RATE_LIMITED, retry_after_ms=10**6)

    async def next_wait(reason: str) -> datetime:
        await stack.sql("DELETE FROM pause")
        await stack.hurry()
        waits = await stack.waiting(review, reason)
        return waits.wait.give_up_time.ToDatetime(UTC)

    stack.runner.scripts = [
        refuses("KEYVAULT_UNAVAILABLE", retry_after_ms=10**6),
        refuses("LEASE_CAP", retry_after_ms=10**6),
        refuses("KEYVAULT_UNAVAILABLE", retry_after_ms=10**6),
        does_a_chunk,
    ]
    review = await stack.submit()
    first = (await stack.waiting(review, "KEYVAULT_UNAVAILABLE")).wait.give_up_time
    assert await next_wait("LEASE_CAP") == first.ToDatetime(UTC)
    assert await next_wait("KEYVAULT_UNAVAILABLE") == first.ToDatetime(UTC)
    assert await next_wait("RATE_LIMITED") > first.ToDatetime(UTC)
    await stack.sql("UPDATE attempt SET stalled_since = stalled_since - interval '1 day'")
    ended = await stack.ended(review)
    assert (ended.state, failures.reason_of(ended.failure)) == (FAILED, "RATE_LIMITED")


async def test_content_of_yesterday_opens_after_a_days_wait(stack: Stack) -> None:
    """The epoch has gone on meanwhile, and no key of it is in memory any more."""
    await stack.runner.tell(draining=True)
    await stack.until_room(0)
    review = await stack.submit()
    stack.keyvault.epoch = "2026-11-24"
    stack.app._contents._known.clear()
    await stack.runner.tell(draining=False)
    assert (await stack.ended(review)).findings[0] == finding()


# --- where an attempt runs


async def test_an_attempt_is_taken_up_where_it_runs(orchestrator_database_url, tmp_path) -> None:
    """And no stranger is asked. Shown to fail where `_take_up` takes whoever has room."""
    async with running(orchestrator_database_url, tmp_path, runners=3) as stack:
        await stack.tenant()
        stack.keyvault.add("acme")
        everyone = [stack.runner, *stack.others]
        await stack.until_room(48)

        async def breaks(talk: Conversation) -> None:
            await talk.accept("c1")
            await talk.call("c1")
            raise RunnerGone

        async def goes_on(talk: Conversation) -> None:
            await talk.result("c1", finding())
            await talk.end()

        for one in everyone:
            one.scripts, one.resumed = [breaks], [goes_on]
        ended = await stack.ended(await stack.submit())
        assert (ended.state, ended.calls_started) == (COMPLETED, 1)
        asked = [one for one in everyone if one.reattached]
        assert [len(one.talks) for one in asked] == [1]
        ((stored,),) = await stack.sql("SELECT runner_id FROM attempt")
        assert stored == asked[0].id


async def test_room_of_several_runners_is_used(orchestrator_database_url, tmp_path) -> None:
    async with running(orchestrator_database_url, tmp_path, runners=3) as stack:
        await stack.tenant()
        stack.keyvault.add("acme")
        everyone = [stack.runner, *stack.others]
        go = asyncio.Event()

        async def slow(talk: Conversation) -> None:
            await talk.accept("c1")
            await go.wait()
            await talk.call("c1")
            await talk.result("c1")
            await talk.end()

        for one in everyone:
            one.default = slow
            await one.tell(places=2)
        await stack.until_room(6)
        reviews = [await stack.submit() for _ in range(9)]
        await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING' HAVING count(*) = 6")
        async with asyncio.timeout(60):
            while [one.busy for one in everyone] != [2, 2, 2]:
                await asyncio.sleep(0.02)
        go.set()
        for review in reviews:
            assert (await stack.ended(review)).state == COMPLETED
        assert [one.refused for one in everyone] == [0, 0, 0]


async def test_a_child_that_is_fenced_off_is_killed(stack: Stack) -> None:
    """Though its worker is gone, who would have to say so: its runner is told. Shown to fail
    without the sweeper's word to the fleet."""
    in_call, told = asyncio.Event(), asyncio.Event()

    async def holds(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        in_call.set()
        await asyncio.sleep(60)

    async def cancelled(talk: Conversation) -> None:
        await talk.cancelled.wait()
        told.set()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST, ambiguous_call=True)

    stack.runner.scripts, stack.runner.resumed = [holds], [cancelled]
    review = await stack.submit()
    async with asyncio.timeout(60):
        await in_call.wait()
    await stack.app.background.end("heartbeat")
    await stack.sql("UPDATE attempt SET heartbeat_time = now() - interval '1 minute'")
    ((attempt,),) = await stack.sql("SELECT id FROM attempt")
    await stack.app.sweeper.fence_off(attempt)
    async with asyncio.timeout(60):
        await told.wait()
    assert (await stack.ended(review)).failure == review_pb2.FAILURE_REASON_AMBIGUOUS


@pytest.mark.deep
@pytest.mark.timeout(300)
async def test_a_long_review_beside_a_hundred_short_ones(stack: Stack) -> None:
    """Its heartbeat outlives theirs, and those of them that are cancelled at their end."""

    async def lasts(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await asyncio.sleep(120)
        await talk.result("c1")
        await talk.end()

    stack.runner.scripts = [lasts]
    long = await stack.submit()
    await stack.until("SELECT 1 FROM provider_call")
    client = stack.client("acme").reviews
    for number in range(100):
        short = await stack.submit()
        if number % 3 == 0:
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may have ended
                await client.CancelReview(
                    review_pb2.CancelReviewRequest(name=short.name, request_id=request_id())
                )
        await asyncio.sleep(1)
    ended = await stack.ended(long, 120)
    assert (ended.state, ended.attempts, ended.ambiguous_calls) == (COMPLETED, 1, 0)


# --- a chunk that becomes several; how far a call is


async def test_a_split_chunk_counts_as_its_parts(stack: Stack) -> None:
    async def splits(talk: Conversation) -> None:
        await talk.accept("c1", "c2")
        await talk.call("c1")
        into = [runner_pb2.PlannedChunk(chunk_id=one) for one in ("c1a", "c1b")]
        split = runner_pb2.ChunkSplit(chunk_id="c1", into=into)
        await talk.acked(await talk.say(chunk_split=split))
        seen.append(await stack.get(review))
        for number, chunk in enumerate(("c1a", "c1b", "c2"), 2):
            await talk.call(chunk, number)
            await talk.result(chunk, finding())
        await talk.end()

    seen: list[review_pb2.Review] = []
    stack.runner.scripts = [splits]
    review = await stack.submit()
    ended = await stack.ended(review)
    assert (ended.state, ended.chunks_done, ended.chunks_total) == (COMPLETED, 3, 3)
    assert (ended.calls_started, ended.ambiguous_calls) == (4, 0)
    assert (seen[0].chunks_total, seen[0].chunks_done) == (3, 0)


async def test_a_part_that_is_done_is_not_paid_for_again(stack: Stack) -> None:
    """Fails where only chunks of the plan are told as done: the next attempt, whose plan has the
    whole chunk, then splits it anew and sends both parts."""
    into = [runner_pb2.PlannedChunk(chunk_id=one) for one in ("c1a", "c1b")]

    async def splits(talk: Conversation) -> None:
        await talk.accept("c1")
        told.append(list(talk.proceed.done_chunk_ids))
        number = 0
        if not told[-1]:
            number += 1
            await talk.call("c1", number)
        await talk.acked(
            await talk.say(chunk_split=runner_pb2.ChunkSplit(chunk_id="c1", into=into))
        )
        for chunk in ("c1a", "c1b"):
            if chunk in told[-1]:
                continue
            number += 1
            await talk.call(chunk, number)
            if chunk == "c1b" and len(told) == 1:
                await talk.end(failure=review_pb2.FAILURE_REASON_RATE_LIMITED, retry_after_ms=1)
                return
            await talk.result(chunk, finding())
        await talk.end()

    told: list[list[str]] = []
    stack.runner.default = splits
    ended = await stack.ended(await stack.submit())

    assert told == [[], ["c1a"]]
    assert (ended.state, ended.chunks_done, ended.chunks_total) == (COMPLETED, 2, 2)
    assert ended.calls_started == 4


async def test_how_far_a_call_is_is_shown_and_no_change_of_the_review(stack: Stack) -> None:
    go = asyncio.Event()

    async def slowly(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        versions.append(await stack.sql("SELECT version FROM review"))
        progress = runner_pb2.CallProgress(chunk_id="c1", answer_bytes=4096)
        await talk.say(call_progress=progress)
        await go.wait()
        versions.append(await stack.sql("SELECT version FROM review"))
        await talk.result("c1")
        await talk.end()

    versions: list[Any] = []
    stack.runner.scripts = [slowly]
    review = await stack.submit()
    told = []
    async with asyncio.timeout(60):
        async for response in stack.client("acme").reviews.WatchReview(
            review_pb2.WatchReviewRequest(name=review.name)
        ):
            told.append(response.review.answer_bytes)
            if response.review.answer_bytes:
                go.set()
    assert told[-1] == 0
    assert 4096 in told
    assert versions[0] == versions[1]
