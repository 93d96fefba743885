"""Reviews from submission to end, over real gRPC and a real database."""

from __future__ import annotations

import asyncio
import hashlib
import json

import grpc
import pytest
from byokeep import dsse
from byokeep.common.v1 import options_pb2
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2, grant_pb2
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2, settings_pb2
from byokeep.runner.v1 import runner_pb2

from services.orchestrator.policy import failures
from tests.harness.orchestrator import (
    DIFF,
    Conversation,
    RunnerGone,
    Stack,
    fails,
    finding,
    request_id,
    running,
)

COMPLETED = review_pb2.REVIEW_STATE_COMPLETED
FAILED = review_pb2.REVIEW_STATE_FAILED
CANCELLED = review_pb2.REVIEW_STATE_CANCELLED
RENAME = b"diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n"
BINARY = (
    b"diff --git a/secret-logo b/secret-logo\nindex 1111111..2222222 100644\n"
    b"Binary files a/secret-logo and b/secret-logo differ\n"
)
BINARY_PART = review_pb2.UnreadPart(path="secret-logo", reason=review_pb2.UNREAD_REASON_BINARY)


@pytest.fixture
async def stack(orchestrator_database_url, tmp_path):
    async with running(orchestrator_database_url, tmp_path) as started:
        await started.tenant()
        started.keyvault.add("acme")
        yield started


async def test_review_completes_with_findings(stack: Stack) -> None:
    review = await stack.ended(await stack.submit(title="shell", pull_request=7))
    assert (review.state, review.finding_count, review.attempts) == (COMPLETED, 1, 1)
    assert (review.calls_started, review.ambiguous_calls) == (1, 0)
    assert (review.chunks_done, review.chunks_total) == (1, 1)
    assert review.findings[0] == finding()
    assert review.model == "openai/gpt-6.1-terra"
    assert await stack.sql("SELECT * FROM review_content") == []
    assert await stack.sql("SELECT * FROM provider_call WHERE finish_time IS NULL") == []


async def test_grant_is_for_this_attempt_and_child_alone(stack: Stack) -> None:
    review = await stack.ended(await stack.submit())
    talk = stack.runner.talks[-1]
    signed = talk.proceed.grant
    payload = dsse.verify(signed, dsse.GRANT, {signed.key_id: stack.grant_public_key})
    grant = grant_pb2.Grant.FromString(payload)
    assert grant.recipient_key_sha256 == hashlib.sha256(b"p" * 32).digest()
    assert (grant.tenant, grant.owner, grant.deployment) == ("acme", "", "test")
    assert (grant.attempt_id, grant.fence) == (talk.assign.attempt_id, 1)
    assert grant.review_id == last_of(review.name)
    assert grant.purpose == grant_pb2.LEASE_PURPOSE_REVIEW
    assert grant.provider == options_pb2.PROVIDER_OPENAI
    assert grant.key_version == 1
    assert grant.expire_time.seconds - grant.issue_time.seconds <= 60
    assert (talk.assign.model, talk.assign.max_calls) == ("gpt-6.1-terra", 20)
    assert talk.assign.input.diff == DIFF


async def test_runner_gets_all_that_was_submitted(stack: Stack) -> None:
    sent = review_pb2.ReviewInput(
        repository="acme/shop",
        diff=DIFF,
        title="t",
        description="d",
        guidance="g",
        context_files=[review_pb2.ContextFile(path="a.py", content="x = 1")],
    )
    await stack.ended(
        await stack.submit(
            title="t", description="d", guidance="g", context_files=sent.context_files
        )
    )
    assert stack.runner.talks[-1].assign.input == sent


async def broken_after_first_chunk(talk: Conversation) -> None:
    await talk.accept("c1", "c2")
    await talk.call("c1")
    await talk.result("c1", finding())
    await talk.end(review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE)


async def second_chunk(talk: Conversation) -> None:
    await talk.accept("c1", "c2")
    assert list(talk.proceed.done_chunk_ids) == ["c1"]
    await talk.call("c2")
    await talk.result("c2", finding(3), finding(2))
    await talk.end()


async def test_next_attempt_does_only_what_is_left(stack: Stack) -> None:
    stack.runner.scripts = [broken_after_first_chunk, second_chunk]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts, review.calls_started) == (COMPLETED, 2, 2)
    assert [one.start_line for one in review.findings] == [2, 2, 3]
    assert [talk.assign.fence for talk in stack.runner.talks] == [1, 2]
    assert stack.runner.talks[1].assign.max_calls == 19


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("KEY_RESTRICTED", "scope"),
        ("QUOTA_EXHAUSTED", "retry the review"),
        ("MODEL_NOT_FOUND", "openai/gpt-6.1-terra"),
        ("BAD_REQUEST", "malformed"),
        ("REFUSED", "refused"),
        ("AMBIGUOUS", "may have been billed"),
        ("LEASE_REFUSED", "keyvault refused key_"),
    ],
)
async def test_what_cannot_help_is_not_repeated(stack: Stack, failure: str, says: str) -> None:
    value = review_pb2.FailureReason.Value(f"FAILURE_REASON_{failure}")
    stack.runner.scripts = [fails(value)]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure, review.attempts) == (FAILED, value, 1)
    assert says in review.failure_message


async def test_attempts_are_bounded(stack: Stack) -> None:
    stack.runner.default = fails(review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE, call=False)
    review = await stack.submit()
    async with stack.hurrying():
        ended = await stack.ended(review)
    assert (ended.state, ended.attempts) == (FAILED, failures.MAX_TRIES)


async def test_retry_waits_as_long_as_the_provider_asks(stack: Stack) -> None:
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_RATE_LIMITED, retry_after_ms=2500)]
    review = await stack.ended(await stack.submit())
    assert review.state == COMPLETED
    waited = await stack.sql(
        "SELECT extract(epoch FROM b.start_time - a.end_time) FROM attempt a, attempt b"
        " WHERE a.fence = 1 AND b.fence = 2"
    )
    assert waited[0][0] >= 2.5


async def test_no_retry_without_calls_for_it(stack: Stack) -> None:
    await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", max_calls_per_review=1),
            update_mask={"paths": ["max_calls_per_review"]},
            request_id=request_id(),
        )
    )
    stack.runner.default = fails(review_pb2.FAILURE_REASON_PROVIDER_UNAVAILABLE)
    review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts, review.calls_started) == (FAILED, 1, 1)


async def gone_in_a_call(talk: Conversation) -> None:
    await talk.accept("c1")
    await talk.call("c1")
    raise RunnerGone


async def gone_before_a_call(talk: Conversation) -> None:
    await talk.accept("c1")
    raise RunnerGone


async def test_lost_answer_is_not_paid_twice(stack: Stack) -> None:
    stack.runner.scripts = [gone_in_a_call]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure) == (FAILED, review_pb2.FAILURE_REASON_AMBIGUOUS)
    assert (review.calls_started, review.ambiguous_calls, review.attempts) == (1, 1, 1)


async def test_open_call_is_taken_up_again_where_the_stream_breaks(stack: Stack) -> None:
    """Shown to fail (AMBIGUOUS) with `_take_up` never called."""
    taken: list[runner_pb2.Reattach] = []

    async def goes_on(talk: Conversation) -> None:
        taken.append(talk.reattach)
        await talk.result("c1", finding())
        await talk.end()

    async def breaks_again(talk: Conversation) -> None:
        taken.append(talk.reattach)
        raise RunnerGone

    stack.runner.scripts, stack.runner.resumed = [gone_in_a_call], [breaks_again, goes_on]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.attempts, review.calls_started) == (COMPLETED, 1, 1)
    assert len(review.findings) == 1
    assert [one.acked_sequence for one in taken] == [3, 3]  # accepted, leased, call started


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_a_stream_that_breaks_is_no_defect_whatever_grpc_calls_it(
    stack: Stack, code: grpc.StatusCode
) -> None:
    """grpc.aio says INTERNAL to whoever was writing when the connection broke: `make chaos` killed
    a runner, and reviews failed with it that nobody had begun. Shown to fail (INTERNAL, then
    AMBIGUOUS) with `_converse` returning the code as it is."""

    async def breaks_before_a_call(talk: Conversation) -> None:
        await talk.accept("c1")
        raise RunnerGone(code)

    async def breaks_in_a_call(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        raise RunnerGone(code)

    async def goes_on(talk: Conversation) -> None:
        await talk.result("c1", finding())
        await talk.end()

    stack.runner.scripts = [breaks_before_a_call, breaks_in_a_call]
    stack.runner.resumed = [goes_on]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.calls_started, review.attempts) == (COMPLETED, 1, 2)


async def test_lost_runner_is_replaced_if_nothing_was_sent(stack: Stack) -> None:
    stack.runner.scripts = [gone_before_a_call]
    review = await stack.ended(await stack.submit())
    # A key was given, so that there are two uses of it to tell of; the loss does not count.
    assert (review.state, review.attempts, review.calls_started) == (COMPLETED, 2, 1)
    assert await stack.sql("SELECT DISTINCT tries FROM attempt") == [(1,)]


async def test_runner_that_says_done_too_early_completes_nothing(stack: Stack) -> None:
    async def lazy(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.end()

    stack.runner.scripts = [lazy]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure) == (FAILED, review_pb2.FAILURE_REASON_INTERNAL)


async def test_same_submission_is_the_same_review(stack: Stack) -> None:
    same = request_id()
    first = await stack.submit(request_id=same, head_commit="abcdef0")
    again = await stack.submit(request_id=same, head_commit="abcdef0")
    other = await stack.submit(request_id=same, head_commit="abcdef1")
    assert first.name == again.name != other.name
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit(request_id=same, head_commit="abcdef0", title="other")
    assert error_info(refused.value).reason == "REQUEST_ID_CONFLICT"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"diff": b""}, "DIFF_EMPTY"),
        ({"diff": b"--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-a\n+b\n"}, "DIFF_MALFORMED"),
        ({"diff": b"hello canary\n"}, "DIFF_NOT_A_DIFF"),
        ({"diff": DIFF[:-20]}, "DIFF_MALFORMED"),
        ({"diff": b"+" * (2 * 1024 * 1024 + 1)}, "DIFF_TOO_LARGE"),
        ({"model": "openai"}, "MODEL_INVALID"),
        ({"model": "mistral/x"}, "MODEL_INVALID"),
        ({"model": "anthropic/claude-sonnet-5-5"}, "NO_ACTIVE_KEY"),
        ({"user": "ann"}, "NO_ACTIVE_KEY"),
        ({"repository": "a b"}, "INVALID_FIELD"),
        (
            {
                "context_files": [{"path": "a", "content": "canary" * 40_000}] * 20,
                "model": "openai/unknown",
            },
            "INVALID_FIELD",
        ),
    ],
)
async def test_bad_input_is_refused_with_a_reason(stack: Stack, values, reason) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit(**values)
    info = error_info(refused.value)
    assert info.reason == reason
    assert "canary" not in info.message
    assert await stack.sql("SELECT * FROM review") == []


async def test_too_many_calls_are_refused_with_figures(stack: Stack) -> None:
    lines = b"".join(b"+%06d %s\n" % (number, b"x" * 100) for number in range(17_000))
    header = b"--- a/x\n+++ b/x\n@@ -0,0 +1,17000 @@\n"
    await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", max_calls_per_review=3),
            update_mask={"paths": ["max_calls_per_review"]},
            request_id=request_id(),
        )
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit(diff=header + lines)
    info = error_info(refused.value)
    assert info.reason == "TOO_MANY_CALLS"
    assert info.metadata["max_calls_per_review"] == "3"
    assert int(info.metadata["calls"]) > 3


async def test_key_that_needs_rekeying_is_named(stack: Stack) -> None:
    key_id = last_of(next(iter(stack.keyvault.keys)))
    stack.keyvault.set_state("acme", key_id, custody_pb2.KEY_VERSION_STATE_NEEDS_REKEY)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    info = error_info(refused.value)
    assert (info.reason, info.metadata["key"]) == ("KEY_NEEDS_REKEY", key_id)


async def test_two_providers_need_a_chosen_model(stack: Stack) -> None:
    stack.keyvault.add("acme", options_pb2.PROVIDER_GEMINI)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    assert error_info(refused.value).reason == "NO_MODEL"
    settings = stack.client("acme").settings
    await settings.SetModelOverride(
        settings_pb2.SetModelOverrideRequest(
            parent="tenants/acme",
            repository_pattern="acme/*",
            model="gemini/gemini-x",
            request_id=request_id(),
        )
    )
    assert (await stack.submit()).model == "gemini/gemini-x"
    assert (await stack.submit(model="openai/gpt-6-luna")).model == "openai/gpt-6-luna"
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.submit(repository="other/repo")


async def test_daily_limit(stack: Stack) -> None:
    changed = await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", max_reviews_per_day=2),
            update_mask={"paths": ["max_reviews_per_day"]},
            request_id=request_id(),
        )
    )
    # In force: its own where it has one, else the deployment's.
    in_force = changed.settings.in_force
    assert (in_force.max_reviews_per_day, in_force.max_calls_per_review) == (2, 20)
    assert (in_force.max_diff_bytes, in_force.max_calls_per_day) == (2 * 1024 * 1024, 0)
    await stack.submit()
    await stack.submit()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    info = error_info(refused.value)
    assert (info.reason, info.metadata["limit"]) == ("DAILY_LIMIT", "2")
    assert await stack.sql("SELECT count(*) FROM review") == [(2,)]


async def test_no_call_above_the_days_ceiling(stack: Stack) -> None:
    """However many calls an attempt wants, and whatever the submission was told before."""
    told: list[bool] = []

    async def greedy(talk: Conversation) -> None:
        await talk.accept("c1", "c2", "c3", "c4")
        for number in range(1, 4):
            await talk.call(f"c{number}", number)
            await talk.result(f"c{number}")
        started = runner_pb2.CallStarted(chunk_id="c4", call_number=4)
        sequence = await talk.say(call_started=started)
        answers = {
            asyncio.create_task(one) for one in (talk.cancelled.wait(), talk.acked(sequence))
        }
        await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        for answer in answers:
            answer.cancel()
        told.append(talk.cancelled.is_set())
        await talk.end(review_pb2.FAILURE_REASON_INTERNAL)

    await stack.client("acme").settings.UpdateSettings(
        settings_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(name="tenants/acme/settings", max_calls_per_day=3),
            update_mask={"paths": ["max_calls_per_day"]},
            request_id=request_id(),
        )
    )
    stack.runner.scripts = [greedy]
    review = await stack.ended(await stack.submit())
    assert (review.state, review.failure) == (FAILED, review_pb2.FAILURE_REASON_DAILY_LIMIT)
    assert (review.calls_started, review.attempts, told) == (3, 1, [True])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.submit()
    info = error_info(refused.value)
    assert (info.reason, info.metadata["limit"]) == ("DAILY_LIMIT", "3")
    # An hour later, the first call of the hour counts those before.
    await stack.sql("UPDATE rate_bucket SET hour = hour - interval '1 hour'")
    with pytest.raises(grpc.aio.AioRpcError):
        await stack.submit()


async def test_tenant_has_so_many_places_and_the_rest_waits(stack: Stack) -> None:
    await stack.tenant("small", plan="starter")
    stack.keyvault.add("small")
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.accept()
        await go.wait()
        await talk.end()

    stack.runner.default = slow
    reviews = [await stack.submit("small") for _ in range(5)]
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING' HAVING count(*) = 2")
    # Another tenant is not held up.
    other = await stack.submit("acme")
    await stack.until("SELECT 1 FROM attempt WHERE tenant = 'acme' AND state = 'RUNNING'")
    await asyncio.sleep(0.3)
    states = await stack.sql(
        "SELECT state, count(*) FROM attempt WHERE tenant = 'small' GROUP BY 1 ORDER BY 1"
    )
    assert states == [("QUEUED", 3), ("RUNNING", 2)]
    go.set()
    for review in [*reviews, other]:
        assert (await stack.ended(review)).state == COMPLETED


async def test_cancel_while_it_waits_and_while_it_runs(stack: Stack) -> None:
    async def slow(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await talk.cancelled.wait()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST, ambiguous_call=True)

    await stack.tenant("small", plan="starter")
    stack.keyvault.add("small")
    stack.runner.default = slow
    runs, also_runs, waits = [await stack.submit("small") for _ in range(3)]
    await stack.until("SELECT 1 FROM provider_call HAVING count(*) = 2")
    cancelled = {}
    for review in (waits, runs, also_runs):
        request = review_pb2.CancelReviewRequest(name=review.name, request_id=request_id())
        response = await stack.client("small").reviews.CancelReview(request)
        again = await stack.client("small").reviews.CancelReview(request)
        assert again == response
        cancelled[review.name] = response.review
    assert {one.state for one in cancelled.values()} == {CANCELLED}
    assert cancelled[waits.name].ambiguous_calls == 0
    assert cancelled[runs.name].ambiguous_calls == 1
    # The trail of a cancelled attempt is completed: when was the plaintext gone?
    await stack.until("SELECT 1 FROM attempt WHERE close_time IS NOT NULL HAVING count(*) = 2")
    assert await stack.sql("SELECT * FROM review_content") == []
    assert len(stack.runner.talks) == 2


async def test_retry_of_a_failed_review(stack: Stack) -> None:
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_REFUSED)]
    review = await stack.ended(await stack.submit())
    request = review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
    response = await stack.client("acme").reviews.RetryReview(request)
    assert response.review.state != review_pb2.REVIEW_STATE_FAILED
    ended = await stack.ended(response.review)
    assert (ended.state, ended.attempts, ended.failure_message) == (COMPLETED, 2, "")
    again = await stack.client("acme").reviews.RetryReview(request)
    assert (again.review.state, again.review.attempts) == (COMPLETED, 2)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.RetryReview(
            review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
        )
    assert error_info(refused.value).reason == "WRONG_STATE"


async def test_content_of_a_failed_review_is_kept_for_a_day(stack: Stack) -> None:
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_REFUSED)]
    review = await stack.ended(await stack.submit())
    await stack.app.sweeper.retention()
    assert await stack.sql("SELECT count(*) FROM review_content") == [(1,)]
    await stack.sql("UPDATE review SET end_time = now() - interval '25 hours'")
    await stack.app.sweeper.retention()
    assert await stack.sql("SELECT count(*) FROM review_content") == [(0,)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.RetryReview(
            review_pb2.RetryReviewRequest(name=review.name, request_id=request_id())
        )
    assert error_info(refused.value).reason == "WRONG_STATE"


async def test_findings_are_deleted_after_their_retention(stack: Stack) -> None:
    review = await stack.ended(await stack.submit())
    await stack.sql("UPDATE review SET end_time = now() - interval '91 days'")
    await stack.app.sweeper.retention()
    assert await stack.sql("SELECT * FROM chunk_done") == []
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.GetReview(review_pb2.GetReviewRequest(name=review.name))
    assert error_info(refused.value).reason == "CONTENT_EXPIRED"


async def test_what_nobody_reads_travels_with_the_review(stack: Stack) -> None:
    submitted = await stack.submit(diff=BINARY + DIFF)
    assert submitted.unread_count == 1
    review = await stack.ended(submitted)
    assert (review.state, review.finding_count, review.unread_count) == (COMPLETED, 1, 1)
    assert list(review.unread) == [BINARY_PART]
    reviews = stack.client("acme").reviews
    listed = await reviews.ListReviews(review_pb2.ListReviewsRequest(parent="tenants/acme"))
    assert (listed.reviews[0].unread_count, len(listed.reviews[0].unread)) == (1, 0)
    ((stored,),) = await stack.sql("SELECT unread FROM review")
    assert b"secret-logo" not in stored
    for form in review_pb2.ExportFormat.values()[1:]:
        exported = await reviews.ExportReview(
            review_pb2.ExportReviewRequest(name=review.name, format=form)
        )
        assert "Read by no model" in exported.content


async def test_unread_parts_are_deleted_with_the_findings(stack: Stack) -> None:
    review = await stack.ended(await stack.submit(diff=BINARY))
    await stack.sql("UPDATE review SET end_time = now() - interval '91 days'")
    await stack.app.sweeper.retention()
    assert await stack.sql("SELECT unread FROM review") == [(None,)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.GetReview(review_pb2.GetReviewRequest(name=review.name))
    assert error_info(refused.value).reason == "CONTENT_EXPIRED"


@pytest.mark.parametrize(
    ("diff", "unread"),
    [(RENAME, 0), (BINARY, 1), (b"diff --git a/x b/x\nold mode 100644\nnew mode 100755\n", 0)],
)
async def test_a_change_without_a_line_is_complete_at_once(
    stack: Stack, diff: bytes, unread: int
) -> None:
    """No key is opened and no runner asked. Was refused as DIFF_NO_TEXT, and a gate exited 2."""
    same = request_id()
    review = await stack.submit(diff=diff, request_id=same)
    assert (review.state, review.finding_count, review.unread_count) == (COMPLETED, 0, unread)
    assert (review.calls_started, review.attempts) == (0, 0)
    assert review.HasField("end_time")
    assert (await stack.ended(review)).state == COMPLETED
    again = await stack.submit(diff=diff, request_id=same)
    assert (again.name, again.state) == (review.name, COMPLETED)
    assert await stack.sql("SELECT * FROM attempt") == []
    assert await stack.sql("SELECT * FROM review_content") == []
    assert stack.runner.talks == []
    # It took no place, and gives none back.
    assert (await stack.ended(await stack.submit())).state == COMPLETED


async def test_a_failed_review_is_exported(stack: Stack) -> None:
    stack.runner.scripts = [fails(review_pb2.FAILURE_REASON_QUOTA_EXHAUSTED)]
    review = await stack.ended(await stack.submit(diff=BINARY + DIFF))
    assert review.state == FAILED
    exported = await stack.client("acme").reviews.ExportReview(
        review_pb2.ExportReviewRequest(name=review.name, format=review_pb2.EXPORT_FORMAT_SARIF)
    )
    (run,) = json.loads(exported.content)["runs"]
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    levels = [one["level"] for one in invocation["toolExecutionNotifications"]]
    assert levels == ["warning", "error"]


async def test_dry_run_stores_and_sends_nothing(stack: Stack) -> None:
    diff = RENAME + BINARY + DIFF
    response = await stack.client("acme").reviews.DryRunReview(
        review_pb2.DryRunReviewRequest(
            parent="tenants/acme",
            input=review_pb2.ReviewInput(repository="acme/shop", diff=diff),
        )
    )
    assert (response.model, response.calls) == ("openai/gpt-6.1-terra", 1)
    assert list(response.chunks[0].files) == ["app.py"]
    assert list(response.skipped_files) == ["y"]
    assert response.unread_count == 1
    assert list(response.unread) == [BINARY_PART]
    assert response.max_calls_per_review == 20
    assert await stack.sql("SELECT * FROM review") == []
    assert stack.runner.talks == []


async def test_list_is_newest_first_in_pages(stack: Stack) -> None:
    names = [(await stack.submit(repository=f"acme/r{n % 2}")).name for n in range(5)]
    client = stack.client("acme").reviews
    seen: list[str] = []
    token = ""
    while True:
        page = await client.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/acme", page_size=2, page_token=token)
        )
        assert len(page.reviews) <= 2
        seen += [one.name for one in page.reviews]
        token = page.next_page_token
        if not token:
            break
    assert set(seen) == set(names)
    assert seen == sorted(seen, reverse=True)
    only = await client.ListReviews(
        review_pb2.ListReviewsRequest(
            parent="tenants/acme", filter=review_pb2.ReviewFilter(repository="acme/r1")
        )
    )
    assert {one.repository for one in only.reviews} == {"acme/r1"}


async def test_export_takes_a_review_that_has_ended(stack: Stack) -> None:
    async def slow(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.cancelled.wait()
        await talk.end(review_pb2.FAILURE_REASON_CHILD_LOST)

    client = stack.client("acme").reviews
    review = await stack.ended(await stack.submit())
    for format_ in list(review_pb2.ExportFormat.values())[1:]:
        response = await client.ExportReview(
            review_pb2.ExportReviewRequest(name=review.name, format=format_)
        )
        assert response.content
        assert response.media_type
    stack.runner.scripts = [slow]
    running_one = review_pb2.ExportReviewRequest(
        name=(await stack.submit()).name, format=review_pb2.EXPORT_FORMAT_TEXT
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.ExportReview(running_one)
    assert error_info(refused.value).reason == "WRONG_STATE"
    await client.CancelReview(
        review_pb2.CancelReviewRequest(name=running_one.name, request_id=request_id())
    )
    assert "cancelled" in (await client.ExportReview(running_one)).content


async def test_watch_streams_what_changes(stack: Stack) -> None:
    stack.runner.scripts = [broken_after_first_chunk, second_chunk]
    states = []
    review = await stack.submit()
    async with asyncio.timeout(60):
        async for response in stack.client("acme").reviews.WatchReview(
            review_pb2.WatchReviewRequest(name=review.name)
        ):
            states.append((response.review.state, response.review.chunks_done))
    assert states[-1] == (COMPLETED, 2)
    assert (review_pb2.REVIEW_STATE_QUEUED, 1) in states


async def test_lost_notifications_stop_no_attempt(stack: Stack) -> None:
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.accept("c1")
        await go.wait()
        await talk.call("c1")
        await talk.result("c1")
        await talk.end()

    stack.runner.scripts = [slow]
    review = await stack.submit()
    await stack.until("SELECT 1 FROM attempt WHERE state = 'RUNNING'")
    await stack.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN byokeep%%'"
    )
    await asyncio.sleep(1.5)
    go.set()
    ended = await stack.ended(review)
    assert (ended.state, ended.attempts) == (COMPLETED, 1)


async def test_our_own_defect_ends_the_attempt_at_once(stack: Stack) -> None:
    async def unstorable(talk: Conversation) -> None:
        await talk.accept("c1")
        await talk.call("c1")
        await talk.result("c1\0", finding())

    stack.runner.scripts = [unstorable]
    review = await stack.ended(await stack.submit())
    assert (review.failure, review.ambiguous_calls) == (review_pb2.FAILURE_REASON_AMBIGUOUS, 1)


@pytest.mark.parametrize("token", ["a\0b", "\u00e9", "\n"])
async def test_token_of_no_page_is_refused(stack: Stack, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.client("acme").reviews.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/acme", page_token=token)
        )
    assert error_info(refused.value).reason == "INVALID_FIELD"
