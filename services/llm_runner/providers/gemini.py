"""Google Gemini: model list and streamGenerateContent.

https://ai.google.dev/api/generate-content and google.rpc's error details (AIP-193)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final
from urllib.parse import quote

from services.llm_runner.providers.base import (
    MAX_MODEL_PAGES,
    Adapter,
    Answer,
    Piece,
    ReviewPrompt,
    mapping,
    model_ids,
    objects,
    text,
)
from services.llm_runner.providers.exchange import Client
from services.llm_runner.providers.table import Said
from services.llm_runner.providers.waits import bounded

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

    def list_models(self, client: Client) -> tuple[str, ...]:
        """See Adapter."""
        models: list[str] = []
        page: dict[str, str] = {}
        until = client.deadline()
        for _ in range(MAX_MODEL_PAGES):
            params: dict[str, str | int] = {"pageSize": _PAGE_SIZE, **page}
            document = self._get(client, "/v1beta/models", params, until)
            models += model_ids(map(_text_model, objects(document.get("models"))))
            token = text(document.get("nextPageToken"))
            if not token:
                break
            page = {"pageToken": token}
        return tuple(dict.fromkeys(models))

    def _request(self, prompt: ReviewPrompt) -> tuple[str, dict[str, Any]]:
        # Quoted whole, so that a model's name can't choose another path.
        model = quote(prompt.model, safe="")
        return f"/v1beta/models/{model}:streamGenerateContent?alt=sse", {
            "systemInstruction": {"parts": [{"text": prompt.system}]},
            "contents": [{"role": "user", "parts": [{"text": prompt.user}]}],
            "generationConfig": {
                "maxOutputTokens": prompt.max_output_tokens,
                "responseMimeType": "application/json",
                "responseJsonSchema": prompt.schema,
            },
        }

    def _piece(self, document: Mapping[str, Any]) -> Piece:
        if mapping(document.get("promptFeedback")).get("blockReason"):
            return Piece(end="PROMPT_BLOCKED")
        candidate = next(iter(objects(document.get("candidates"))), {})
        parts = objects(mapping(candidate.get("content")).get("parts"))
        finish = candidate.get("finishReason")
        return Piece(
            "".join(text(part.get("text")) for part in parts if part.get("thought") is not True),
            None if finish is None else text(finish),
        )

    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        error = mapping(document.get("error"))
        code, message = error.get("code"), error.get("message")
        if status == 200 and isinstance(code, int):
            status = code  # in mid-stream
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
                return bounded(float(match[1]))
        return super()._retry_after(answer)


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
