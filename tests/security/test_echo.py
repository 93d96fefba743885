"""`echo` (55): a provider's answer that holds the key, in every encoding, shows it nowhere."""

from __future__ import annotations

import pytest
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.testing.canary import forms, found_in

from deploy.local.emulator.echo import encodings
from services.llm_runner.withhold import MASK
from tests.component.runner.harness import running_bench

PREFIXES = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
KEYS = {name: f"{prefix}Zq3xV7nKp0LwT9yBd4HsRc8MfUa2GjEo" for name, prefix in PREFIXES.items()}


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench):
    return shared_bench.as_new()


def shown(provider, said):
    """The forms of the key in all that a runner's stream said, as bytes and as text."""
    wanted = forms(KEYS[provider], PREFIXES[provider])
    wanted |= {f"encoding {n}": one.encode() for n, one in enumerate(encodings(KEYS[provider]))}
    return found_in(b"\n".join(one.SerializeToString() for one in said), wanted)


@pytest.mark.parametrize("provider", list(KEYS))
def test_findings_that_hold_the_key_are_masked_and_kept(bench, provider):
    """Fails without the mask in ChildEnd.send: title, message and suggestion show it whole.

    The answer comes in events of 40 characters, so that no event holds a key whole.
    """
    bench.emulator.control.fault("echo")
    attempt = bench.review(provider, KEYS[provider])

    assert not attempt.finish().failure

    assert shown(provider, attempt.seen) == []
    (result,) = attempt.of("chunk_result")
    (finding,) = result.findings
    assert (finding.path, finding.start_line) == ("app/db.py", 11)
    assert finding.title == f"Key {PREFIXES[provider]}{MASK}"
    assert finding.message.count(MASK) >= len(encodings(KEYS[provider]))
    assert MASK in finding.suggestion


@pytest.mark.parametrize("provider", list(KEYS))
def test_models_that_hold_the_key_are_masked(bench, provider):
    bench.emulator.control.fault("echo", times=None)
    attempt = bench.validation(provider, KEYS[provider])

    assert not attempt.finish().failure

    (result,) = attempt.of("validation_result")
    assert result.verdict == key_pb2.VALIDATION_VERDICT_VALID
    assert any(MASK in model for model in result.models)
    assert shown(provider, attempt.seen) == []


@pytest.mark.parametrize("provider", list(KEYS))
@pytest.mark.parametrize("fault", ["echo_key", "unauthorized", "error_event", "blocked"])
def test_errors_that_hold_the_key_are_told_in_our_words(bench, provider, fault):
    bench.emulator.control.fault(fault, path="chat")
    attempt = bench.review(provider, KEYS[provider])

    assert attempt.finish().failure != review_pb2.FAILURE_REASON_UNSPECIFIED

    assert shown(provider, attempt.seen) == []
    assert found_in(bench.log.read_bytes(), forms(KEYS[provider], PREFIXES[provider])) == []


def test_a_diff_that_holds_the_key_is_reviewed(bench):
    """A key that was committed by mistake is what a review should find: it is not refused."""
    key = KEYS["openai"]
    diff = b"--- a/c.py\n+++ b/c.py\n@@ -0,0 +1 @@\n+eval(%s)\n" % key.encode()
    attempt = bench.review("openai", key, diff=diff)

    assert not attempt.finish().failure

    (result,) = attempt.of("chunk_result")
    assert [one.path for one in result.findings] == ["c.py"]
