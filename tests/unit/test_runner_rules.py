"""The runner's pure parts: outbox, retries, endings, planning, settings, the lease's binding."""

from __future__ import annotations

import time

import pytest
from byokeep.keyvault.v1 import lease_pb2
from byokeep.leasing import lease_info
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common import models
from services.common.config import ConfigError
from services.llm_runner import config, endings, failures, plan
from services.llm_runner.calls import Calls
from services.llm_runner.channel import Kind
from services.llm_runner.endings import Ending
from services.llm_runner.providers import FailureKind, ProviderError

K = FailureKind
NEVER_AGAIN = set(K) - {K.RATE_LIMITED, K.PROVIDER_UNAVAILABLE, K.NETWORK_BEFORE_SEND}
REQUIRED = (
    *("DEPLOYMENT", "TRUST_DOMAIN", "LISTEN", "HEALTH_LISTEN", "CALLERS"),
    *("TLS_CERT", "TLS_KEY", "TLS_CA", "KEYVAULT_ADDRESS", "KEYVAULT_NAME"),
)
ENV = {f"BYOKEEP_{name}": "x" for name in REQUIRED}


def test_a_lease_is_bound_to_its_grant_and_its_id():
    infos = {lease_info(b"grant", "lea_1"), lease_info(b"other", "lea_1"), lease_info(b"grant", "")}

    assert len(infos) == 3
    assert lease_info(b"grant", "lea_1").startswith(b"\0\0\0\x10byokeep/lease/v1\0\0\0\x20")


class FakeChannel:
    """Stores nothing but what a child said; waits take no time."""

    def __init__(self):
        self.said = []
        self.waited = []

    def send(self, kind, message=b""):
        self.said.append(kind)

    def receive(self, kind):
        return b""

    def wait(self, sock, events, seconds):
        self.waited.append(seconds)


class FakeCall:
    """Fails in turn with each of some errors, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __call__(self):
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def call_started(fake):
    return fake.said.count(Kind.CALL_STARTED)


@pytest.mark.parametrize(
    ("kind", "tries"),
    [
        (K.RATE_LIMITED, 5),
        (K.PROVIDER_UNAVAILABLE, 3),
        (K.NETWORK_BEFORE_SEND, 3),
        *((kind, 1) for kind in sorted(NEVER_AGAIN)),
    ],
)
def test_only_what_can_help_is_tried_again(kind, tries):
    fake = FakeChannel()
    calls = Calls(fake, 20, time.monotonic() + 600)

    with pytest.raises(ProviderError):
        calls.make("chunk", 0, FakeCall(*[ProviderError(kind)] * 20))

    assert call_started(fake) == tries
    assert calls.left == 20 - tries
    assert all(0 < one < 10 for one in fake.waited)


@pytest.mark.parametrize(
    ("limit", "reserved", "left", "retry_after", "made"),
    [
        (20, 0, 600, 7.0, 2),
        (20, 0, 600, 20.0, 2),
        (20, 0, 600, 20.1, 1),
        (20, 0, 20, 19.0, 1),
        (3, 2, 600, 1.0, 1),
        (3, 1, 600, 1.0, 2),
        (1, 0, 600, 1.0, 1),
    ],
)
def test_retries_stay_within_time_and_calls(limit, reserved, left, retry_after, made):
    fake = FakeChannel()
    calls = Calls(fake, limit, time.monotonic() + left)
    call = FakeCall(ProviderError(K.RATE_LIMITED, retry_after_seconds=retry_after))

    if made == 1:
        with pytest.raises(ProviderError):
            calls.make("chunk", reserved, call)
    else:
        assert calls.make("chunk", reserved, call) == "answer"

    assert call_started(fake) == made
    assert fake.waited == [retry_after] * (made - 1)


@pytest.mark.parametrize("kind", list(K))
def test_every_kind_of_failure_has_a_meaning(kind):
    error = ProviderError(kind, retry_after_seconds=1.5)

    outcome = failures.provider_failed(error)

    assert outcome.failure != review_pb2.FAILURE_REASON_UNSPECIFIED
    assert outcome.message == str(error)
    assert outcome.retry_after_ms == 1500
    assert outcome.ambiguous_call == (kind is K.AMBIGUOUS)
    assert not (outcome.ambiguous_call and outcome.retryable)
    assert failures.verdict(error)
    assert outcome.retryable or failures.tries(error) == 1


@pytest.mark.parametrize("ending", list(Ending))
def test_every_ending_is_told_and_never_pays_twice(ending):
    quiet = endings.outcome(ending, call_in_flight=False)
    loud = endings.outcome(ending, call_in_flight=True)

    assert quiet.failure == loud.failure != review_pb2.FAILURE_REASON_UNSPECIFIED
    assert (loud.ambiguous_call, loud.retryable) == (True, False)
    assert endings.lease_outcome(None, ending) not in (
        lease_pb2.LEASE_OUTCOME_UNSPECIFIED,
        lease_pb2.LEASE_OUTCOME_COMPLETED,
        lease_pb2.LEASE_OUTCOME_KEY_REJECTED,
    )


def assign(**changed):
    given = {
        "repository": "a/b",
        "diff": b"--- a/x.py\n+++ b/x.py\n@@ -0,0 +1 @@\n+x = 1\n",
    }
    return runner_pb2.Assign(model="some-model", input=review_pb2.ReviewInput(**(given | changed)))


def chunk_ids(made):
    return [chunk.id for chunk in made.chunks]


def test_chunks_of_another_question_are_other_chunks():
    catalog = models.load(None)
    first = chunk_ids(plan.plan(assign(), "openai", catalog))

    assert first == chunk_ids(plan.plan(assign(), "openai", catalog))
    assert first != chunk_ids(plan.plan(assign(guidance="Be kind."), "openai", catalog))
    assert first != chunk_ids(plan.plan(assign(), "gemini", catalog))


def test_too_much_context_is_refused_in_a_sentence():
    context = [review_pb2.ContextFile(path=f"{n}", content="word " * 50_000) for n in range(20)]

    with pytest.raises(plan.PlanError, match="leave no room"):
        plan.plan(assign(context_files=context), "openai", models.load(None))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"BYOKEEP_PROVIDER_CA": "x"}, "development only"),
        ({"BYOKEEP_PROVIDER_DIAL": "api.openai.com=127.0.0.1:1"}, "development only"),
        ({"BYOKEEP_MODE": "development", "BYOKEEP_PROVIDER_DIAL": "nonsense"}, "PROVIDER_DIAL"),
        ({"BYOKEEP_MAX_CHILDREN": "0"}, "1 to 1000"),
    ],
)
def test_settings_that_can_not_be_are_refused(changed, text):
    with pytest.raises(ConfigError, match=text):
        config.load(ENV | changed)
