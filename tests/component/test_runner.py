"""The runner end to end: real processes, real TLS, three providers."""

from __future__ import annotations

import pytest
from byokeep.keyvault.v1 import lease_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2

from tests.component.runner.harness import KEYS, alive, running_bench, wait_for


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared):
    shared.keyvault.reset()
    shared.emulator.control.reset()
    return shared


@pytest.mark.parametrize("provider", list(KEYS))
def test_a_review_finds_what_the_provider_says_and_leaves_no_child(bench, provider):
    attempt = bench.review(provider)

    outcome = attempt.finish()

    assert outcome.failure == review_pb2.FAILURE_REASON_UNSPECIFIED, outcome
    (result,) = attempt.of("chunk_result")
    assert [(one.path, one.start_line) for one in result.findings] == [("app/db.py", 11)]
    assert not alive(attempt.pid)
