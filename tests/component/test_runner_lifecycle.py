"""Starting, overload, losing keyvault or the zygote, stopping: a runner of its own for each."""

from __future__ import annotations

import os
import signal
import time

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2
from google.rpc import error_details_pb2, status_pb2

from deploy.local.processes import alive, wait_for
from tests.component.runner.harness import running_bench


@pytest.fixture
def bench(tmp_path):
    with running_bench(tmp_path, BYOKEEP_MAX_CHILDREN="2") as bench:
        yield bench


def in_flight(bench):
    """A review whose provider call is held."""
    bench.emulator.control.fault("hold")
    held = bench.emulator.control.held()
    attempt = bench.review()
    attempt.ack(attempt.until("call_started").sequence)
    assert wait_for(lambda: bench.emulator.control.held() > held)
    return attempt


def test_more_attempts_than_children_are_turned_away(bench):
    running = [bench.review(), bench.review()]
    for attempt in running:
        attempt.next("accepted")

    with pytest.raises(grpc.RpcError) as error:
        bench.review().next()

    assert error_info(error.value).reason == "OVERLOADED"
    assert _retry_info(error.value)
    for attempt in running:
        attempt.proceed()
        attempt.finish()
    assert bench.review().finish().failure == review_pb2.FAILURE_REASON_UNSPECIFIED


def _retry_info(error):
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    return [one for one in status.details if one.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]


def test_a_short_loss_of_keyvault_holds_calls_back_and_fails_nothing(bench):
    attempt = bench.review()
    started = attempt.until("call_started")
    bench.keyvault.mute = True
    time.sleep(1.5)

    attempt.ack(started.sequence)
    time.sleep(0.5)
    assert bench.emulator.control.calls() == []
    bench.keyvault.mute = False

    assert attempt.finish().failure == review_pb2.FAILURE_REASON_UNSPECIFIED
    assert len(bench.emulator.control.calls()) == 1


def test_five_seconds_without_keyvault_kill_the_children(bench):
    attempt = in_flight(bench)
    bench.keyvault.mute = True
    lost = time.monotonic()

    outcome = attempt.finish()

    assert 4 < time.monotonic() - lost < 7
    assert outcome.failure == review_pb2.FAILURE_REASON_KEYVAULT_UNAVAILABLE
    assert outcome.ambiguous_call
    assert not alive(attempt.pid)


def test_a_keyvault_that_is_slow_to_speak_is_heard_in_the_end(bench):
    """Shown to fail: where each try is given up after as long as the one before."""
    heard = bench.log.read_text().count("revocations_heard")
    bench.keyvault.slow_seconds = 3.0
    bench.keyvault.mute = True
    assert wait_for(lambda: "revocations_lost" in bench.log.read_text())
    bench.keyvault.mute = False

    assert wait_for(lambda: bench.log.read_text().count("revocations_heard") > heard, 30)
    assert bench.review().finish().failure == review_pb2.FAILURE_REASON_UNSPECIFIED


def test_a_lost_zygote_ends_the_service_after_its_attempts(bench):
    attempt = in_flight(bench)

    os.kill(bench.zygote, signal.SIGKILL)
    outcome = attempt.finish(runner_ends=True)

    assert outcome.failure == review_pb2.FAILURE_REASON_CHILD_LOST
    assert not alive(attempt.pid)
    assert bench.process.wait(20) == 1


def test_sigterm_lets_attempts_end(bench):
    attempt = in_flight(bench)

    bench.process.terminate()
    time.sleep(0.5)
    assert alive(attempt.pid)
    bench.emulator.control.release()

    assert attempt.finish(runner_ends=True).failure == review_pb2.FAILURE_REASON_UNSPECIFIED
    assert bench.process.wait(15) == 0


def test_a_bad_request_does_not_hurt_the_zygote(bench):
    attempt = bench.review()
    attempt.next("accepted")
    attempt.send(proceed=runner_pb2.Proceed())

    with pytest.raises(grpc.RpcError):
        attempt.until("outcome")

    assert bench.review().finish().failure == review_pb2.FAILURE_REASON_UNSPECIFIED
