"""Provider adapters against scripted answers: failures, parsing, and what never leaks."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain, repeat

import pytest
from byokeep.orchestrator.v1 import key_pb2

from services.llm_runner.providers import (
    ADAPTERS,
    FINDINGS_SCHEMA,
    REVIEW,
    VALIDATION,
    FailureKind,
    ProviderError,
    ReviewPrompt,
    exchange,
    table,
)
from services.llm_runner.providers.base import MAX_MODEL_PAGES
from services.llm_runner.providers.exchange import MAX_BODY_BYTES
from services.llm_runner.wire import LostError, UnreachableError

K = FailureKind
KEY = "canary-key-8d1f63b0a7"
PROMPT = ReviewPrompt("some-model", "system text", "user text", FINDINGS_SCHEMA, 1000)
FINDING = {
    "path": "a.py",
    "start_line": 3,
    "end_line": 4,
    "severity": "high",
    "category": "security",
    "title": "t",
    "message": "m",
    "suggestion": "",
}


@pytest.fixture(params=list(ADAPTERS))
def name(request):
    return request.param


class Line:
    """A connection on which what was sent is answered with bytes, each as one read."""

    def __init__(self, answer):
        self.sent = b""
        self._answer = answer
        self._said = None
        self.closed = False

    def write(self, data, until):
        self.sent += data

    def read(self, until):
        if self._said is None:
            self._said = iter(self._answer(self.sent))
        said = next(self._said, b"")
        if isinstance(said, Exception):
            raise said
        return said

    def close(self):
        self.closed = True


def dial(name, answer, key=KEY):
    """A client whose requests are answered by a function of the request's bytes."""
    return ADAPTERS[name].client(key, lambda _host: Line(answer), REVIEW)


def http(status, body=b"", headers=None, *, chunked=False):
    """An HTTP answer; a body that is a list comes in so many chunks, each a read of its own."""
    headers = {"content-type": "application/json", **(headers or {})}
    pieces = body if isinstance(body, list) else [body]
    length = {"content-length": str(sum(map(len, pieces)))}
    headers |= {"transfer-encoding": "chunked"} if chunked else length
    lines = [
        f"HTTP/1.1 {status} Whatever",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    yield "\r\n".join(lines).encode() + b"\r\n\r\n"
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece
    if chunked:
        yield b"0\r\n\r\n"


def answering(status=200, document=None, headers=None, content=None):
    content = json.dumps(document).encode() if content is None else content
    return lambda _request: http(status, content, headers)


def event(document):
    return b"data: %s\n\n" % json.dumps(document).encode()


STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def streaming(*pieces):
    """An answer that is a stream: bytes as they are, a document as an event."""
    encoded = [one if isinstance(one, bytes) else event(one) for one in pieces]
    return lambda _request: http(200, encoded, STREAM, chunked=True)


def review(name, answer):
    return ADAPTERS[name].review(dial(name, answer), PROMPT)


def models(name, answer):
    return ADAPTERS[name].list_models(dial(name, answer))


def failure(name, handler, call=review):
    with pytest.raises(ProviderError) as caught:
        call(name, handler)
    return caught.value


def text_event(name, text):
    if name == "openai":
        return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
    if name == "anthropic":
        return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}
    return {"candidates": [{"content": {"parts": [{"text": text}]}}]}


def thought_event(name, text):
    """What a model thinks, or another part that is not of the answer."""
    if name == "openai":
        return {"choices": [], "usage": {"total_tokens": 424242}}
    if name == "anthropic":
        return {
            "type": "content_block_delta",
            "delta": {"type": "thinking_delta", "thinking": text},
        }
    parts = [{"text": text, "thought": True}]
    return {"candidates": [{"content": {"parts": parts}}], "usageMetadata": {"x": 424242}}


DONE = {"openai": "stop", "anthropic": "end_turn", "gemini": "STOP"}


def end_event(name, reason=None):
    reason = DONE[name] if reason is None else reason
    if name == "openai":
        return {"choices": [{"delta": {}, "finish_reason": reason}]}
    if name == "anthropic":
        return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"x": 424242}}
    return {"candidates": [{"finishReason": reason}], "usageMetadata": {"totalTokenCount": 424242}}


def success(name, text, reason=None):
    """The provider's stream around a model's text, in three pieces."""
    third = len(text) // 3
    pieces = [text[:third], text[third : 2 * third], text[2 * third :]]
    said = [text_event(name, piece) for piece in pieces]
    return streaming(thought_event(name, "hm"), *said, end_event(name, reason))


def openai(message="m", code=None, type=None):
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def anthropic(type, message="m", **more):
    return {"type": "error", "error": {"type": type, "message": message, **more}}


def google(message="m", *details, status="X"):
    rpc = "type.googleapis.com/google.rpc."
    details = [{**d, "@type": rpc + d["@type"]} for d in details]
    return {"error": {"code": 0, "message": message, "status": status, "details": details}}


def info(reason):
    return {"@type": "ErrorInfo", "reason": reason}


def quota(*ids):
    return {"@type": "QuotaFailure", "violations": [{"quotaId": i} for i in ids]}


RETRY_34 = {"@type": "RetryInfo", "retryDelay": "34.5s"}
WAIT = {"retry-after": "2"}
TOO_LARGE = "Request too large for gpt-x on tokens per min (TPM): Limit 30000, Requested 36278."
SCOPES = "You have insufficient permissions for this operation. Missing scopes: api.model.read."

CLASSIFIED = [
    # OpenAI
    ("openai", 401, openai("Incorrect API key", "invalid_api_key"), {}, K.KEY_REJECTED),
    ("openai", 401, openai("deactivated", "account_deactivated"), {}, K.KEY_REJECTED),
    ("openai", 401, openai(SCOPES), {}, K.KEY_RESTRICTED),
    ("openai", 401, {"error": SCOPES}, {}, K.KEY_RESTRICTED),
    ("openai", 401, openai("no", "insufficient_scope"), {}, K.KEY_RESTRICTED),
    ("openai", 403, openai(SCOPES), {}, K.KEY_RESTRICTED),
    ("openai", 403, openai("no access", "model_not_found"), {}, K.MODEL_NOT_FOUND),
    ("openai", 401, openai("Your IP is not on the IP allowlist"), {}, K.KEY_RESTRICTED),
    ("openai", 401, {"error": "Unauthorized"}, {}, K.PROVIDER_UNAVAILABLE),
    ("openai", 401, {"error": {"message": "denied"}}, {}, K.PROVIDER_UNAVAILABLE),
    ("openai", 403, {"detail": "denied"}, {}, K.PROVIDER_UNAVAILABLE),
    ("openai", 403, openai("x", "unsupported_country_region_territory"), {}, K.REGION_REFUSED),
    ("openai", 403, openai("Country, region, or territory not supported"), {}, K.REGION_REFUSED),
    ("openai", 404, openai("no", "model_not_found"), {}, K.MODEL_NOT_FOUND),
    ("openai", 429, openai("q", "insufficient_quota", "insufficient_quota"), {}, K.QUOTA_EXHAUSTED),
    ("openai", 429, openai("q", None, "insufficient_quota"), WAIT, K.QUOTA_EXHAUSTED),
    ("openai", 429, openai("q", "credit_balance_exhausted"), {}, K.QUOTA_EXHAUSTED),
    ("openai", 429, openai("q", "project_spend_limit_exceeded"), {}, K.QUOTA_EXHAUSTED),
    ("openai", 429, openai("q", "organization_usage_limit_exceeded"), {}, K.QUOTA_EXHAUSTED),
    ("openai", 400, openai("q", "billing_hard_limit_reached"), {}, K.QUOTA_EXHAUSTED),
    ("openai", 429, openai("r", "rate_limit_exceeded", "requests"), WAIT, K.RATE_LIMITED),
    ("openai", 429, openai("r", "slow_down"), {}, K.RATE_LIMITED),
    (
        "openai",
        429,
        openai("Rate limit reached for x on tokens", type="tokens"),
        WAIT,
        K.RATE_LIMITED,
    ),
    ("openai", 429, openai(TOO_LARGE, "rate_limit_exceeded", "tokens"), WAIT, K.CONTEXT_TOO_LONG),
    ("openai", 400, openai("x", "context_length_exceeded"), {}, K.CONTEXT_TOO_LONG),
    (
        "openai",
        400,
        openai("This model's maximum context length is 1 token."),
        {},
        K.CONTEXT_TOO_LONG,
    ),
    ("openai", 400, openai("Input tokens exceed the configured limit"), {}, K.CONTEXT_TOO_LONG),
    ("openai", 413, openai(), {}, K.CONTEXT_TOO_LONG),
    ("openai", 400, openai("flagged", "invalid_prompt"), {}, K.REFUSED),
    ("openai", 503, openai("x", "slow_down"), WAIT, K.PROVIDER_UNAVAILABLE),
    # Anthropic
    ("anthropic", 401, anthropic("authentication_error"), {}, K.KEY_REJECTED),
    ("anthropic", 403, anthropic("permission_error"), {}, K.KEY_RESTRICTED),
    ("anthropic", 404, anthropic("not_found_error"), {}, K.MODEL_NOT_FOUND),
    ("anthropic", 402, anthropic("billing_error"), {}, K.QUOTA_EXHAUSTED),
    (
        "anthropic",
        400,
        anthropic("invalid_request_error", "Your credit balance is too low to access"),
        {},
        K.QUOTA_EXHAUSTED,
    ),
    (
        "anthropic",
        400,
        anthropic("invalid_request_error", "You have reached your specified API usage limits."),
        {},
        K.QUOTA_EXHAUSTED,
    ),
    (
        "anthropic",
        429,
        anthropic("rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
        WAIT,
        K.QUOTA_EXHAUSTED,
    ),
    ("anthropic", 429, anthropic("rate_limit_error"), {}, K.RATE_LIMITED),
    *[
        ("anthropic", status, anthropic("x", details={"error_code": code}), {}, kind)
        for status, code, kind in (
            (429, "contract_spend_limit_reached", K.QUOTA_EXHAUSTED),
            (429, "linked_organization_spend_limit_reached", K.QUOTA_EXHAUSTED),
            (403, "linked_organization_billing_unavailable", K.QUOTA_EXHAUSTED),
            (429, "ramp_limit_exceeded", K.RATE_LIMITED),
            (403, "organization_on_hold", K.KEY_REJECTED),
            (403, "claude_code_key_creator_not_member", K.KEY_REJECTED),
            (403, "cmek_key_disabled", K.PROVIDER_UNAVAILABLE),
            (403, "cmek_key_unreachable", K.PROVIDER_UNAVAILABLE),
        )
    ],
    (
        "anthropic",
        429,
        anthropic("rate_limit_error", "You have reached your API usage limits"),
        {},
        K.QUOTA_EXHAUSTED,
    ),
    ("anthropic", 429, anthropic("rate_limit_error"), WAIT, K.RATE_LIMITED),
    (
        "anthropic",
        400,
        anthropic("invalid_request_error", "This organization has been disabled."),
        {},
        K.KEY_REJECTED,
    ),
    ("anthropic", 400, anthropic("invalid_request_error"), {}, K.BAD_REQUEST),
    ("anthropic", 413, anthropic("request_too_large"), {}, K.CONTEXT_TOO_LONG),
    (
        "anthropic",
        400,
        anthropic("invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum"),
        {},
        K.CONTEXT_TOO_LONG,
    ),
    (
        "anthropic",
        400,
        anthropic(
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 178959 + 64000 > 200000",
        ),
        {},
        K.CONTEXT_TOO_LONG,
    ),
    (
        "anthropic",
        403,
        {"error": {"type": "forbidden", "message": "Request not allowed"}},
        {},
        K.REGION_REFUSED,
    ),
    ("anthropic", 403, {"error": {"type": "forbidden"}}, {}, K.PROVIDER_UNAVAILABLE),
    (
        "anthropic",
        401,
        anthropic("authentication_error", "CORS requests are not allowed for this Organization"),
        {},
        K.BAD_REQUEST,
    ),
    ("anthropic", 529, anthropic("overloaded_error"), {}, K.PROVIDER_UNAVAILABLE),
    # Gemini
    ("gemini", 400, google("API key not valid.", info("API_KEY_INVALID")), {}, K.KEY_REJECTED),
    ("gemini", 400, google("bad argument"), {}, K.BAD_REQUEST),
    ("gemini", 400, [google("no", info("API_KEY_INVALID"))], {}, K.KEY_REJECTED),
    (
        "gemini",
        400,
        google("The input token count (3475108) exceeds the maximum number of tokens allowed (1)."),
        {},
        K.CONTEXT_TOO_LONG,
    ),
    (
        "gemini",
        400,
        google("User location is not supported for the API use.", status="FAILED_PRECONDITION"),
        {},
        K.REGION_REFUSED,
    ),
    ("gemini", 403, {"error": {"message": "denied"}}, {}, K.PROVIDER_UNAVAILABLE),
    ("gemini", 401, google("x", info("ACCESS_TOKEN_TYPE_UNSUPPORTED")), {}, K.KEY_REJECTED),
    ("gemini", 403, google("Your API key was reported as leaked."), {}, K.KEY_REJECTED),
    ("gemini", 403, google(f"Consumer 'api_key:{KEY}' has been suspended."), {}, K.KEY_REJECTED),
    ("gemini", 403, google("no", info("API_KEY_SERVICE_BLOCKED")), {}, K.KEY_RESTRICTED),
    ("gemini", 404, google("models/x is not found"), {}, K.MODEL_NOT_FOUND),
    (
        "gemini",
        429,
        google("q", quota("GeneratePerMinute", "GenerateRequestsPerDayPerProject"), RETRY_34),
        {},
        K.QUOTA_EXHAUSTED,
    ),
    ("gemini", 429, google("Your prepayment credits are depleted."), {}, K.QUOTA_EXHAUSTED),
    ("gemini", 429, google("q", quota("GeneratePerMinute"), RETRY_34), {}, K.RATE_LIMITED),
    ("gemini", 429, google("Resource has been exhausted"), {}, K.RATE_LIMITED),
    ("gemini", 503, google("overloaded", RETRY_34), {}, K.PROVIDER_UNAVAILABLE),
]


@pytest.mark.parametrize(("name", "status", "document", "headers", "kind"), CLASSIFIED)
def test_classification(name, status, document, headers, kind):
    for call in (review, models):
        error = failure(name, answering(status, document, headers), call)
        assert (error.kind, error.http_status) == (kind, status)
        if kind not in (K.RATE_LIMITED, K.PROVIDER_UNAVAILABLE):
            assert error.retry_after_seconds is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, K.REDIRECTED),
        (204, K.BAD_RESPONSE),
        (400, K.BAD_REQUEST),
        (401, K.PROVIDER_UNAVAILABLE),
        (402, K.PROVIDER_UNAVAILABLE),
        (403, K.PROVIDER_UNAVAILABLE),
        (404, K.PROVIDER_UNAVAILABLE),
        (413, K.CONTEXT_TOO_LONG),
        (429, K.RATE_LIMITED),
        (408, K.PROVIDER_UNAVAILABLE),
        (500, K.PROVIDER_UNAVAILABLE),
        (504, K.PROVIDER_UNAVAILABLE),
        (529, K.PROVIDER_UNAVAILABLE),
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><title>403 Forbidden</title>cloudflare: has been suspended, missing scopes",
        b'{"error": 7}',
        b'{"error": {"details": 1}}',
        b'{"error": {"code": "x", "type": "y", "message": 1, "status": []}, "type": "error"}',
        b'[{"error": "x"}, {}]',
    ],
)
def test_a_body_that_is_not_the_providers_says_nothing_of_the_key(name, status, kind, content):
    """Shown to fail with `documented` always true."""
    assert failure(name, answering(status, content=content)).kind is kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "700"}, 700.0),
        ({"retry-after": "9", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "1e300"}, 86400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after(name, headers, seconds):
    assert failure(name, answering(503, {}, headers)).retry_after_seconds == seconds


def test_retry_after_as_a_date(name):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    seconds = failure(name, answering(503, {}, {"retry-after": when})).retry_after_seconds
    assert 80 < seconds <= 90


@pytest.mark.parametrize(("delay", "seconds"), [("34.5s", 34.5), ("soon", None), (7, None)])
def test_retry_info(delay, seconds):
    document = google("q", {"@type": "RetryInfo", "retryDelay": delay})
    assert failure("gemini", answering(429, document)).retry_after_seconds == seconds


def test_findings(name):
    text = json.dumps({"findings": [FINDING]})
    answer = review(name, success(name, text))
    assert answer.findings == [FINDING]
    assert "424242" not in str(answer.findings)


BROKEN = [
    "",
    "not json",
    "[]",
    "null",
    "[" * 100_000,
    '{"findings": {}}',
    '{"findings": [], "more": 1}',
    '{"findings": [7]}',
    *(
        json.dumps({"findings": [FINDING, {**FINDING, **change}]})
        for change in (
            {"start_line": "3"},
            {"start_line": True},
            {"start_line": 3.0},
            {"end_line": float("nan")},
            {"severity": "fatal"},
            {"category": None},
            {"path": None},
            {"more": 1},
        )
    ),
    json.dumps({"findings": [{k: v for k, v in FINDING.items() if k != "title"}]}),
]


@pytest.mark.parametrize("text", BROKEN)
def test_answers_off_the_schema(name, text):
    error = failure(name, success(name, text))
    assert error.kind is K.BAD_RESPONSE


@pytest.mark.parametrize(
    "answer",
    [
        answering(200, content=b""),
        answering(200, content=b"{"),
        answering(200, {"choices": [{"message": {"content": "{}"}}]}),
        answering(200, [{"candidates": []}]),
        streaming(b"data: {\n\n"),
        streaming([]),
        streaming(7),
        streaming(b"data: " + b"[" * 100_000 + b"\n\n"),
    ],
)
def test_what_is_no_stream_of_objects(name, answer):
    assert failure(name, answer).kind is K.BAD_RESPONSE


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"[" * 100_000])
def test_model_lists_off_the_format(name, content):
    assert failure(name, answering(200, content=content), models).kind is K.BAD_RESPONSE


@pytest.mark.parametrize("odd", [1, "x", [1], {"a": 1}, None, True])
def test_events_of_odd_types_say_nothing(name, odd):
    """Whatever stands where an object or a text should be, the rest of the stream counts."""
    said = {
        "openai": [{"choices": odd}, {"choices": [odd]}, {"choices": [{"delta": odd}]}],
        "anthropic": [
            {"type": odd},
            {"type": "content_block_delta", "delta": odd},
            {"type": "content_block_start", "content_block": odd},
            {"type": "message_delta", "delta": odd},
        ],
        "gemini": [
            {"candidates": odd},
            {"candidates": [odd]},
            {"candidates": [{"content": odd}]},
            {"candidates": [{"content": {"parts": [odd]}}]},
            {"promptFeedback": odd},
        ],
    }[name]
    text = text_event(name, '{"findings": []}')
    assert review(name, streaming(*said, text, end_event(name))).findings == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openai", {"choices": [{"delta": {"refusal": "I'm sorry"}}]}),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}),
        ("gemini", {"promptFeedback": {"blockReason": ["of next year"]}}),
    ],
)
def test_refusals(name, said):
    assert failure(name, streaming(said)).kind is K.REFUSED


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("name", "error", "kind"),
    [
        ("openai", openai("x", "server_is_overloaded"), K.PROVIDER_UNAVAILABLE),
        ("openai", openai("x", None, "server_error"), K.PROVIDER_UNAVAILABLE),
        ("openai", openai("x", "rate_limit_exceeded"), K.RATE_LIMITED),
        ("openai", openai("x", "insufficient_quota"), K.QUOTA_EXHAUSTED),
        ("openai", openai("x", "context_length_exceeded"), K.CONTEXT_TOO_LONG),
        ("openai", {"error": "?"}, K.BAD_RESPONSE),
        ("anthropic", anthropic("overloaded_error"), K.PROVIDER_UNAVAILABLE),
        ("anthropic", anthropic("api_error"), K.PROVIDER_UNAVAILABLE),
        ("anthropic", anthropic("rate_limit_error"), K.RATE_LIMITED),
        ("anthropic", anthropic("of_next_year"), K.BAD_RESPONSE),
        ("gemini", {"error": {"code": 503, "message": "m", "status": "U"}}, K.PROVIDER_UNAVAILABLE),
        ("gemini", {"error": {"code": 429, "message": "m", "status": "R"}}, K.RATE_LIMITED),
        ("gemini", {"error": {"code": 401, "message": "m", "status": "U"}}, K.KEY_REJECTED),
        ("gemini", {"error": {"code": "?"}}, K.BAD_RESPONSE),
    ],
)
def test_an_error_in_mid_stream_is_read_by_the_table(name, error, kind, first):
    """Fails where an event with `error` is taken for one without text."""
    before = [] if first else [text_event(name, '{"findings": [')]
    assert failure(name, streaming(*before, error)).kind is kind


def test_a_bare_document_after_the_events_is_the_streams_error():
    """Gemini: https://github.com/theopenco/llmgateway/pull/3616"""
    error = {"error": {"code": 503, "message": "high demand", "status": "UNAVAILABLE"}}
    said = json.dumps(error, indent=2).encode()
    stream = streaming(text_event("gemini", "{"), said[:20], said[20:])
    assert failure("gemini", stream).kind is K.PROVIDER_UNAVAILABLE


@pytest.mark.parametrize(
    "after", [b"", b"data: [DONE]\n\n", b": nothing\n\n", b'{"error"', b"data: {"]
)
def test_a_stream_without_an_end_was_cut(name, after):
    """What came may have been billed, even where all of it came. Fails with the findings taken."""
    stream = streaming(text_event(name, '{"findings": []}'), after)
    assert failure(name, stream).kind is K.AMBIGUOUS


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, K.RATE_LIMITED),
        (503, K.PROVIDER_UNAVAILABLE),
        (401, K.PROVIDER_UNAVAILABLE),  # no documented body, no judgement of the key
    ],
)
def test_an_error_whose_body_is_cut_is_still_one(name, status, kind, late):
    """A load balancer that closes at once. Shown to fail (AMBIGUOUS, which ends the review) with
    the cut raised."""

    def cut(_request):
        head, *_ = http(status, [], {"retry-after": "7"}, chunked=True)
        yield from (head, b'5\r\n{"err\r\n', LostError(late=late))

    for ask in (review, models):
        error = failure(name, cut, ask)
        assert (error.kind, error.retry_after_seconds) == (kind, 7)


def test_what_comes_after_the_end_is_not_waited_for(name):
    def answer(request):
        yield from list(success(name, '{"findings": []}')(request))[:-1]
        raise AssertionError("read past the end")

    assert review(name, answer).findings == []


def test_a_stream_may_come_in_any_pieces(name):
    stream = b"".join(success(name, json.dumps({"findings": [FINDING]}))(b""))
    answer = review(name, lambda _: (stream[i : i + 1] for i in range(len(stream))))
    assert answer.findings == [FINDING]


def test_lines_comments_and_fields_of_a_stream(name):
    """WHATWG HTML, 9.2.6: CRLF, comments, data in several lines, other fields."""
    document = json.dumps(text_event(name, '{"findings": []}'), indent=1).encode()
    lines = b"".join(b"data:%s\r\n" % line for line in document.split(b"\n"))
    stream = streaming(
        b": comment\r\n\r\n", b"event: x\r\nid: 7\r\nretry: 1\r\n", lines, b"\r\n", end_event(name)
    )
    assert review(name, stream).findings == []


PUBLISHED = [
    *[("openai", one, K.BAD_RESPONSE) for one in ("tool_calls", "function_call")],
    ("openai", "length", K.TRUNCATED),
    ("openai", "content_filter", K.REFUSED),
    *[("anthropic", one, K.BAD_RESPONSE) for one in ("tool_use", "pause_turn", "stop_sequence")],
    ("anthropic", "max_tokens", K.TRUNCATED),
    ("anthropic", "refusal", K.REFUSED),
    ("anthropic", "model_context_window_exceeded", K.CONTEXT_TOO_LONG),
    ("gemini", "MAX_TOKENS", K.TRUNCATED),
    ("gemini", "CONTINUATION", K.TRUNCATED),
    *[
        ("gemini", one, K.REFUSED)
        for one in (
            *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"),
            *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
            *("ESCALATION", "MODEL_ARMOR", "PUP_LIMITED_DISABLED"),
        )
    ],
    *[
        ("gemini", one, K.BAD_RESPONSE)
        for one in (
            *("FINISH_REASON_UNSPECIFIED", "OTHER", "MALFORMED_FUNCTION_CALL", "NO_IMAGE"),
            *("UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "IMAGE_OTHER"),
            *("MISSING_THOUGHT_SIGNATURE", "MALFORMED_RESPONSE"),
        )
    ],
]


@pytest.mark.parametrize(("name", "reason", "kind"), PUBLISHED)
def test_an_answer_that_did_not_end_by_itself_is_none(name, reason, kind):
    """Whole or not: what was found in half of an answer is not what a review found."""
    text = json.dumps({"findings": [FINDING]})
    assert failure(name, success(name, text, reason)).kind is kind


@pytest.mark.parametrize("reason", ["a_value_of_next_year", 7, 1.5, True, {"a": 1}, ["STOP"]])
def test_a_reason_of_any_type_that_nobody_published_is_a_bad_response(name, reason):
    """Shown to fail with `reason in` a set: a list raises TypeError there."""
    text = json.dumps({"findings": [FINDING]})
    assert failure(name, success(name, text, reason)).kind is K.BAD_RESPONSE


@pytest.mark.parametrize(("status", "kind"), [(200, K.BAD_RESPONSE), (400, K.BAD_REQUEST)])
def test_a_body_is_bounded(name, status, kind):
    """Shown to fail with the bound removed: the padded list is then accepted."""
    document = json.dumps({"data": [{"id": "x"}], "models": [{"name": "models/x"}]}).encode()
    body = [document, *[b" " * 1024 * 1024] * (MAX_BODY_BYTES // 1024 // 1024)]
    answer = lambda _: http(status, body)  # noqa: E731
    assert failure(name, answer, models).kind is kind


def chunks(pieces):
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "status line": lambda: repeat(b"HTTP/1.1 200 OK" * 100),
    "head": lambda: chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"x: y\r\n" * 1000)),
    "1xx": lambda: repeat(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"),
    "chunk extension": lambda: chain([HEAD + b"10;"], repeat(b"x" * 1000)),
    "event": lambda: chain([HEAD], chunks(repeat(b"data: " + b"x" * 100_000))),
    "comments": lambda: chain([HEAD], chunks(repeat((b": " + b"x" * 5_000 + b"\n\n") * 20))),
}


@pytest.mark.parametrize("what", list(ENDLESS))
def test_what_never_ends_has_a_bound(name, what):
    """Of size: no time passes here. Each fails (by the test's timeout) without its bound."""
    assert failure(name, lambda _: ENDLESS[what]()).kind in (K.AMBIGUOUS, K.BAD_RESPONSE)


def test_an_endless_answer_has_a_bound(name):
    """Fails without MAX_ANSWER_BYTES."""
    said = chunks(repeat(event(text_event(name, "x" * 100_000))))
    assert failure(name, lambda _: chain([HEAD], said)).kind is K.BAD_RESPONSE


def test_answers_1xx_before_the_final_one_are_passed_over(name):
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 3
    said = success(name, '{"findings": []}')
    assert review(name, lambda request: (interim, *said(request))).findings == []


def test_compressed_body_is_not_unpacked(name):
    """Shown to fail with the look at content-encoding removed."""
    packed = gzip.compress(json.dumps({"data": [], "models": []}).encode())
    answer = answering(200, content=packed, headers={"content-encoding": "gzip"})
    assert failure(name, answer, models).kind is K.BAD_RESPONSE


@pytest.mark.parametrize("call", [review, models])
@pytest.mark.parametrize("late", [False, True])
def test_network_failures_leave_nothing_behind(name, late, call):
    """Shown to fail with the raise inside an except block (context set)."""
    cause = key_pb2.UNREACHABLE_CAUSE_TIMEOUT if late else key_pb2.UNREACHABLE_CAUSE_UNSPECIFIED
    for said in ([], [HEAD[:20]], [HEAD], [HEAD, b"1f\r\ndata"]):
        error = failure(name, lambda _, said=said: [*said, LostError(late=late)], call)
        assert (error.kind, error.cause) == (K.AMBIGUOUS, cause)
        assert error.__context__ is None
        assert error.__cause__ is None
        assert KEY not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("cause", key_pb2.UnreachableCause.values())
def test_what_was_unreachable_is_said_and_nothing_was_sent(name, cause):
    def connect(host):
        raise UnreachableError(cause)

    client = ADAPTERS[name].client(KEY, connect, REVIEW)
    with pytest.raises(ProviderError) as caught:
        ADAPTERS[name].review(client, PROMPT)
    assert (caught.value.kind, caught.value.cause) == (K.NETWORK_BEFORE_SEND, cause)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.7\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: x\r\n\r\n",
        HEAD + b"none\r\n",
        b"",
    ],
)
def test_what_is_not_http_is_ambiguous(name, said):
    assert failure(name, lambda _: [said]).kind is K.AMBIGUOUS


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([HEAD[:9], LostError(late=True)], [300, 15]),
        ([b"HTTP/1.1 103 x\r\n\r\n", LostError(late=True)], [300, 15]),
        ([HEAD, LostError(late=True)], [300, 300]),
        ([HEAD, b"5\r\n: x\n\n\r\n", LostError(late=True)], [300, 300, 300]),
        ([HEAD, b"10;", b"x", LostError(late=True)], [300, 300, 300, 300]),
    ],
)
def test_every_step_has_its_deadline(name, steps, expected, monkeypatch):
    """A second passes with every read; what drips renews no deadline."""
    now = [1000.0]
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now[0])
    deadlines = []

    class Clock(Line):
        def read(self, until):
            deadlines.append(until - started[-1])
            now[0] += 1
            return super().read(until)

    started = [1000.0]
    line = Clock(lambda _: iter(steps))
    client = ADAPTERS[name].client(KEY, lambda _: line, REVIEW)
    with pytest.raises(ProviderError) as caught:
        ADAPTERS[name].review(client, PROMPT)
    assert caught.value.kind is K.AMBIGUOUS
    # Seconds from the start; a deadline that begins with the first byte begins a second later.
    offsets = [0, *[1] * (len(expected) - 1)]
    assert deadlines == [limit + off for limit, off in zip(expected, offsets, strict=True)]
    assert line.closed


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 429, 500])
def test_error_text_is_ours(name, status):
    """Shown to fail with the provider's message put into the sentence."""
    document = {"error": {"message": f"key {KEY}", "code": KEY, "details": [{"reason": KEY}]}}
    for headers in ({}, STREAM):
        more = {"location": f"https://x/{KEY}", **headers}
        error = failure(name, answering(status, document, more))
        assert KEY not in repr(error) + str(error.args) + str(vars(error))
        assert str(error) == str(ProviderError(error.kind))


@pytest.mark.parametrize("status", [200, 301, 307, 308])
@pytest.mark.parametrize("call", [review, models])
def test_provider_host(name, status, call):
    """One fixed host, no redirect followed, the key in one header and nowhere else.

    Shown to fail with the key as a query parameter.
    """
    seen = []

    def answer(request):
        seen.append(request)
        headers = {"location": "https://elsewhere.example/v1/models"}
        return http(status, json.dumps({"data": [], "models": []}).encode(), headers)

    if call is models and status == 200:
        assert call(name, answer) == ()
    else:
        kind = K.BAD_RESPONSE if status == 200 else K.REDIRECTED
        assert failure(name, answer, call).kind is kind
    (request,) = seen
    adapter = ADAPTERS[name]
    line, _, rest = request.partition(b"\r\n")
    head, _, body = rest.partition(b"\r\n\r\n")
    pairs = (header.split(b": ", 1) for header in head.split(b"\r\n"))
    headers = {name.lower(): value for name, value in pairs}
    assert line.split(b" ")[1].startswith(b"/v1")
    assert KEY.encode() not in line + body
    assert headers[b"host"] == adapter.host.encode()
    assert [name for name, value in headers.items() if KEY.encode() in value] == [
        {"openai": b"authorization", "anthropic": b"x-api-key", "gemini": b"x-goog-api-key"}[name]
    ]


def test_nothing_is_kept_from_one_request_to_the_next(name):
    """No cookie, no connection. Shown to fail with httpx's own jar, which sends it back."""
    seen = []

    def answer(request):
        seen.append(request)
        return http(200, b'{"data": [], "models": []}', {"set-cookie": "track=me; path=/"})

    client = dial(name, answer)
    for _ in range(2):
        ADAPTERS[name].list_models(client)
    first, second = seen
    assert first == second
    assert b"cookie" not in second.lower()


@pytest.mark.parametrize("model", ["../../x", "a/b?key=1", "a#b", "//elsewhere/", "x:y", "\r\nx"])
def test_model_name_chooses_no_path(model):
    seen = []

    def answer(request):
        seen.append(request.partition(b"\r\n")[0])
        return http(500)

    client = dial("gemini", answer)
    with pytest.raises(ProviderError):
        ADAPTERS["gemini"].review(client, ReviewPrompt(model, "", "", FINDINGS_SCHEMA, 1))
    (line,) = seen
    method, target, version = line.split(b" ")
    assert (method, version) == (b"POST", b"HTTP/1.1")
    path, _, query = target.partition(b"?")
    assert path.count(b"/") == 3
    assert query == b"alt=sse"


@pytest.mark.parametrize(
    "key", ["short", "with newline\nin-the-middle", "naïve-key-0123456789", "x" * 513]
)
def test_key_that_no_header_holds(name, key):
    with pytest.raises(ValueError, match="no key has") as caught:
        dial(name, answering(), key)
    assert key not in "".join(traceback.format_exception_only(caught.value))


def test_client_shows_nothing(name):
    client = dial(name, answering())
    assert KEY not in repr(client) + str(client)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(client)


def test_prompt_and_answer_show_nothing(name):
    answer = review(name, success(name, json.dumps({"findings": [FINDING]})))
    assert "a.py" not in repr(answer)
    assert "text" not in repr(PROMPT)


def test_nothing_is_logged(name, caplog):
    caplog.set_level(logging.DEBUG)
    review(name, success(name, '{"findings": []}'))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "document", "expected"),
    [
        (
            "openai",
            {"data": [{"id": i} for i in (
                "gpt-5.6-terra", "o3", "ft:gpt-4.1:acme", "chatgpt-4o-latest", "gpt-5.4-mini",
                "gpt-5.4-pro", "gpt-5.3-codex", "gpt-4o-audio-preview", "gpt-image-1", "whisper-1",
                "text-embedding-3-small", "gpt-4o-mini-tts", "gpt-3.5-turbo-instruct", 7, "o3",
            )]},
            ("gpt-5.6-terra", "o3", "ft:gpt-4.1:acme", "chatgpt-4o-latest", "gpt-5.4-mini"),
        ),
        ("anthropic", {"data": [{"id": "claude-x"}, {"id": "a b"}, {}, 7]}, ("claude-x",)),
        (
            "gemini",
            {"models": [
                {"name": "models/g-1", "supportedGenerationMethods": ["generateContent"]},
                {"name": "models/g-1-tts", "supportedGenerationMethods": ["generateContent"]},
                {"name": "models/e-1", "supportedGenerationMethods": ["embedContent"]},
                {"name": "models/none"},
            ]},
            ("g-1",),
        ),
    ],
)  # fmt: skip
def test_models_that_can_review(name, document, expected):
    assert models(name, answering(200, document)) == expected


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
def test_endless_pages_end(name):
    """Shown to fail (by the timeout) with the bound removed."""
    pages = []

    def answer(request):
        pages.append(request.partition(b"\r\n")[0])
        document = {
            "data": [{"id": f"m{len(pages)}"}],
            "has_more": True,
            "last_id": f"{len(pages)}",
        }
        return http(200, json.dumps({**document, "nextPageToken": f"{len(pages)}"}).encode())

    models(name, answer)
    assert len(pages) == len(set(pages)) == MAX_MODEL_PAGES


def test_all_pages_share_one_deadline(name, monkeypatch):
    """A validation's is short, however many pages a provider has."""
    now = [0.0]
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now[0])
    deadlines = []

    class Clock(Line):
        def read(self, until):
            deadlines.append(until)
            now[0] += 4
            return super().read(until)

    def answer(request):
        document = {"data": [{"id": "x"}], "has_more": True, "last_id": f"{now[0]}"}
        return http(200, json.dumps({**document, "nextPageToken": f"{now[0]}"}).encode())

    client = ADAPTERS[name].client(KEY, lambda _: Clock(answer), VALIDATION)
    ADAPTERS[name].list_models(client)
    assert max(deadlines) <= VALIDATION.total <= 30
    assert name == "openai" or max(deadlines) == VALIDATION.total


def test_one_call_is_one_request(name):
    seen = []

    def answer(request):
        seen.append(request)
        return http(503, headers={"retry-after": "0"})

    failure(name, answer)
    assert len(seen) == 1


def test_prompt_with_a_lone_surrogate_is_sent(name):
    prompt = ReviewPrompt("m", "s", "bad \ud800 text", FINDINGS_SCHEMA, 1)
    client = dial(name, success(name, '{"findings": []}'))
    assert ADAPTERS[name].review(client, prompt).findings == []


def test_progress_counts_the_bytes_of_the_answer(name):
    told = []
    client = dial(name, success(name, '{"findings": [ ]}'))
    ADAPTERS[name].review(client, PROMPT, told.append)
    assert told == [0, 5, 10, 17, 17]


def test_every_row_of_the_table_names_its_source():
    for rows in table._ROWS.values():
        assert all(row.source.startswith("https://") for row, _ in rows)
