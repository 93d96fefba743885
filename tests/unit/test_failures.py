"""The one table of what follows from a failure, and who asks it."""

from __future__ import annotations

import ast
from pathlib import Path

import grpc
import pytest
from byokeep.orchestrator.v1 import review_pb2

from services.common.errors import ByokeepError
from services.orchestrator.policy import failures
from services.orchestrator.policy.failures import (
    MAX_TRIES,
    TABLE,
    Decision,
    Failure,
    Follows,
    Holds,
)
from services.orchestrator.policy.states import AttemptKind, Reason, Verdict
from services.orchestrator.store.attempts import KeyAttempt, ReviewAttempt
from services.orchestrator.work.executions import KeyResult
from services.orchestrator.work.outcomes import (
    check_ending,
    key_after_silence,
    review_after_silence,
)

REASONS = [failures.reason_of(value) for value in list(review_pb2.FailureReason.values())[1:]]
# Uncounted, however often: what nobody's patience costs anything.
WAITS = {
    "RUNNER_UNAVAILABLE",
    "RUNNERS_FULL",
    "KEYVAULT_UNAVAILABLE",
    "LEASE_CAP",
    "TENANT_SUSPENDED",
    "KEY_NEEDS_REKEY",
    "RATE_LIMITED",
    "NETWORK",
}
# Whether the answer to a call was lost, the call could be billed twice, or nothing would change.
ENDS = {
    "KEY_RESTRICTED",
    "QUOTA_EXHAUSTED",
    "MODEL_NOT_FOUND",
    "BAD_REQUEST",
    "BAD_RESPONSE",
    "REFUSED",
    "AMBIGUOUS",
    "LEASE_REFUSED",
    "KEY_REVOKED",
    "DAILY_LIMIT",
    "CONTENT_UNREADABLE",
    "CONTEXT_TOO_LONG",
    "REGION_REFUSED",
    "INTERNAL",
}


def test_every_reason_stands_in_the_table() -> None:
    assert set(TABLE) == set(REASONS)
    assert failures.reason_of(0) is None
    assert failures.reason_of(999) is Reason.INTERNAL  # a newer runner's


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_says_what_to_do_in_whole_sentences(reason: str) -> None:
    told = failures.failed_sentence(reason, key="key_1", model="m")
    assert told.endswith(".")
    assert "{" not in told
    waits = failures.waiting_sentence(reason, key="key_1", cause="TLS")
    # A lost answer is only asked for again where the tenant wants that.
    assert bool(waits) is (TABLE[reason].follows is not Follows.END or reason == "AMBIGUOUS")
    assert waits == "" or (waits.endswith(".") and "{" not in waits)


@pytest.mark.parametrize("reason", REASONS)
def test_what_follows(reason: str) -> None:
    many = failures.decide(Failure(reason), tries=50, spare_calls=3)
    first = failures.decide(Failure(reason), tries=1, spare_calls=3)
    assert (many.follows is Follows.WAIT) is (reason in WAITS)
    assert (first.follows is Follows.END) is (reason in ENDS)


@pytest.mark.parametrize("reason", ["AMBIGUOUS", "CHILD_LOST", "TIMEOUT", "KEY_REVOKED"])
def test_a_lost_answer_is_asked_for_again_where_the_tenant_wants_it(reason: str) -> None:
    def decided(tries: int, spare: int = 0) -> tuple[Follows, str]:
        lost = Failure(reason, ambiguous=True)
        found = failures.decide(lost, tries=tries, spare_calls=spare, retry_ambiguous=True)
        return found.follows, found.reason

    if reason == "KEY_REVOKED":
        assert decided(1) == (Follows.END, "KEY_REVOKED")
        return
    assert decided(1) == decided(MAX_TRIES - 1) == (Follows.RETRY, "AMBIGUOUS")
    assert decided(MAX_TRIES) == decided(1, spare=-1) == (Follows.END, "AMBIGUOUS")


@pytest.mark.parametrize("reason", REASONS)
def test_a_lost_answer_is_never_asked_for_again(reason: str) -> None:
    decision = failures.decide(Failure(reason, 5.0, ambiguous=True), tries=1, spare_calls=3)
    # Who revoked a key wants to read that it was; all else is told by what may be on the bill.
    assert decision == Decision(
        Follows.END, "KEY_REVOKED" if reason == "KEY_REVOKED" else "AMBIGUOUS"
    )


def test_revoked_in_a_call_says_both() -> None:
    told = failures.failed_sentence(Reason.KEY_REVOKED, key="key_1", model="m", lost_call=True)
    assert "revoked" in told
    assert "may have been billed" in told


def test_retries_are_counted_and_back_off() -> None:
    delays = []
    for tries in range(1, MAX_TRIES):
        decision = failures.decide(Failure("PROVIDER_UNAVAILABLE"), tries=tries, spare_calls=3)
        assert decision.follows is Follows.RETRY
        delays.append(decision.delay_seconds)
    assert delays == sorted(delays)
    assert 1.6 <= delays[0] <= 2.4
    last = failures.decide(Failure("PROVIDER_UNAVAILABLE"), tries=MAX_TRIES, spare_calls=3)
    assert last.follows is Follows.END


@pytest.mark.parametrize("seconds", [0.5, 30.0, 700.0, 3600.0])
@pytest.mark.parametrize("reason", ["RATE_LIMITED", "PROVIDER_UNAVAILABLE"])
def test_what_the_provider_says_of_later_is_waited_for(reason: str, seconds: float) -> None:
    """Uncounted, and as long as it says. Shown to fail where more than 600 s end the review."""
    failure = Failure(reason, seconds)
    decision = failures.decide(failure, tries=MAX_TRIES, spare_calls=-1, refused_call=True)
    assert decision.follows is Follows.WAIT
    assert decision.delay_seconds >= seconds
    # The provider did nothing for that call: it takes none of the review's.
    assert decision.refund == 1


def test_waits_grow_with_what_was_waited() -> None:
    waited = [0, 8, 40, 4000]
    delays = [
        failures.decide(Failure("NETWORK"), tries=1, waited_seconds=one).delay_seconds
        for one in waited
    ]
    assert delays == sorted(delays)
    assert delays[0] <= 1.2
    assert delays[-1] <= 72


@pytest.mark.parametrize("reason", ["RUNNERS_FULL", "RUNNER_UNAVAILABLE"])
@pytest.mark.parametrize("waited", [0, 40, 4000, 80_000])
def test_who_found_no_runner_is_started_soon_and_never_at_once(reason: str, waited: float) -> None:
    """Its runner told of room that was gone: a pause, for the next to be told; no more, for places
    are given only where there are some. Shown to fail with `_LONGEST_DELAY` for all."""
    decision = failures.decide(Failure(reason), tries=1, waited_seconds=waited)
    assert 0.5 <= decision.delay_seconds <= 1.5


def test_a_call_that_was_not_made_is_not_given_back() -> None:
    decision = failures.decide(Failure("KEYVAULT_UNAVAILABLE"), tries=1, spare_calls=0)
    assert (decision.follows, decision.refund) == (Follows.WAIT, 0)
    too_few = failures.decide(Failure("PROVIDER_UNAVAILABLE"), tries=1, spare_calls=-1)
    assert too_few.follows is Follows.END


def test_a_newer_version_is_taken_at_once_and_uncounted() -> None:
    for reason, row in TABLE.items():
        if row.newer:
            decision = failures.decide(Failure(reason), tries=MAX_TRIES, at_once=True)
            assert (decision.follows, decision.delay_seconds) == (Follows.WAIT, 0.0)
            assert (decision.holds, decision.checks) == (Holds.ATTEMPT, False)


def test_who_else_waits() -> None:
    held = {reason: row.holds for reason, row in TABLE.items() if row.holds is not Holds.ATTEMPT}
    assert held == {
        "KEYVAULT_UNAVAILABLE": Holds.KEY,
        "LEASE_CAP": Holds.KEY,
        "KEY_NEEDS_REKEY": Holds.KEY,
        "KEY_REJECTED": Holds.KEY,
        "TENANT_SUSPENDED": Holds.TENANT,
    }
    assert [reason for reason, row in TABLE.items() if row.checks] == ["KEY_REJECTED"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "RUNNER_UNAVAILABLE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "RUNNERS_FULL"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "TIMEOUT"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INTERNAL"),
    ],
)
def test_a_stream_that_ended(code: grpc.StatusCode, reason: str) -> None:
    assert failures.of_stream(code, call_open=False) == Failure(reason)
    assert failures.of_stream(code, call_open=True) == Failure("AMBIGUOUS", ambiguous=True)


@pytest.mark.parametrize(
    ("code", "error", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "KEK_UNAVAILABLE", "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.UNAVAILABLE, "EPOCH_MISSING", "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "KEYVAULT_UNAVAILABLE"),
        (grpc.StatusCode.FAILED_PRECONDITION, "CONTENT_EXPIRED", "CONTENT_UNREADABLE"),
        (grpc.StatusCode.DATA_LOSS, "ROW_TAMPERED", "CONTENT_UNREADABLE"),
        (grpc.StatusCode.INTERNAL, "INTERNAL", "INTERNAL"),
    ],
)
def test_content_that_did_not_open(code: grpc.StatusCode, error: str, reason: str) -> None:
    assert failures.of_content(ByokeepError(code, error, "x")).reason == reason


OF_ANY = {
    "attempt_id": "att_1",
    "tenant": "acme",
    "key_id": "key_1",
    "key_version": 1,
    "fence": 1,
    "tries": 1,
    "turn": 0,
    "runner_id": "",
    "provider": "openai",
    "owner": "",
    "actor": "spiffe://x/ci",
}


def of_review(**values) -> ReviewAttempt:
    own = {
        "review_id": "rev_1",
        "wait_reason": "",
        "waited_seconds": 0.0,
        "calls_made": 0,
        "chunks_total": 1,
        "model": "m",
        "plan_model": "",
        "fallback_models": [],
        "input": b"",
        "done_chunks": [],
        "calls_left": 5,
        "trace_parent": "",
        "retry_ambiguous": False,
    }
    return ReviewAttempt(**(OF_ANY | own | values))


def of_key(kind: AttemptKind, *, reviews_wait: bool = True) -> KeyAttempt:
    return KeyAttempt(
        **OF_ANY,
        kind=kind,
        validations=0,
        validation_hours=0.0,
        destroy_previous=False,
        reviews_wait=reviews_wait,
    )


def test_silent_worker_is_followed_unless_a_call_may_have_been_paid() -> None:
    assert review_after_silence(of_review(), False).again is not None
    lost = review_after_silence(of_review(), True)
    assert (lost.again, lost.failure, lost.review_state) == (None, "AMBIGUOUS", "FAILED")
    poison = review_after_silence(of_review(tries=MAX_TRIES), False)
    assert (poison.again, poison.failure) == (None, "CHILD_LOST")
    assert review_after_silence(of_review(calls_left=0), False).again is None
    for kind in (AttemptKind.VALIDATION, AttemptKind.CHECK):
        assert key_after_silence(of_key(kind)).again_seconds is not None


@pytest.mark.parametrize(
    ("result", "pauses", "resumes", "again"),
    [
        (KeyResult(verdict=Verdict.VALID), None, "KEY_REJECTED", False),
        (KeyResult(verdict=Verdict.RESTRICTED), None, "KEY_REJECTED", False),
        (KeyResult(verdict=Verdict.INVALID), "KEY_NEEDS_REKEY", "KEY_REJECTED", False),
        (KeyResult(verdict=Verdict.UNREACHABLE, cause="TLS"), None, None, True),
        (KeyResult(Failure(Reason.KEYVAULT_UNAVAILABLE)), None, None, True),
        (KeyResult(Failure(Reason.KEY_REVOKED)), None, "KEY_REJECTED", False),
    ],
)
def test_the_look_at_a_rejected_key(result: KeyResult, pauses, resumes, again) -> None:
    ending = check_ending(of_key(AttemptKind.CHECK), result)
    assert (ending.pauses, ending.resumes) == (pauses, resumes)
    # Where no review waits for it, it was somebody's wish, and is over.
    unasked = check_ending(of_key(AttemptKind.CHECK, reviews_wait=False), result)
    assert unasked.again_seconds is None
    assert (ending.again_seconds is not None) is again
    assert ending.action == ""


def test_nobody_else_decides_by_a_reason() -> None:
    """The table is asked wherever something failed: no other module of the orchestrator compares
    a failure's name, but for the one that tells a revoked lease from a revoked key, and those that
    end or begin a pause."""
    allowed = {
        "policy/failures.py": set(REASONS),
        # Failures of our own making.
        "work/execution.py": {"DAILY_LIMIT", "INTERNAL"},
        "work/executions.py": {"INTERNAL"},
        "work/outcomes.py": {"KEY_REVOKED", "CHILD_LOST", "KEY_REJECTED", "KEY_NEEDS_REKEY"},
        "work/sweeper.py": {"KEY_REJECTED"},
        "work/fleet.py": {"RUNNER_UNAVAILABLE", "RUNNERS_FULL", "KEYVAULT_UNAVAILABLE"},
        "store/tenants.py": {"TENANT_SUSPENDED"},
    }
    root = Path("services/orchestrator")
    for file in root.rglob("*.py"):
        found = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Reason"
        }
        name = file.relative_to(root).as_posix()
        assert found <= allowed.get(name, set()), name


def test_another_model_is_taken_at_once_and_its_call_is_given_back() -> None:
    failure = Failure("MODEL_NOT_FOUND")
    assert failures.other_model_helps(failure.reason)
    assert failures.decide(failure, tries=1).follows is Follows.END
    again = failures.decide(
        failure, tries=MAX_TRIES, spare_calls=-1, refused_call=True, at_once=True
    )
    assert (again.follows, again.delay_seconds, again.refund) == (Follows.WAIT, 0.0, 1)
    helped = {name for name in failures.TABLE if failures.other_model_helps(name)}
    assert helped == {"MODEL_NOT_FOUND"}


def test_a_managed_key_is_not_the_tenants_to_mend() -> None:
    for sentence in (
        failures.failed_sentence("KEY_NEEDS_REKEY", key="k", model="m", managed=True),
        failures.waiting_sentence("KEY_NEEDS_REKEY", key="k", managed=True),
    ):
        assert sentence.endswith("The key is managed: ask the operator of the deployment.")
    assert "managed" not in failures.waiting_sentence("RATE_LIMITED", key="k", managed=True)
    assert "managed" not in failures.waiting_sentence("KEY_NEEDS_REKEY", key="k")
