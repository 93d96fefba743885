"""Anthropic: model list and messages.

https://platform.claude.com/docs/en/api/errors and .../build-with-claude/structured-outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

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
from services.llm_runner.providers.exchange import Answer

_API_VERSION: Final = "2023-06-01"
_PAGE_SIZE: Final = 1000
# Two kinds of spend limit and an empty account are told apart from a bad request, or
# from a rate limit, by their text alone.
_QUOTA_TEXTS: Final = (
    "credit balance is too low",
    "you have reached your specified api usage limits",
    "you have reached your specified workspace api usage limits",
    "you have reached your api usage limits",
)


class Anthropic(Adapter):
    """Anthropic's public API."""

    name: ClassVar[str] = "anthropic"
    host: ClassVar[str] = "api.anthropic.com"

    def auth_headers(self, key: str) -> dict[str, str]:
        """See Adapter."""
        return {"x-api-key": key, "anthropic-version": _API_VERSION}

    def list_models(self, client: httpx.Client) -> tuple[str, ...]:
        """See Adapter."""
        models: list[str] = []
        after: dict[str, str] = {}
        for _ in range(MAX_MODEL_PAGES):
            document = self._call(
                client, "GET", "/v1/models", params={"limit": _PAGE_SIZE, **after}
            )
            models += model_ids(item.get("id") for item in objects(document.get("data")))
            last = text(document.get("last_id"))
            if document.get("has_more") is not True or not last:
                break
            after = {"after_id": last}
        return tuple(dict.fromkeys(models))

    def review(self, client: httpx.Client, prompt: ReviewPrompt) -> ReviewAnswer:
        """See Adapter."""
        document = self._call(client, "POST", "/v1/messages", body=_request(prompt))
        stop = document.get("stop_reason")
        if stop == "refusal":
            raise ProviderError(FailureKind.REFUSED, http_status=200)
        if stop in ("max_tokens", "model_context_window_exceeded"):
            raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200, detail="truncated")
        # Models that think by default put their thinking into blocks of their own.
        blocks = objects(document.get("content"))
        answer = "".join(text(b.get("text")) for b in blocks if b.get("type") == "text")
        return ReviewAnswer(parse_findings(answer))

    def _classify(self, answer: Answer, error: Mapping[str, Any]) -> FailureKind | None:
        message = text(error.get("message")).lower()
        if any(known in message for known in _QUOTA_TEXTS) or error.get("type") == "billing_error":
            return FailureKind.QUOTA_EXHAUSTED
        if answer.status == 429 and _is_spend_cap(answer, error):
            return FailureKind.QUOTA_EXHAUSTED
        if answer.status in (400, 403) and "organization has been disabled" in message:
            return FailureKind.KEY_REJECTED
        return None


def _is_spend_cap(answer: Answer, error: Mapping[str, Any]) -> bool:
    # A usage tier's spend cap looks like a rate limit but has no retry-after.
    code = mapping(error.get("details")).get("error_code")
    return code == "enforced_spend_limit_reached" or "retry-after" not in answer.headers


def _request(prompt: ReviewPrompt) -> dict[str, Any]:
    return {
        "model": prompt.model,
        "max_tokens": prompt.max_output_tokens,
        "system": prompt.system,
        "messages": [{"role": "user", "content": prompt.user}],
        "output_config": {"format": {"type": "json_schema", "schema": prompt.schema}},
    }
