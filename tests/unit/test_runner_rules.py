"""The runner's pure parts: calls, splits, endings, planning, settings, the lease's binding."""

from __future__ import annotations

import pytest
from byokeep.keyvault.v1 import lease_pb2
from byokeep.leasing import lease_info
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.runner.v1 import runner_pb2

from services.common import models
from services.common.config import ConfigError
from services.llm_runner import config, endings, failures, plan, review
from services.llm_runner.calls import Calls
from services.llm_runner.channel import Kind
from services.llm_runner.endings import Ending
from services.llm_runner.providers import FailureKind, ProviderError, ReviewAnswer

K = FailureKind
REQUIRED = (
    *("DEPLOYMENT", "TRUST_DOMAIN", "LISTEN", "HEALTH_LISTEN", "CALLERS"),
    *("TLS_CERT", "TLS_KEY", "TLS_CA", "KEYVAULT_ADDRESS", "KEYVAULT_NAME"),
)
DIFF = b"--- a/x.py\n+++ b/x.py\n@@ -0,0 +1 @@\n+x = 1\n"
ENV = {
    f"BYOKEEP_{name}": "x:1" if name.endswith(("LISTEN", "ADDRESS")) else "x" for name in REQUIRED
}


def test_a_lease_is_bound_to_its_grant_and_its_id():
    infos = {lease_info(b"grant", "lea_1"), lease_info(b"other", "lea_1"), lease_info(b"grant", "")}

    assert len(infos) == 3
    assert lease_info(b"grant", "lea_1").startswith(b"\0\0\0\x10byokeep/lease/v1\0\0\0\x20")


class FakeChannel:
    """Acknowledges whatever a child says, and remembers it."""

    def __init__(self):
        self.said = []

    def send(self, kind, message=b""):
        self.said.append((kind, message))

    def receive(self, kind):
        return b""

    def of(self, kind):
        return [message for said, message in self.said if said is kind]


class FakeAdapter:
    """Takes a prompt up to a length, and finds nothing; or fails with some errors first."""

    def __init__(self, longest, *errors):
        self.longest = longest
        self.errors = list(errors)
        self.prompts = []

    def review(self, client, prompt, progress):
        self.prompts.append(prompt.user)
        if self.errors:
            raise self.errors.pop(0)
        if len(prompt.user) > self.longest:
            raise ProviderError(K.CONTEXT_TOO_LONG, http_status=400)
        return ReviewAnswer([])


def attempt(adapter, diff, *, done=(), max_calls=20):
    """A review in a child, without the child; what it said, and its outcome."""
    fake = FakeChannel()
    made = plan.plan(assign(diff=diff), "openai", models.load(None))
    outcome = review.run(fake, Calls(fake, max_calls), made, done, adapter, None)
    return fake, made, outcome


def long_diff(files=4, lines=600):
    body = "".join(f"+value_{line} = compute({line})\n" for line in range(lines))
    return "".join(
        f"--- /dev/null\n+++ b/f{number}.py\n@@ -0,0 +1,{lines} @@\n{body}"
        for number in range(files)
    ).encode()


@pytest.mark.parametrize("kind", list(K))
def test_a_call_is_made_once_whatever_it_fails_with(kind):
    """Fails with a loop around the call in Calls.make: a dead provider got nine calls."""
    adapter = FakeAdapter(10**9, ProviderError(kind, retry_after_seconds=1))

    fake, _, outcome = attempt(adapter, DIFF)

    assert outcome.failure != review_pb2.FAILURE_REASON_UNSPECIFIED
    assert len(adapter.prompts) == len(fake.of(Kind.CALL_STARTED)) == 1


def test_what_is_too_long_is_split_until_it_fits():
    adapter = FakeAdapter(30_000)

    fake, made, outcome = attempt(adapter, long_diff())

    assert outcome == runner_pb2.Outcome()
    (whole,) = chunk_ids(made)
    plan_now = [whole]
    for split in fake.of(Kind.CHUNK_SPLIT):
        place = plan_now.index(split.chunk_id)
        plan_now[place : place + 1] = [chunk.chunk_id for chunk in split.into]
    assert plan_now == [result.chunk_id for result in fake.of(Kind.CHUNK_RESULT)]
    assert [one.call_number for one in fake.of(Kind.CALL_STARTED)] == list(
        range(1, len(adapter.prompts) + 1)
    )
    read = [prompt for prompt in adapter.prompts if len(prompt) <= 30_000]
    shown = [line for prompt in read for line in prompt.splitlines() if " +value_" in line]
    assert len(shown) == 4 * 600  # every line once
    assert all("### f" in prompt for prompt in read)


def test_what_is_as_long_as_what_was_too_long_is_not_tried():
    """Fails without `too_long`: each of the two chunks is then refused once."""
    diff = long_diff(files=2, lines=5_000)
    adapter = FakeAdapter(150_000)

    fake, made, outcome = attempt(adapter, diff)

    assert outcome == runner_pb2.Outcome()
    assert len(made.chunks) == 2
    assert len([one for one in adapter.prompts if len(one) > 150_000]) == 1
    assert len(fake.of(Kind.CHUNK_SPLIT)) == 2


def test_what_no_split_makes_short_enough_fails_with_its_reason():
    fake, _, outcome = attempt(FakeAdapter(10), long_diff(), max_calls=100)

    assert outcome.failure == review_pb2.FAILURE_REASON_CONTEXT_TOO_LONG
    assert len(fake.of(Kind.CALL_STARTED)) < 12


@pytest.mark.parametrize("limit", range(1, 6))
def test_split_calls_count(limit):
    fake, _, outcome = attempt(FakeAdapter(30_000), long_diff(), max_calls=limit)

    assert outcome.failure == review_pb2.FAILURE_REASON_CONTEXT_TOO_LONG
    assert len(fake.of(Kind.CALL_STARTED)) <= limit


def test_a_review_of_more_chunks_than_calls_starts_none():
    fake, _, outcome = attempt(FakeAdapter(10**9), long_diff(2, 5_000), max_calls=1)

    assert outcome.failure == review_pb2.FAILURE_REASON_BAD_REQUEST
    assert not fake.said


def test_a_later_attempt_goes_on_with_the_parts_that_are_left():
    """Fails without `was_split`: the whole chunk is then sent, and refused, once more."""
    first, _, _ = attempt(FakeAdapter(30_000), long_diff())
    results = [one.chunk_id for one in first.of(Kind.CHUNK_RESULT)]
    adapter = FakeAdapter(30_000)

    fake, _, outcome = attempt(adapter, long_diff(), done=results[:-1])

    assert outcome == runner_pb2.Outcome()
    assert [one.chunk_id for one in fake.of(Kind.CHUNK_RESULT)] == results[-1:]
    assert len(adapter.prompts) == 1
    assert fake.of(Kind.CHUNK_SPLIT) == first.of(Kind.CHUNK_SPLIT)


def test_progress_is_told_at_most_once_a_second(monkeypatch):
    """Fails without `_next`: each of the hundred events is then told."""
    now = [0.0]
    monkeypatch.setattr(review.time, "monotonic", lambda: now[0])

    class Streaming(FakeAdapter):
        def review(self, client, prompt, progress):
            for size in range(100):
                now[0] += 0.1
                progress(size)
            return ReviewAnswer([])

    fake, made, _ = attempt(Streaming(0), DIFF)

    told = fake.of(Kind.CALL_PROGRESS)
    assert {one.chunk_id for one in told} == set(chunk_ids(made))
    assert 9 <= len(told) <= 10
    assert [one.answer_bytes for one in told] == sorted(one.answer_bytes for one in told)


def test_a_short_call_tells_no_progress():
    fake, _, _ = attempt(FakeAdapter(10**9), DIFF)

    assert fake.of(Kind.CALL_PROGRESS) == []


@pytest.mark.parametrize("kind", list(K))
def test_every_kind_of_failure_has_a_meaning(kind):
    timeout = key_pb2.UNREACHABLE_CAUSE_TIMEOUT
    error = ProviderError(kind, retry_after_seconds=1.5, cause=timeout)

    outcome = failures.provider_failed(error)

    assert outcome.failure != review_pb2.FAILURE_REASON_UNSPECIFIED
    assert outcome.message == str(error)
    assert outcome.retry_after_ms == 1500
    assert outcome.unreachable_cause == timeout
    assert outcome.ambiguous_call == (kind is K.AMBIGUOUS)
    assert failures.verdict(error)


@pytest.mark.parametrize("ending", list(Ending))
def test_every_ending_is_told_and_never_pays_twice(ending):
    quiet = endings.outcome(ending, call_in_flight=False)
    loud = endings.outcome(ending, call_in_flight=True)

    assert quiet.failure == loud.failure != review_pb2.FAILURE_REASON_UNSPECIFIED
    assert (quiet.ambiguous_call, loud.ambiguous_call) == (False, True)
    assert endings.lease_outcome(None, ending, 0) not in (
        lease_pb2.LEASE_OUTCOME_UNSPECIFIED,
        lease_pb2.LEASE_OUTCOME_COMPLETED,
        lease_pb2.LEASE_OUTCOME_KEY_REJECTED,
    )


def assign(**changed):
    given = {"repository": "a/b", "diff": DIFF}
    return runner_pb2.Assign(model="some-model", input=review_pb2.ReviewInput(**(given | changed)))


def chunk_ids(made):
    return [chunk.id for chunk in made.chunks]


def test_chunks_are_those_of_the_model_that_done_ones_were_made_for():
    """So that a review goes on with another, where its model is gone. Shown to fail where the plan
    is the calling model's."""
    catalog = models.load(None)
    before, other = assign(), assign()
    other.model, other.plan_model = "gpt-6-luna", before.model
    made = plan.plan(other, "openai", catalog)
    assert chunk_ids(made) == chunk_ids(plan.plan(before, "openai", catalog))
    assert made.model == made.prompt(made.chunks[0]).model == "gpt-6-luna"
    other.plan_model = ""
    assert chunk_ids(made) != chunk_ids(plan.plan(other, "openai", catalog))


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
