"""Provider adapters against scripted answers: failures, parsing, and what never leaks."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from services.llm_runner.providers import (
    ADAPTERS,
    FINDINGS_SCHEMA,
    FailureKind,
    ProviderError,
    ReviewPrompt,
    client,
)
from services.llm_runner.providers.base import MAX_MODEL_PAGES
from services.llm_runner.providers.exchange import MAX_BODY_BYTES

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


def dial(name, handler, key=KEY):
    return client(ADAPTERS[name], key, httpx.MockTransport(handler), 5.0)


def answering(status=200, document=None, headers=None, content=None):
    content = json.dumps(document).encode() if content is None else content
    return lambda _request: httpx.Response(status, headers=headers, content=content)


def review(name, handler):
    with dial(name, handler) as http:
        return ADAPTERS[name].review(http, PROMPT)


def models(name, handler):
    with dial(name, handler) as http:
        return ADAPTERS[name].list_models(http)


def failure(name, handler, call=review):
    with pytest.raises(ProviderError) as caught:
        call(name, handler)
    return caught.value


def success(name, text, finish=None):
    """The provider's answer around a model's text."""
    if name == "openai":
        choice = {"message": {"content": text, "refusal": None}, "finish_reason": finish or "stop"}
        return {"choices": [choice], "usage": {"total_tokens": 424242}}
    if name == "anthropic":
        content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
        return {"content": content, "stop_reason": finish or "end_turn", "usage": {"x": 424242}}
    parts = [{"text": "hm", "thought": True}, {"text": text}]
    candidate = {"content": {"parts": parts}, "finishReason": finish or "STOP"}
    return {"candidates": [candidate], "usageMetadata": {"totalTokenCount": 424242}}


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
    answer = review(name, answering(200, success(name, text)))
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
    error = failure(name, answering(200, success(name, text)))
    assert error.kind is K.BAD_RESPONSE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"choices": 1, "content": 1, "candidates": 1}',
        b'{"choices": [{}], "content": [{}], "candidates": [{"content": {"parts": [{}]}}]}',
    ],
)
def test_envelopes_off_the_format(name, content):
    assert failure(name, answering(200, content=content)).kind is K.BAD_RESPONSE


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("openai", {"choices": [{"message": {"refusal": "no"}, "finish_reason": "stop"}]}),
        ("openai", success("openai", "", "content_filter")),
        ("anthropic", {"content": [], "stop_reason": "refusal"}),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}),
        ("gemini", {"candidates": [{"finishReason": "RECITATION"}]}),
    ],
)
def test_refusals(name, document):
    assert failure(name, answering(200, document)).kind is K.REFUSED


PUBLISHED = [
    *[("openai", one, K.BAD_RESPONSE) for one in ("tool_calls", "function_call")],
    ("openai", "length", K.TRUNCATED),
    ("openai", "content_filter", K.REFUSED),
    *[("anthropic", one, K.BAD_RESPONSE) for one in ("tool_use", "pause_turn", "stop_sequence")],
    ("anthropic", "max_tokens", K.TRUNCATED),
    ("anthropic", "refusal", K.REFUSED),
    ("anthropic", "model_context_window_exceeded", K.CONTEXT_TOO_LONG),
    ("gemini", "MAX_TOKENS", K.TRUNCATED),
    *[
        ("gemini", one, K.REFUSED)
        for one in (
            *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"),
            *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
        )
    ],
    *[
        ("gemini", one, K.BAD_RESPONSE)
        for one in (
            *("FINISH_REASON_UNSPECIFIED", "OTHER", "MALFORMED_FUNCTION_CALL", "NO_IMAGE"),
            *("UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "IMAGE_OTHER"),
        )
    ],
]


@pytest.mark.parametrize(("name", "reason", "kind"), PUBLISHED)
def test_an_answer_that_did_not_end_by_itself_is_none(name, reason, kind):
    """Whole or not: what was found in half of an answer is not what a review found."""
    text = json.dumps({"findings": [FINDING]})
    assert failure(name, answering(200, success(name, text, reason))).kind is kind


@pytest.mark.parametrize("reason", ["a_value_of_next_year", 7, 1.5, True, {"a": 1}, ["STOP"]])
def test_a_reason_of_any_type_that_nobody_published_is_a_bad_response(name, reason):
    """Shown to fail with `reason in` a set: a list raises TypeError there."""
    text = json.dumps({"findings": [FINDING]})
    assert failure(name, answering(200, success(name, text, reason))).kind is K.BAD_RESPONSE


@pytest.mark.parametrize("status", [200, 400])
def test_body_is_bounded(name, status):
    """Shown to fail with the bound removed: the padded answer is then accepted."""
    text = json.dumps({"findings": []}) + " " * MAX_BODY_BYTES
    error = failure(name, answering(status, success(name, text)))
    assert error.kind is (K.BAD_RESPONSE if status == 200 else K.BAD_REQUEST)


def test_compressed_body_is_not_unpacked(name):
    """Shown to fail with the look at content-encoding removed."""
    packed = gzip.compress(json.dumps(success(name, '{"findings": []}')).encode())
    headers = {"content-encoding": "gzip"}
    stream = httpx.ByteStream(packed)
    error = failure(name, lambda _: httpx.Response(200, headers=headers, stream=stream))
    assert error.kind is K.BAD_RESPONSE


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (httpx.ConnectError, K.NETWORK_BEFORE_SEND),
        (httpx.ConnectTimeout, K.NETWORK_BEFORE_SEND),
        (httpx.PoolTimeout, K.NETWORK_BEFORE_SEND),
        (httpx.LocalProtocolError, K.BAD_REQUEST),
        (httpx.WriteError, K.AMBIGUOUS),
        (httpx.WriteTimeout, K.AMBIGUOUS),
        (httpx.ReadError, K.AMBIGUOUS),
        (httpx.ReadTimeout, K.AMBIGUOUS),
        (httpx.RemoteProtocolError, K.AMBIGUOUS),
        (ConnectionResetError, K.AMBIGUOUS),
    ],
)
def test_network_failures_leave_nothing_behind(name, raised, kind):
    """Shown to fail with the raise inside exchange's except block (context set)."""

    def handler(request):
        raise raised(f"{request.url} {KEY}")

    error = failure(name, handler)
    assert (error.kind, error.http_status) == (kind, None)
    assert error.__context__ is None
    assert error.__cause__ is None
    assert KEY not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 429, 500])
def test_error_text_is_ours(name, status):
    """Shown to fail with the provider's message put into the sentence."""
    document = {"error": {"message": f"key {KEY}", "code": KEY, "details": [{"reason": KEY}]}}
    error = failure(name, answering(status, document, {"location": f"https://x/{KEY}"}))
    assert KEY not in repr(error) + str(error.args) + str(vars(error))
    assert str(error) == str(ProviderError(error.kind))


@pytest.mark.parametrize("status", [200, 301, 307, 308])
@pytest.mark.parametrize("call", [review, models])
def test_provider_host(name, status, call):
    """One fixed origin, no redirect followed, the key in one header and nowhere else.

    Shown to fail with follow_redirects on, and with the key as a query parameter.
    """
    seen = []

    def handler(request):
        seen.append(request)
        headers = {"location": "https://elsewhere.example/v1/models"}
        return httpx.Response(status, headers=headers, json={"data": [], "models": []})

    if call is models and status == 200:
        assert call(name, handler) == ()
    else:
        kind = K.BAD_RESPONSE if status == 200 else K.REDIRECTED
        assert failure(name, handler, call).kind is kind
    (request,) = seen
    adapter = ADAPTERS[name]
    assert adapter.base_url == f"https://{adapter.host}"
    assert str(request.url).startswith(f"{adapter.base_url}/v1")
    assert KEY not in str(request.url)
    assert KEY.encode() not in request.read()
    assert [h for h, v in request.headers.items() if KEY in v] == [
        {"openai": "authorization", "anthropic": "x-api-key", "gemini": "x-goog-api-key"}[name]
    ]


@pytest.mark.parametrize(
    "url",
    ["https://elsewhere.example/", "http://{host}/", "https://{host}:444/", "https://a@{host}.x/"],
)
def test_key_stays_with_its_provider(name, url):
    """Shown to fail with the check in _KeyAuth removed."""
    with dial(name, answering(200, {})) as http, pytest.raises(ValueError, match="own provider"):
        http.get(url.format(host=ADAPTERS[name].host))


@pytest.mark.parametrize("model", ["../../x", "a/b?key=1", "a#b", "//elsewhere/", "x:y", "\r\nx"])
def test_model_name_chooses_no_path(model):
    seen = []

    def handler(request):
        seen.append(request.url)
        return httpx.Response(500)

    with dial("gemini", handler) as http, pytest.raises(ProviderError):
        ADAPTERS["gemini"].review(http, ReviewPrompt(model, "", "", FINDINGS_SCHEMA, 1))
    (url,) = seen
    assert url.host == ADAPTERS["gemini"].host
    assert url.raw_path.count(b"/") == 3
    assert url.query == b""


@pytest.mark.parametrize(
    "key", ["short", "with newline\nin-the-middle", "naïve-key-0123456789", "x" * 513]
)
def test_key_that_no_header_holds(name, key):
    with pytest.raises(ValueError, match="no key has") as caught:
        dial(name, answering(), key)
    assert key not in "".join(traceback.format_exception_only(caught.value))


def test_client_shows_nothing(name):
    with dial(name, answering()) as http:
        assert KEY not in repr(http) + repr(http.auth) + str(http.headers) + repr(vars(http))
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(http.auth)


def test_prompt_and_answer_show_nothing(name):
    answer = review(name, answering(200, success(name, json.dumps({"findings": [FINDING]}))))
    assert "a.py" not in repr(answer)
    assert "text" not in repr(PROMPT)


def test_nothing_is_logged(name, caplog):
    """Shown to fail with the loggers left alone: httpx then logs each URL."""
    for logger in ("", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger)
    review(name, answering(200, success(name, '{"findings": []}')))
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

    def handler(request):
        pages.append(request.url.query)
        document = {
            "data": [{"id": f"m{len(pages)}"}],
            "has_more": True,
            "last_id": f"{len(pages)}",
        }
        return httpx.Response(200, json={**document, "nextPageToken": f"{len(pages)}"})

    models(name, handler)
    assert len(pages) == len(set(pages)) == MAX_MODEL_PAGES


def test_one_call_is_one_request(name):
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(503, headers={"retry-after": "0"})

    failure(name, handler)
    assert len(seen) == 1


def test_prompt_with_a_lone_surrogate_is_sent(name):
    prompt = ReviewPrompt("m", "s", "bad \ud800 text", FINDINGS_SCHEMA, 1)
    text = success(name, '{"findings": []}')
    with dial(name, answering(200, text)) as http:
        assert ADAPTERS[name].review(http, prompt).findings == []
