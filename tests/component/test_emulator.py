"""The real adapters against the real emulator, over real TLS, for each provider."""

from __future__ import annotations

import hashlib
import math
import threading
import time
import traceback

import pytest
from byokeep.orchestrator.v1 import key_pb2

from deploy.local.emulator.echo import encodings
from deploy.local.emulator.models import CHAT_MODELS, MAX_PAGE, listed
from deploy.local.emulator.wire.base import USAGE_TOKENS
from services.llm_runner.providers import (
    ADAPTERS,
    FINDINGS_SCHEMA,
    REVIEW,
    FailureKind,
    Limits,
    ProviderError,
    ReviewPrompt,
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


def dial(emulator, provider, key=None, limits=REVIEW, **how):
    adapter = ADAPTERS[provider]
    return adapter.client(
        key or key_for(provider), lambda host: emulator.connect(host, **how), limits
    )


def prompt_for(provider, model=None):
    model = model or CHAT_MODELS[provider][0]
    return ReviewPrompt(model, "You review code.", DIFF, FINDINGS_SCHEMA, 4096)


def review(emulator, provider, **settings):
    client = dial(emulator, provider, **settings)
    return ADAPTERS[provider].review(client, prompt_for(provider))


def models(emulator, provider, **settings):
    return ADAPTERS[provider].list_models(dial(emulator, provider, **settings))


def failure(call):
    with pytest.raises(ProviderError) as caught:
        call()
    return caught.value


def test_models_of_all_pages_that_can_review(emulator, provider):
    assert models(emulator, provider) == CHAT_MODELS[provider]
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
        ("context_too_long", {}, K.CONTEXT_TOO_LONG, 400),
        ("region_refused", {}, K.REGION_REFUSED, None),
        ("blocked", {}, K.PROVIDER_UNAVAILABLE, 403),
        ("error_event", {"events": 3}, K.PROVIDER_UNAVAILABLE, None),
        ("error_event", {"events": 0}, K.PROVIDER_UNAVAILABLE, None),
        ("cut_stream", {"events": 0}, K.AMBIGUOUS, None),
        ("cut_stream", {"events": 4}, K.AMBIGUOUS, None),
        ("malformed_json", {}, K.BAD_RESPONSE, 200),
        ("malformed_answer", {}, K.BAD_RESPONSE, 200),
        ("truncated", {}, K.TRUNCATED, 200),
        ("refusal", {}, K.REFUSED, 200),
        ("cut", {}, K.AMBIGUOUS, None),
        ("cut", {"after_bytes": 0}, K.AMBIGUOUS, None),
        ("cut", {"after_bytes": 30}, K.AMBIGUOUS, None),
    ],
)
def test_faults(emulator, provider, fault, settings, kind, status):
    emulator.control.fault(fault, provider=provider, path="chat", **settings)
    error = failure(lambda: review(emulator, provider))
    assert error.kind is kind
    assert status in (None, error.http_status)
    assert error.retry_after_seconds == (7.0 if fault == "rate_limited" else None)
    assert [c.fault for c in emulator.control.calls()] == [fault]  # one request, no retry
    assert review(emulator, provider).findings  # the fault struck once


SHORT = 0.2
LONG = 30.0


@pytest.mark.parametrize(
    ("fault", "limits"),
    [
        ("slow", Limits(answer=SHORT)),
        ("slow", Limits(total=SHORT)),
        ("drip_head", Limits(head=SHORT)),
        ("drip_head", Limits(total=SHORT)),
        ("flood_1xx", Limits(head=SHORT)),
        ("drip_extension", Limits(idle=SHORT)),
        ("drip_extension", Limits(total=SHORT)),
        ("drip_comment", Limits(idle=SHORT)),
        ("drip_comment", Limits(total=SHORT)),
    ],
)
def test_what_drips_renews_no_deadline(emulator, provider, fault, limits):
    """Real TLS, a byte or an answer every 20 ms: with a timeout for each read, none would end."""
    seconds = LONG if fault == "slow" else 0.02
    emulator.control.fault(fault, provider=provider, path="chat", seconds=seconds)
    started = time.monotonic()
    error = failure(lambda: review(emulator, provider, limits=limits))
    assert time.monotonic() - started < LONG / 2
    assert (error.kind, error.cause) == (K.AMBIGUOUS, key_pb2.UNREACHABLE_CAUSE_TIMEOUT)


@pytest.mark.parametrize("fault", ["drip_head", "flood_1xx", "slow", "drip_extension"])
def test_a_model_list_has_the_same_deadlines(emulator, provider, fault):
    emulator.control.fault(fault, path="models", seconds=LONG if fault == "slow" else 0.02)
    limits = Limits(answer=SHORT, head=SHORT)
    error = failure(lambda: models(emulator, provider, limits=limits))
    assert (error.kind, error.cause) == (K.AMBIGUOUS, key_pb2.UNREACHABLE_CAUSE_TIMEOUT)


def test_a_handshake_that_hangs_is_given_up(emulator, provider):
    """It took 144 s, for the handshake had the read's timeout, and three tries."""
    emulator.control.fault("hang_handshake")
    error = failure(lambda: review(emulator, provider, handshake=SHORT))
    expected = (K.NETWORK_BEFORE_SEND, key_pb2.UNREACHABLE_CAUSE_TIMEOUT)
    assert (error.kind, error.cause) == expected
    assert emulator.control.calls() == []
    assert review(emulator, provider).findings


def test_a_flood_of_answers_1xx_ends_by_its_number(emulator, provider):
    emulator.control.fault("flood_1xx", path="chat", seconds=0)
    error = failure(lambda: review(emulator, provider))
    assert (error.kind, error.cause) == (K.AMBIGUOUS, key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED)


def test_only_a_longer_prompt_is_too_long(emulator, provider):
    emulator.control.fault("context_too_long", after_bytes=len(DIFF), times=None)
    assert review(emulator, provider).findings
    prompt = ReviewPrompt(CHAT_MODELS[provider][0], "", DIFF + "x", FINDINGS_SCHEMA, 4096)
    client = dial(emulator, provider)
    error = failure(lambda: ADAPTERS[provider].review(client, prompt))
    assert error.kind is K.CONTEXT_TOO_LONG


def test_an_echo_comes_in_pieces_and_in_many_forms(emulator, provider):
    """What the child has to keep to itself: tests/security/test_echo.py."""
    emulator.control.fault("echo", times=None)
    key = key_for(provider)
    (finding,) = review(emulator, provider).findings
    assert key in finding["title"]
    assert all(one in finding["message"] for one in encodings(key))
    assert any(key in model for model in models(emulator, provider))


@pytest.mark.parametrize("fault", ["echo_key", "unauthorized", "cut", "redirect", "error_event"])
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
    ("marker", "listing", "chat"),
    [
        ("invalid", K.KEY_REJECTED, K.KEY_REJECTED),
        ("restricted", K.KEY_RESTRICTED, None),
        ("noquota", K.QUOTA_EXHAUSTED, K.QUOTA_EXHAUSTED),
    ],
)
def test_words_in_a_key(emulator, provider, marker, listing, chat):
    key = key_for(provider, marker)
    assert failure(lambda: models(emulator, provider, key=key)).kind is listing
    if chat is None:
        assert review(emulator, provider, key=key).findings
    else:
        assert failure(lambda: review(emulator, provider, key=key)).kind is chat


def test_key_of_another_provider_is_refused(emulator, provider):
    other = {"openai": "anthropic", "anthropic": "gemini", "gemini": "openai"}[provider]
    error = failure(lambda: review(emulator, provider, key=key_for(other)))
    assert error.kind is K.KEY_REJECTED


def test_unknown_model(emulator, provider):
    client = dial(emulator, provider)
    prompt = prompt_for(provider, "no-such-model")
    error = failure(lambda: ADAPTERS[provider].review(client, prompt))
    assert (error.kind, error.http_status) == (K.MODEL_NOT_FOUND, 404)


def test_untrusted_certificate_sends_nothing(emulator, provider, tmp_path):
    stranger, _, _ = make_certificates(tmp_path)
    error = failure(lambda: review(emulator, provider, ca=stranger))
    assert (error.kind, error.cause) == (K.NETWORK_BEFORE_SEND, key_pb2.UNREACHABLE_CAUSE_TLS)
    assert emulator.control.calls() == []


def test_nobody_listening_sends_nothing(emulator, provider):
    error = failure(lambda: review(emulator, provider, port=1))
    assert (error.kind, error.cause) == (K.NETWORK_BEFORE_SEND, key_pb2.UNREACHABLE_CAUSE_CONNECT)


def test_held_call_is_in_the_log_and_ends_when_released(emulator, provider):
    emulator.control.fault("hold", provider=provider)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(review(emulator, provider)))
    thread.start()
    deadline = time.monotonic() + 60
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
