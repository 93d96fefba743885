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
    ReviewAnswer,
    ReviewPrompt,
    mapping,
    model_ids,
    objects,
    parse_findings,
    text,
)
from services.llm_runner.providers.exchange import Answer, bounded_wait, retry_after
from services.llm_runner.providers.table import Said

_PAGE_SIZE: Final = 1000
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
        blocked = mapping(document.get("promptFeedback")).get("blockReason")
        self._ended("PROMPT_BLOCKED" if blocked else text(candidate.get("finishReason")))
        parts = objects(mapping(candidate.get("content")).get("parts"))
        answer = "".join(text(p.get("text")) for p in parts if p.get("thought") is not True)
        return ReviewAnswer(parse_findings(answer))

    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        error = mapping(document.get("error"))
        code, message = error.get("code"), error.get("message")
        reasons = [text(detail.get("reason")) for detail in _details(error, "ErrorInfo")]
        return Said(
            status,
            type(code) is int and isinstance(message, str) and "status" in error,
            code=" ".join([*reasons, *_quotas(error)]),
            type=text(error.get("status")),
            message=text(message),
        )

    def _retry_after(self, answer: Answer) -> float | None:
        for detail in _details(mapping(answer.document().get("error")), "RetryInfo"):
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


def _quotas(error: Mapping[str, Any]) -> Iterator[str]:
    for failure in _details(error, "QuotaFailure"):
        for violation in objects(failure.get("violations")):
            yield text(violation.get("quotaId"))


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
