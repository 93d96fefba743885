"""Google Gemini: model list and generateContent.

https://ai.google.dev/api/generate-content and google.rpc's error details (AIP-193)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final
from urllib.parse import quote

import httpx

from services.llm_runner.providers.base import (
    MAX_MODEL_PAGES,
    Adapter,
    FailureKind,
    ProviderError,
    ReviewAnswer,
    ReviewPrompt,
    mapping,
    model_ids,
    objects,
    parse_findings,
    text,
)
from services.llm_runner.providers.exchange import Answer, bounded_wait, retry_after

_PAGE_SIZE: Final = 1000
_BLOCKED: Final = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"})
# These generate content, but speech or pictures.
_NOT_TEXT: Final = re.compile(r"-(tts|image|live|audio)\b")
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")


class Gemini(Adapter):
    """The Gemini API with an API key."""

    name: ClassVar[str] = "gemini"
    host: ClassVar[str] = "generativelanguage.googleapis.com"

    def auth_headers(self, key: str) -> dict[str, str]:
        """See Adapter; the key never goes into the ``key`` query parameter."""
        return {"x-goog-api-key": key}

    def list_models(self, client: httpx.Client) -> tuple[str, ...]:
        """See Adapter."""
        models: list[str] = []
        page: dict[str, str] = {}
        for _ in range(MAX_MODEL_PAGES):
            document = self._call(
                client, "GET", "/v1beta/models", params={"pageSize": _PAGE_SIZE, **page}
            )
            models += model_ids(map(_text_model, objects(document.get("models"))))
            token = text(document.get("nextPageToken"))
            if not token:
                break
            page = {"pageToken": token}
        return tuple(dict.fromkeys(models))

    def review(self, client: httpx.Client, prompt: ReviewPrompt) -> ReviewAnswer:
        """See Adapter."""
        # Quoted whole, so that a model's name can't choose another path.
        path = f"/v1beta/models/{quote(prompt.model, safe='')}:generateContent"
        document = self._call(client, "POST", path, body=_request(prompt))
        candidate = next(iter(objects(document.get("candidates"))), {})
        finish = candidate.get("finishReason")
        if finish in _BLOCKED or mapping(document.get("promptFeedback")).get("blockReason"):
            raise ProviderError(FailureKind.REFUSED, http_status=200)
        if finish == "MAX_TOKENS":
            raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200, detail="truncated")
        parts = objects(mapping(candidate.get("content")).get("parts"))
        answer = "".join(text(p.get("text")) for p in parts if p.get("thought") is not True)
        return ReviewAnswer(parse_findings(answer))

    def _classify(self, answer: Answer, error: Mapping[str, Any]) -> FailureKind | None:
        reasons = {text(detail.get("reason")) for detail in _details(error, "ErrorInfo")}
        message = text(error.get("message")).lower()
        if "API_KEY_INVALID" in reasons or "api key not valid" in message:
            return FailureKind.KEY_REJECTED
        if answer.status == 403 and (
            "reported as leaked" in message
            or "has been suspended" in message
            or "CONSUMER_SUSPENDED" in reasons
        ):
            return FailureKind.KEY_REJECTED
        if answer.status == 429 and ("credits are depleted" in message or _daily_quota(error)):
            return FailureKind.QUOTA_EXHAUSTED
        return None

    def _retry_after(self, answer: Answer, error: Mapping[str, Any]) -> float | None:
        for detail in _details(error, "RetryInfo"):
            if match := _DURATION.fullmatch(text(detail.get("retryDelay"))):
                return bounded_wait(float(match[1]))
        return retry_after(answer.headers)


def _text_model(model: Mapping[str, Any]) -> str | None:
    name = text(model.get("name")).removeprefix("models/")
    methods = model.get("supportedGenerationMethods")
    generates = isinstance(methods, list) and "generateContent" in methods
    return name if generates and not _NOT_TEXT.search(name) else None


def _details(error: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    for detail in objects(error.get("details")):
        if text(detail.get("@type")).endswith(f"google.rpc.{kind}"):
            yield detail


def _daily_quota(error: Mapping[str, Any]) -> bool:
    return any(
        "PerDay" in text(violation.get("quotaId"))
        for failure in _details(error, "QuotaFailure")
        for violation in objects(failure.get("violations"))
    )


def _request(prompt: ReviewPrompt) -> dict[str, Any]:
    return {
        "systemInstruction": {"parts": [{"text": prompt.system}]},
        "contents": [{"role": "user", "parts": [{"text": prompt.user}]}],
        "generationConfig": {
            "maxOutputTokens": prompt.max_output_tokens,
            "responseMimeType": "application/json",
            "responseJsonSchema": prompt.schema,
        },
    }
