"""The runner end to end: real processes, real TLS, three providers."""

from __future__ import annotations

import os
import signal
import socket
import time
from types import SimpleNamespace

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.ids import new_id
from byokeep.keyvault.v1 import lease_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2

from deploy.local.processes import alive, wait_for
from tests.component.runner.harness import DIFF, KEYS, refusal, running_bench


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench):
    return shared_bench.as_new()


REASON = review_pb2.FailureReason
VERDICT = key_pb2.ValidationVerdict
OUTCOME = lease_pb2.LeaseOutcome


def reason(outcome):
    return REASON.Name(outcome.failure).removeprefix("FAILURE_REASON_")


def released(bench):
    assert wait_for(lambda: bench.keyvault.releases)
    (release,) = bench.keyvault.releases
    return OUTCOME.Name(release.outcome).removeprefix("LEASE_OUTCOME_")


def big_diff(files, lines):
    parts = []
    for number in range(files):
        body = "".join(
            f"+value_{line} = compute({line})  # of the big file {number:02}\n"
            for line in range(lines)
        )
        parts.append(
            f"diff --git a/f{number}.py b/f{number}.py\n--- a/f{number}.py\n+++ b/f{number}.py\n"
            f"@@ -0,0 +1,{lines} @@\n{body}"
        )
    return "".join(parts).encode()


@pytest.mark.parametrize("provider", list(KEYS))
def test_a_review_says_everything_in_order(bench, provider):
    attempt = bench.review(provider)

    outcome = attempt.finish()

    assert [one.WhichOneof("message") for one in attempt.seen] == [
        "accepted",
        "leased",
        "call_started",
        "chunk_result",
        "outcome",
    ]
    assert [one.sequence for one in attempt.seen] == [1, 2, 3, 4, 5]
    assert reason(outcome) == "UNSPECIFIED"
    (result,) = attempt.of("chunk_result")
    assert [(one.path, one.start_line) for one in result.findings] == [("app/db.py", 11)]
    (accepted,) = attempt.of("accepted")
    assert result.chunk_id == accepted.chunks[0].chunk_id
    assert len(bench.emulator.control.calls()) == 1


def test_the_lease_is_released_with_a_true_report(bench):
    attempt = bench.review()

    outcome = attempt.finish()

    assert released(bench) == "COMPLETED"
    (release,) = bench.keyvault.releases
    assert release.lease_id == attempt.of("leased")[0].lease_id
    assert release.report == outcome.report
    assert release.report.process_id == attempt.pid
    opened, closed = release.report.open_time, release.report.close_time
    assert 0 <= time.time() - closed.ToNanoseconds() / 1e9 < 5
    assert opened.ToNanoseconds() < closed.ToNanoseconds()


@pytest.mark.parametrize("provider", list(KEYS))
@pytest.mark.parametrize(
    ("marker", "fault", "verdict"),
    [
        ("", None, "VALID"),
        ("invalid", None, "INVALID"),
        ("restricted", None, "RESTRICTED"),
        ("noquota", None, "QUOTA_EXHAUSTED"),
        ("", "server_error", "UNREACHABLE"),
        ("", "rate_limited", "UNREACHABLE"),
        ("", "cut", "UNREACHABLE"),
    ],
)
def test_a_validation_gives_a_verdict_after_one_call(bench, provider, marker, fault, verdict):
    if fault:
        bench.emulator.control.fault(fault)
    attempt = bench.validation(provider, KEYS[provider].replace("lain", marker or "lain"))

    outcome = attempt.finish()

    (result,) = attempt.of("validation_result")
    assert VERDICT.Name(result.verdict) == f"VALIDATION_VERDICT_{verdict}"
    assert bool(result.models) == (verdict == "VALID")
    assert reason(outcome) == "UNSPECIFIED"
    # keyvault is told as well: a version that served until now needs a new one then.
    assert released(bench) == ("KEY_REJECTED" if verdict == "INVALID" else "COMPLETED")
    assert {call.kind for call in bench.emulator.control.calls()} == {"models"}


def test_no_call_is_made_before_it_is_stored(bench):
    attempt = bench.review()
    started = attempt.until("call_started")

    time.sleep(0.5)
    assert bench.emulator.control.calls() == []

    attempt.ack(started.sequence)
    attempt.finish()
    assert len(bench.emulator.control.calls()) == 1


def test_an_ack_of_what_was_never_sent_starts_no_call(bench):
    attempt = bench.review()
    attempt.next("accepted")
    attempt.ack(99)
    attempt.proceed()
    attempt.next("leased")
    attempt.next("call_started")
    attempt.ack(1)

    time.sleep(0.3)

    assert bench.emulator.control.calls() == []
    attempt.send(cancel=runner_pb2.Cancel())
    attempt.finish()


@pytest.mark.parametrize(
    ("fault", "expected", "lease"),
    [
        ("unauthorized", "KEY_REJECTED", "KEY_REJECTED"),
        ("missing_scope", "KEY_RESTRICTED", "FAILED"),
        ("quota", "QUOTA_EXHAUSTED", "FAILED"),
        ("echo_key", "BAD_REQUEST", "FAILED"),
        ("malformed_json", "BAD_RESPONSE", "FAILED"),
        ("malformed_answer", "BAD_RESPONSE", "FAILED"),
        ("truncated", "BAD_RESPONSE", "FAILED"),
        ("refusal", "REFUSED", "FAILED"),
        ("cut", "AMBIGUOUS", "FAILED"),
        ("cut_stream", "AMBIGUOUS", "FAILED"),
        ("error_event", "PROVIDER_UNAVAILABLE", "FAILED"),
        ("region_refused", "REGION_REFUSED", "FAILED"),
        ("blocked", "PROVIDER_UNAVAILABLE", "FAILED"),
        ("context_too_long", "CONTEXT_TOO_LONG", "FAILED"),
    ],
)
def test_a_failed_call_is_told_and_not_made_again(bench, fault, expected, lease):
    bench.emulator.control.fault(fault, times=None)
    attempt = bench.review()

    outcome = attempt.finish()

    assert reason(outcome) == expected
    assert outcome.ambiguous_call is (expected == "AMBIGUOUS")
    assert released(bench) == lease
    assert len(bench.emulator.control.calls()) == 1 == len(attempt.of("call_started"))
    assert KEYS["openai"] not in str(outcome)


@pytest.mark.parametrize(("status", "provider"), [(503, "openai"), (529, "anthropic")])
def test_a_provider_that_is_down_gets_one_call(bench, status, provider):
    bench.emulator.control.fault("server_error", times=None, status=status)
    attempt = bench.review(provider)

    outcome = attempt.finish()

    assert reason(outcome) == "PROVIDER_UNAVAILABLE"
    assert len(bench.emulator.control.calls()) == 1 == len(attempt.of("call_started"))


@pytest.mark.parametrize("provider", list(KEYS))
@pytest.mark.parametrize("seconds", [1, 30, 700])
def test_retry_after_is_left_to_the_orchestrator(bench, provider, seconds):
    bench.emulator.control.fault("rate_limited", seconds=seconds)
    attempt = bench.review(provider)

    outcome = attempt.finish()

    assert reason(outcome) == "RATE_LIMITED"
    assert outcome.retry_after_ms == seconds * 1000
    assert len(bench.emulator.control.calls()) == 1


@pytest.mark.parametrize("provider", list(KEYS))
def test_what_a_provider_finds_too_long_is_split(bench, provider):
    bench.emulator.control.fault("context_too_long", after_bytes=40_000, times=None)
    attempt = bench.review(provider, diff=big_diff(files=2, lines=700))

    outcome = attempt.finish()

    assert reason(outcome) == "UNSPECIFIED"
    (planned,) = attempt.of("accepted")[0].chunks
    (split,) = attempt.of("chunk_split")
    assert split.chunk_id == planned.chunk_id
    results = [one.chunk_id for one in attempt.of("chunk_result")]
    assert [chunk.chunk_id for chunk in split.into] == results
    assert len(results) == 2
    assert len(bench.emulator.control.calls()) == 3 == len(attempt.of("call_started"))


def test_progress_of_an_open_call_is_told_and_not_numbered(bench):
    """Fails with the orchestrator asked to acknowledge it: the sequence then has a gap."""
    bench.emulator.control.fault("slow_stream", seconds=0.2)
    attempt = bench.review("anthropic")

    assert reason(attempt.finish()) == "UNSPECIFIED"

    told = attempt.of("call_progress")
    (started,) = attempt.of("call_started")
    assert told
    assert {one.chunk_id for one in told} == {started.chunk_id}
    sizes = [one.answer_bytes for one in told]
    assert sizes == sorted(sizes)
    numbered = [one.sequence for one in attempt.seen if not one.HasField("call_progress")]
    assert numbered == [1, 2, 3, 4, 5]
    assert {one.sequence for one in attempt.seen if one.HasField("call_progress")} == {0}


def test_what_can_not_be_reached_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    dial = f"api.openai.com=127.0.0.1:{port} api.anthropic.com=no-such-host.invalid:443"
    with running_bench(tmp_path, BYOKEEP_PROVIDER_DIAL=dial) as bench:
        for provider, cause in (("openai", "CONNECT"), ("anthropic", "NAME_RESOLUTION")):
            expected = key_pb2.UnreachableCause.Value(f"UNREACHABLE_CAUSE_{cause}")
            outcome = bench.review(provider).finish()
            assert (reason(outcome), outcome.unreachable_cause) == ("NETWORK", expected)
            attempt = bench.validation(provider)
            attempt.finish()
            (result,) = attempt.of("validation_result")
            assert (result.verdict, result.unreachable_cause) == (
                key_pb2.VALIDATION_VERDICT_UNREACHABLE,
                expected,
            )


def test_a_large_diff_is_reviewed_in_chunks_and_done_ones_are_skipped(bench):
    diff = big_diff(files=8, lines=6000)
    attempt = bench.review(diff=diff)
    accepted = attempt.next("accepted").accepted
    assert len(accepted.chunks) > 2
    assert all(0 < one.estimated_tokens <= 64_000 for one in accepted.chunks)

    done = [chunk.chunk_id for chunk in accepted.chunks[:-1]]
    attempt.proceed(done=done)
    outcome = attempt.finish()

    assert reason(outcome) == "UNSPECIFIED"
    assert [one.chunk_id for one in attempt.of("chunk_result")] == [accepted.chunks[-1].chunk_id]


def test_a_diff_of_4_mib_reaches_the_child(bench):
    diff = big_diff(files=20, lines=4900)
    assert len(diff) > 4 * 1024 * 1024
    attempt = bench.review(diff=diff)

    assert attempt.next("accepted").accepted.chunks
    attempt.send(cancel=runner_pb2.Cancel())
    attempt.finish()


@pytest.mark.parametrize(
    ("diff", "sentence"),
    [(b"", "The diff is empty"), (b"no diff at all", "No file of a unified diff")],
)
def test_a_diff_that_is_none_fails_before_a_lease(bench, diff, sentence):
    attempt = bench.review(diff=diff)

    outcome = attempt.finish()

    assert reason(outcome) == "BAD_REQUEST"
    assert sentence in outcome.message
    assert not bench.keyvault.leases


@pytest.mark.parametrize(
    ("code", "name", "metadata", "expected"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "GRANT_REFUSED", {}, "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.DATA_LOSS, "ROW_TAMPERED", {}, "LEASE_REFUSED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "LEASE_CAP", {}, "LEASE_CAP"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", {}, "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.UNAVAILABLE, "AUDIT_UNAVAILABLE", {}, "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.UNAVAILABLE, "KEK_UNAVAILABLE", {}, "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.FAILED_PRECONDITION, "DATABASE_ROLLED_BACK", {}, "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.FAILED_PRECONDITION, "TENANT_NOT_ACTIVE", {}, "TENANT_SUSPENDED"),
        (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE", {"state": "REVOKED"}, "KEY_REVOKED"),
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            "WRONG_STATE",
            {"state": "SUPERSEDED"},
            "LEASE_REFUSED",
        ),
        (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NEEDS_REKEY", {}, "KEY_NEEDS_REKEY"),
    ],
)
def test_a_refused_lease_ends_the_attempt(bench, code, name, metadata, expected):
    bench.keyvault.refusal = refusal(code, name, **metadata)
    bench.keyvault.refusal.retry_after_seconds = 41.5
    attempt = bench.review()

    outcome = attempt.finish()

    assert (reason(outcome), outcome.retry_after_ms) == (expected, 41_500)
    assert bench.keyvault.releases == []
    assert bench.emulator.control.calls() == []


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
def test_a_keyvault_that_ends_refuses_nothing(bench, code):
    """It cuts what came in its last moment with a bare CANCELLED, or its connection breaks."""
    bench.keyvault.refusal = SimpleNamespace(code=code, message="", trailing_metadata=tuple)
    assert reason(bench.review().finish()) == "KEYVAULT_UNAVAILABLE"


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_timeout_kills_the_child(bench, in_flight):
    bench.emulator.control.fault("hold")
    attempt = bench.review(timeout_seconds=1)
    started = attempt.until("call_started")
    if in_flight:
        attempt.ack(started.sequence)

    outcome = attempt.finish()

    assert reason(outcome) == "TIMEOUT"
    assert outcome.ambiguous_call is in_flight
    assert not alive(attempt.pid)
    assert released(bench) == "FAILED"


def test_the_room_is_told_at_once_and_again(bench):
    """At its start, as children come and go, and at least once a second. Shown to fail where
    `_count` tells nobody: the second message is late, and wrong."""
    capacity = bench.capacity()
    first = next(capacity)
    assert (first.free, first.draining) == (first.places, False)
    begun = time.monotonic()
    assert next(capacity) == first
    assert time.monotonic() - begun < 2
    attempt = bench.review()
    attempt.next("accepted")
    assert until(capacity, lambda told: told.free == first.places - 1)
    attempt.send(cancel=runner_pb2.Cancel())
    attempt.finish()
    assert until(capacity, lambda told: told.free == first.places)
    capacity.cancel()


def test_a_runner_without_keyvault_has_no_room(bench):
    """It could give its children no key."""
    capacity = bench.capacity()
    assert next(capacity).free
    bench.keyvault.mute = True
    assert until(capacity, lambda told: told.draining and told.free == 0)
    bench.keyvault.mute = False
    assert until(capacity, lambda told: not told.draining and told.free)
    capacity.cancel()


def until(capacity, wanted) -> bool:
    """Whether something is told within ten messages, of which there is one a second at least."""
    return any(wanted(next(capacity)) for _ in range(10))


def test_the_end_of_the_lease_ends_the_child(bench):
    bench.keyvault.life_seconds = 1
    bench.emulator.control.fault("hold")
    attempt = bench.review()

    assert reason(attempt.finish()) == "TIMEOUT"
    assert not alive(attempt.pid)


@pytest.mark.parametrize(("revoked", "expected"), [(False, "CHILD_LOST"), (True, "KEY_REVOKED")])
def test_cancel_kills_the_child(bench, revoked, expected):
    bench.emulator.control.fault("hold")
    attempt = bench.review()
    attempt.ack(attempt.until("call_started").sequence)
    assert wait_for(bench.emulator.control.held)

    attempt.send(cancel=runner_pb2.Cancel(key_revoked=revoked))
    outcome = attempt.finish()

    assert (reason(outcome), outcome.ambiguous_call) == (expected, True)
    assert not alive(attempt.pid)
    assert released(bench) == "CANCELLED"


@pytest.mark.parametrize("stage", ["accepted", "call_started", "in flight"])
def test_a_child_that_dies_is_reported(bench, stage):
    bench.emulator.control.fault("hold")
    attempt = bench.review()
    response = attempt.until("accepted" if stage == "accepted" else "call_started")
    if stage == "in flight":
        attempt.ack(response.sequence)
        assert wait_for(bench.emulator.control.held)

    os.kill(attempt.pid, signal.SIGKILL)
    outcome = attempt.finish()

    assert reason(outcome) == "CHILD_LOST"
    assert outcome.ambiguous_call is (stage == "in flight")
    assert stage == "accepted" or released(bench) == "CHILD_LOST"


def test_a_stream_that_broke_is_taken_up_again(bench):
    attempt = bench.review()
    started = attempt.until("call_started")
    attempt.call.cancel()

    again = bench.open(
        reattach=runner_pb2.Reattach(
            attempt_id=attempt.assign.attempt_id, fence=1, acked_sequence=started.sequence - 1
        )
    )
    assert again.next("call_started").sequence == started.sequence
    again.ack(started.sequence)
    outcome = again.finish()

    assert reason(outcome) == "UNSPECIFIED"
    assert len(again.of("chunk_result")) == 1
    assert len(bench.emulator.control.calls()) == 1


def test_an_unstored_outcome_is_kept(bench):
    attempt = bench.review()
    outcome = attempt.until("outcome")
    attempt.call.cancel()

    again = bench.open(reattach=runner_pb2.Reattach(attempt_id=attempt.assign.attempt_id, fence=1))

    assert again.finish() == outcome.outcome


@pytest.mark.parametrize(
    ("fence", "known", "code", "name"),
    [
        (2, True, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE"),
        (1, False, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    ],
)
def test_reattach_needs_the_attempt_and_its_fence(bench, fence, known, code, name):
    attempt = bench.review()
    attempt.next("accepted")
    attempt_id = attempt.assign.attempt_id if known else new_id("att")

    again = bench.open(reattach=runner_pb2.Reattach(attempt_id=attempt_id, fence=fence))
    with pytest.raises(grpc.RpcError) as error:
        again.next()

    info = error_info(error.value)
    assert (info.code, info.reason) == (code, name)
    attempt.send(cancel=runner_pb2.Cancel())
    attempt.finish()


def test_an_attempt_runs_once(bench):
    attempt = bench.review()
    attempt.next("accepted")

    second = bench.review(attempt_id=attempt.assign.attempt_id)
    with pytest.raises(grpc.RpcError) as error:
        second.next()

    assert error_info(error.value).reason == "WRONG_STATE"
    attempt.send(cancel=runner_pb2.Cancel())
    attempt.finish()


@pytest.mark.parametrize("first", [{"ack": runner_pb2.Ack(sequence=1)}, {}])
def test_a_stream_begins_with_an_attempt(bench, first):
    stream = bench.open(**first)

    with pytest.raises(grpc.RpcError) as error:
        stream.next()

    assert error_info(error.value).reason == "INVALID_FIELD"


def test_the_log_has_neither_content_nor_key(bench):
    canary = "canary_5f0b1c"
    bench.review(diff=DIFF.replace(b"users", canary.encode())).finish()
    bench.emulator.control.fault("echo_key")
    bench.review().finish()

    log = bench.log.read_text()

    assert "attempt_ended" in log
    assert canary not in log
    assert not any(key in log or key[8:] in log for key in KEYS.values())
