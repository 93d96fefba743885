"""What the emulator answers to requests that no adapter of ours would make."""

from __future__ import annotations

import copy
import socket
from typing import get_args

import httpx
import pytest
from byokeep.testing.emulator import EmulatorError
from byokeep.testing.faults import BEHAVIOURS, FAULTS, Behaviour, FaultKind, Provider

from deploy.local.emulator.models import CHAT_MODELS, PROVIDERS
from deploy.local.emulator.wire.base import USAGE_TOKENS
from services.llm_runner.providers import FINDINGS_SCHEMA
from tests.component.providers.harness import running_emulator

OPENAI, ANTHROPIC, GEMINI = (
    "https://api.openai.com",
    "https://api.anthropic.com",
    "https://generativelanguage.googleapis.com",
)
BEARER = {"authorization": "Bearer sk-proj-0123456789abcdef"}
X_API = {"x-api-key": "sk-ant-api03-0123456789abcdef", "anthropic-version": "2026-10-21"}
X_GOOG = {"x-goog-api-key": "AIzaSy0123456789abcdef"}
MESSAGES = [{"role": "user", "content": "hello"}]

OPENAI_BODY = {
    "model": CHAT_MODELS["openai"][0],
    "messages": MESSAGES,
    "stream": True,
    "max_completion_tokens": 100,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "review", "strict": True, "schema": FINDINGS_SCHEMA},
    },
}
ANTHROPIC_BODY = {
    "model": CHAT_MODELS["anthropic"][0],
    "messages": MESSAGES,
    "stream": True,
    "max_tokens": 100,
    "output_config": {"format": {"type": "json_schema", "schema": FINDINGS_SCHEMA}},
}
GEMINI_BODY = {
    "contents": [{"role": "user", "parts": [{"text": "hello"}]}],
    "generationConfig": {
        "maxOutputTokens": 100,
        "responseMimeType": "application/json",
        "responseJsonSchema": FINDINGS_SCHEMA,
    },
}
GEMINI_MODEL = f"/v1beta/models/{CHAT_MODELS['gemini'][0]}"
CHAT = {
    OPENAI: ("/v1/chat/completions", OPENAI_BODY, BEARER),
    ANTHROPIC: ("/v1/messages", ANTHROPIC_BODY, X_API),
    GEMINI: (f"{GEMINI_MODEL}:streamGenerateContent?alt=sse", GEMINI_BODY, X_GOOG),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    with running_emulator(tmp_path_factory.mktemp("wire"), "--accept-any") as running:
        yield running


@pytest.fixture(scope="module")
def http(emulator):
    with httpx.Client(transport=emulator.transport(), trust_env=False) as client:
        yield client


def without(body, *path):
    body = copy.deepcopy(body)
    place = body
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return body


@pytest.mark.parametrize("host", list(CHAT))
def test_right_request(http, host):
    path, body, headers = CHAT[host]
    answer = http.post(host + path, json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.count("data: ") > 1
    assert str(USAGE_TOKENS) in answer.text


def test_gemini_streams_events_if_asked_to(http):
    _, body, headers = CHAT[GEMINI]
    url = f"{GEMINI}{GEMINI_MODEL}:streamGenerateContent"
    assert http.post(url, json=body, headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        (OPENAI, {}, 401),
        (OPENAI, X_API, 401),
        (OPENAI, {"authorization": "Basic sk-proj-0123456789abcdef"}, 401),
        (OPENAI, {"authorization": "Bearer sk-admin-0123456789abcdef"}, 401),
        (ANTHROPIC, {"anthropic-version": "2026-10-21"}, 401),
        (ANTHROPIC, {"x-api-key": X_API["x-api-key"]}, 400),
        (ANTHROPIC, BEARER, 401),
        (GEMINI, {}, 403),
        (GEMINI, BEARER, 403),
        (GEMINI, {"x-goog-api-key": "sk-proj-0123456789abcdef"}, 400),
    ],
)
def test_wrong_credentials(http, host, headers, status):
    path, body, _ = CHAT[host]
    answer = http.post(host + path, json=body, headers=headers)
    assert answer.status_code == status
    assert "message" in answer.json()["error"]


def test_what_the_official_sdks_send(http):
    """anthropic 2.14: a bearer token; google-genai 3.6: v1. Both were run against the emulator."""
    path, body, headers = CHAT[ANTHROPIC]
    bearer = {
        "authorization": f"Bearer {headers['x-api-key']}",
        "anthropic-version": headers["anthropic-version"],
    }
    assert http.post(ANTHROPIC + path, json=body, headers=bearer).status_code == 200
    path, body, headers = CHAT[GEMINI]
    path = path.replace("/v1beta/", "/v1/")
    assert http.post(GEMINI + path, json=body, headers=headers).status_code == 200
    assert http.get(f"{GEMINI}/v1/models", headers=headers).status_code == 200


def test_key_in_the_url_counts_as_none(http):
    path, body, headers = CHAT[GEMINI]
    url = f"{GEMINI}{path}&key={headers['x-goog-api-key']}"
    assert http.post(url, json=body).status_code == 403


@pytest.mark.parametrize(
    ("host", "missing"),
    [
        (OPENAI, ("messages",)),
        (OPENAI, ("stream",)),
        (OPENAI, ("max_completion_tokens",)),
        (OPENAI, ("response_format",)),
        (OPENAI, ("response_format", "json_schema", "strict")),
        (OPENAI, ("response_format", "json_schema", "schema", "additionalProperties")),
        (ANTHROPIC, ("messages",)),
        (ANTHROPIC, ("stream",)),
        (ANTHROPIC, ("max_tokens",)),
        (ANTHROPIC, ("output_config",)),
        (ANTHROPIC, ("output_config", "format", "schema", "required")),
        (GEMINI, ("contents",)),
        (GEMINI, ("generationConfig", "responseMimeType")),
        (GEMINI, ("generationConfig", "responseJsonSchema")),
        (GEMINI, ("generationConfig", "maxOutputTokens")),
    ],
)
def test_missing_parts(http, host, missing):
    path, body, headers = CHAT[host]
    answer = http.post(host + path, json=without(body, *missing), headers=headers)
    assert answer.status_code == 400


@pytest.mark.parametrize("host", list(CHAT))
@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"{}", b"[" * 100_000, b"\xff"])
def test_bodies_that_are_no_request(http, host, content):
    path, _, headers = CHAT[host]
    assert http.post(host + path, content=content, headers=headers).status_code in (400, 404)


@pytest.mark.parametrize(
    "url",
    [
        f"{OPENAI}/v1/responses",
        f"{ANTHROPIC}/v1/complete",
        f"{GEMINI}/v1beta/models/gemini-3.5-flash:generateContent",
        f"{GEMINI}/v1beta/files",
    ],
)
def test_other_paths(http, url):
    assert http.post(url, headers={**BEARER, **X_API, **X_GOOG}).status_code == 404


@pytest.mark.parametrize("query", ["?after_id=nobody", "?pageToken=%21"])
def test_bad_cursors(http, query):
    host, path, headers = (
        (ANTHROPIC, "/v1/models", X_API) if "after" in query else (GEMINI, "/v1beta/models", X_GOOG)
    )
    assert http.get(host + path + query, headers=headers).status_code == 400


def test_a_host_that_is_no_provider(http):
    answer = http.get(f"{OPENAI}/v1/models", headers={"host": "example.com"})
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "request_head",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http(emulator, request_head):
    port = emulator.control._client.base_url.port
    with socket.create_connection(("127.0.0.1", port), 5) as line:
        line.sendall(request_head)
        line.shutdown(socket.SHUT_WR)
        assert line.recv(100).startswith(b"HTTP/1.1 400 ")
    assert emulator.control.calls(since=10**9) == []


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("no-such-fault", {}),
        ("slow", {"seconds": -1}),
        ("slow", {"seconds": "1"}),
        ("slow", {"seconds": True}),
        ("cut", {"after_bytes": "all"}),
        ("cut_stream", {"events": "all"}),
        ("cut", {"colour": "red"}),
        ("quota", {"provider": "nobody"}),
    ],
)
def test_faults_that_make_no_sense(emulator, kind, settings):
    with pytest.raises(EmulatorError):
        emulator.control.fault(kind, **settings)


def test_a_refusal_names_what_there_is(emulator):
    with pytest.raises(EmulatorError, match=", ".join(FAULTS)):
        emulator.control.fault("no-such-fault")
    with pytest.raises(EmulatorError, match="openai, anthropic, gemini"):
        emulator.control.fault("quota", provider="nobody")
    with pytest.raises(EmulatorError, match="valid, invalid, restricted, noquota"):
        emulator.control.add_key("openai", "x" * 20, "sleepy")


def test_the_typed_names_are_the_emulators_own():
    assert set(get_args(FaultKind)) == set(FAULTS)
    assert get_args(Behaviour) == BEHAVIOURS
    assert get_args(Provider) == PROVIDERS
