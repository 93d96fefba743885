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
    ReviewAnswer,
    ReviewPrompt,
    mapping,
    model_ids,
    objects,
    parse_findings,
    text,
)
from services.llm_runner.providers.table import Said

_API_VERSION: Final = "2023-06-01"
_PAGE_SIZE: Final = 1000


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
        self._ended(text(document.get("stop_reason")))
        # Models that think by default put their thinking into blocks of their own.
        blocks = objects(document.get("content"))
        answer = "".join(text(b.get("text")) for b in blocks if b.get("type") == "text")
        return ReviewAnswer(parse_findings(answer))

    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        error = mapping(document.get("error"))
        message = error.get("message")
        return Said(
            status,
            document.get("type") == "error" and isinstance(message, str) and "type" in error,
            code=text(mapping(error.get("details")).get("error_code")),
            type=text(error.get("type")),
            message=text(message),
        )


def _request(prompt: ReviewPrompt) -> dict[str, Any]:
    return {
        "model": prompt.model,
        "max_tokens": prompt.max_output_tokens,
        "system": prompt.system,
        "messages": [{"role": "user", "content": prompt.user}],
        "output_config": {"format": {"type": "json_schema", "schema": prompt.schema}},
    }
