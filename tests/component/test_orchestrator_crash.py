"""An orchestrator that is killed in the middle of a review: a whole stack, real processes."""

from __future__ import annotations

import time

import pytest
from byokeep.ids import new_id
from byokeep.orchestrator.v1 import review_pb2
from byokeep.testing import Stack

from deploy.local.processes import wait_for
from tests.security.test_canary import DIFF, add_key

pytestmark = [pytest.mark.deep, pytest.mark.timeout(300)]


@pytest.fixture
def stack():
    with Stack() as started:
        with started.connect("developer") as connection:
            add_key(connection, "openai", "sk-proj-" + "k" * 40, "main")
        yield started


def _submit(stack: Stack) -> str:
    with stack.connect("developer") as connection:
        request = review_pb2.SubmitReviewRequest(
            parent="tenants/demo",
            input=review_pb2.ReviewInput(repository="acme/shop", head_commit="abcdef0", diff=DIFF),
            request_id=new_id("req"),
        )
        return connection.reviews.SubmitReview(request).review.name


def _ended(stack: Stack, name: str) -> review_pb2.Review:
    over = (review_pb2.REVIEW_STATE_COMPLETED, review_pb2.REVIEW_STATE_FAILED)
    with stack.connect("developer") as connection:
        for _ in range(240):
            review = connection.reviews.GetReview(review_pb2.GetReviewRequest(name=name)).review
            if review.state in over:
                return review
            time.sleep(0.5)
    raise AssertionError(f"{name} has not ended")


@pytest.mark.parametrize("answered", [True, False], ids=["answered meanwhile", "answered later"])
def test_answer_outlives_the_orchestrator_that_asked_for_it(stack: Stack, answered: bool) -> None:
    """Its successor takes the attempt over, and the call is neither lost nor paid twice.

    Shown to fail (AMBIGUOUS) without `requeue_orphans` in the sweeper, where the attempt is fenced
    off, and without the runner's keeping of what nobody took.
    """
    stack.emulator.fault("hold", path="chat")
    name = _submit(stack)
    assert wait_for(lambda: stack.emulator.held() == 1, 60)
    stack.process("orchestrator").kill()
    if answered:
        stack.emulator.release()
    stack.process("orchestrator").start()
    stack.wait_ready("orchestrator")
    if not answered:
        assert wait_for(lambda: "stream_lost" in stack.log("orchestrator"), 60)
        stack.emulator.release()
    review = _ended(stack, name)
    assert review.state == review_pb2.REVIEW_STATE_COMPLETED, review
    assert (review.attempts, review.calls_started, review.ambiguous_calls) == (1, 1, 0)
    assert review.findings
