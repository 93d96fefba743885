"""The real adapters against the real emulator, over real TLS, for each provider."""

from __future__ import annotations

import hashlib
import math
import threading
import time
import traceback

import pytest

from deploy.local.emulator.models import CHAT_MODELS, MAX_PAGE, listed
from deploy.local.emulator.wire.base import USAGE_TOKENS
from services.llm_runner.providers import (
    ADAPTERS,
    FINDINGS_SCHEMA,
    FailureKind,
    ProviderError,
    ReviewPrompt,
    client,
)
from tests.component.providers.harness import make_certificates, running_emulator

PREFIX = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIzaSy"}
K = FailureKind

DIFF = """Review this change.
<diff>
### app/db.py
    10  import hashlib
import math
    11 +rows = db.execute(f"SELECT * FROM users WHERE id = {user_id}")
       -rows = []
    12 +ok = True
</diff>
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with running_emulator(tmp_path_factory.mktemp("emulator"), "--accept-any") as emulator:
        yield emulator


@pytest.fixture
def emulator(shared):
    shared.control.reset()
    return shared


@pytest.fixture(params=list(ADAPTERS))
def provider(request):
    return request.param


def key_for(provider, marker="plain"):
    return f"{PREFIX[provider]}{marker}-0123456789abcdef"


def dial(emulator, provider, key=None, timeout=5.0, **transport):
    adapter = ADAPTERS[provider]
    return client(adapter, key or key_for(provider), emulator.transport(**transport), timeout)


def prompt_for(provider, model=None):
    model = model or CHAT_MODELS[provider][0]
    return ReviewPrompt(model, "You review code.", DIFF, FINDINGS_SCHEMA, 4096)


def review(emulator, provider, **settings):
    with dial(emulator, provider, **settings) as http:
        return ADAPTERS[provider].review(http, prompt_for(provider))


def failure(call):
    with pytest.raises(ProviderError) as caught:
        call()
    return caught.value


def test_models_of_all_pages_that_can_review(emulator, provider):
    with dial(emulator, provider) as http:
        assert ADAPTERS[provider].list_models(http) == CHAT_MODELS[provider]
    pages = 1 if provider == "openai" else math.ceil(len(listed(provider)) / MAX_PAGE)
    assert len(emulator.control.calls()) == pages


def test_review_finds_the_line_with_one_request(emulator, provider):
    (finding,) = review(emulator, provider).findings
    assert (finding["path"], finding["start_line"], finding["end_line"]) == ("app/db.py", 11, 11)
    assert "[emulator rule sql-concatenation]" in finding["message"]
    (call,) = emulator.control.calls()
    assert (call.provider, call.kind, call.status, call.fault) == (provider, "chat", 200, None)


def test_no_usage(emulator, provider):
    """test_right_request sees the figures on the wire; the answer has no room for them."""
    answer = review(emulator, provider)
    assert answer.__slots__ == ("findings",)
    assert str(USAGE_TOKENS) not in str(answer.findings)


@pytest.mark.parametrize(
    ("fault", "settings", "kind", "status"),
    [
        ("missing_scope", {}, K.KEY_RESTRICTED, None),
        ("unauthorized", {}, K.KEY_REJECTED, None),
        ("quota", {}, K.QUOTA_EXHAUSTED, None),
        ("rate_limited", {"seconds": 7}, K.RATE_LIMITED, 429),
        ("server_error", {"status": 500}, K.PROVIDER_UNAVAILABLE, 500),
        ("server_error", {"status": 503}, K.PROVIDER_UNAVAILABLE, 503),
        ("server_error", {"status": 529}, K.PROVIDER_UNAVAILABLE, 529),
        ("redirect", {}, K.REDIRECTED, 302),
        ("echo_key", {}, K.BAD_REQUEST, 400),
        ("malformed_json", {}, K.BAD_RESPONSE, 200),
        ("malformed_answer", {}, K.BAD_RESPONSE, 200),
        ("truncated", {}, K.TRUNCATED, 200),
        ("refusal", {}, K.REFUSED, 200),
        ("cut", {}, K.AMBIGUOUS, None),
        ("cut", {"after_bytes": 0}, K.AMBIGUOUS, None),
        ("cut", {"after_bytes": 30}, K.AMBIGUOUS, None),
        ("slow", {"seconds": 30}, K.AMBIGUOUS, None),
    ],
)
def test_faults(emulator, provider, fault, settings, kind, status):
    emulator.control.fault(fault, provider=provider, path="chat", **settings)
    timeout = 0.5 if fault == "slow" else 5.0
    error = failure(lambda: review(emulator, provider, timeout=timeout))
    assert error.kind is kind
    assert status in (None, error.http_status)
    assert error.retry_after_seconds == (7.0 if fault == "rate_limited" else None)
    assert [c.fault for c in emulator.control.calls()] == [fault]  # one request, no retry
    assert review(emulator, provider).findings  # the fault struck once


@pytest.mark.parametrize("fault", ["echo_key", "unauthorized", "cut", "redirect"])
def test_error_shows_neither_key_nor_url(emulator, provider, fault):
    """Shown to fail by raising inside exchange's except block, and with the body's text."""
    emulator.control.fault(fault)
    error = failure(lambda: review(emulator, provider))
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = "".join(traceback.format_exception(error)) + repr(error) + str(error.args)
    assert key_for(provider)[-16:] not in shown
    assert ADAPTERS[provider].host not in str(error)


@pytest.mark.parametrize(
    ("marker", "models", "chat"),
    [
        ("invalid", K.KEY_REJECTED, K.KEY_REJECTED),
        ("restricted", K.KEY_RESTRICTED, None),
        ("noquota", K.QUOTA_EXHAUSTED, K.QUOTA_EXHAUSTED),
    ],
)
def test_words_in_a_key(emulator, provider, marker, models, chat):
    key = key_for(provider, marker)
    with dial(emulator, provider, key) as http:
        assert failure(lambda: ADAPTERS[provider].list_models(http)).kind is models
    if chat is None:
        assert review(emulator, provider, key=key).findings
    else:
        assert failure(lambda: review(emulator, provider, key=key)).kind is chat


def test_key_of_another_provider_is_refused(emulator, provider):
    other = {"openai": "anthropic", "anthropic": "gemini", "gemini": "openai"}[provider]
    error = failure(lambda: review(emulator, provider, key=key_for(other)))
    assert error.kind is K.KEY_REJECTED


def test_unknown_model(emulator, provider):
    with dial(emulator, provider) as http:
        prompt = prompt_for(provider, "no-such-model")
        error = failure(lambda: ADAPTERS[provider].review(http, prompt))
    assert (error.kind, error.http_status) == (K.MODEL_NOT_FOUND, 404)


def test_untrusted_certificate_sends_nothing(emulator, provider, tmp_path):
    stranger, _, _ = make_certificates(tmp_path)
    error = failure(lambda: review(emulator, provider, ca=stranger))
    assert error.kind is K.NETWORK_BEFORE_SEND
    assert emulator.control.calls() == []


def test_nobody_listening_sends_nothing(emulator, provider):
    error = failure(lambda: review(emulator, provider, port=1))
    assert error.kind is K.NETWORK_BEFORE_SEND


def test_held_call_is_in_the_log_and_ends_when_released(emulator, provider):
    emulator.control.fault("hold", provider=provider)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(review(emulator, provider)))
    thread.start()
    deadline = time.monotonic() + 5
    while not emulator.control.held():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (call,) = emulator.control.calls()
    assert (call.status, call.fault) == (None, "hold")
    assert emulator.control.release() == 1
    thread.join(5)
    assert answers[0].findings
    (call,) = emulator.control.calls()
    assert (call.status, call.held_ms > 0) == (200, True)


def test_fault_matches_provider_path_and_key(emulator):
    for match in ({"provider": "gemini"}, {"path": "models"}, {"key": "somebody-else"}):
        emulator.control.fault("server_error", **match)
    assert review(emulator, "openai").findings
    emulator.control.clear_faults()
    emulator.control.fault("server_error", provider="openai", key="plain", times=2)
    kinds = [failure(lambda: review(emulator, "openai")).kind for _ in range(2)]
    assert kinds == [K.PROVIDER_UNAVAILABLE] * 2
    assert review(emulator, "openai").findings


def test_log_names_the_key_by_digest_only(emulator, provider):
    key = key_for(provider, "invalid")
    failure(lambda: review(emulator, provider, key=key))
    (call,) = emulator.control.calls()
    assert call.key_digest == hashlib.sha256(key.encode()).hexdigest()[:8]
    assert key not in repr(call)
    assert emulator.control.calls(since=call.sequence) == []


def test_latency_applies_to_every_call(emulator):
    emulator.control.latency(0.2)
    started = time.monotonic()
    review(emulator, "gemini")
    assert time.monotonic() - started >= 0.2
    (call,) = emulator.control.calls()
    assert call.held_ms >= 190


def test_only_registered_keys_without_accept_any(tmp_path, provider):
    with running_emulator(tmp_path / "strict") as strict:
        assert failure(lambda: review(strict, provider)).kind is K.KEY_REJECTED
        strict.control.add_key(provider, key_for(provider))
        assert review(strict, provider).findings
        strict.control.add_key(provider, key_for(provider), "noquota")
        assert failure(lambda: review(strict, provider)).kind is K.QUOTA_EXHAUSTED
