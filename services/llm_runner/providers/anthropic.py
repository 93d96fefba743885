"""Anthropic: model list and messages, streamed.

https://platform.claude.com/docs/en/build-with-claude/streaming and .../structured-outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from services.llm_runner.providers.base import (
    MAX_MODEL_PAGES,
    Adapter,
    Piece,
    ReviewPrompt,
    mapping,
    model_ids,
    objects,
    text,
)
from services.llm_runner.providers.exchange import Client
from services.llm_runner.providers.table import Said

# https://platform.claude.com/docs/en/api/versioning: against 2023-06-01 it refuses parameters and
# blocks that no request here has.
_API_VERSION: Final = "2026-10-21"
_PAGE_SIZE: Final = 1000


class Anthropic(Adapter):
    """Anthropic's public API."""

    name: ClassVar[str] = "anthropic"
    host: ClassVar[str] = "api.anthropic.com"

    def auth_headers(self, key: str) -> dict[str, str]:
        """See Adapter."""
        return {"x-api-key": key, "anthropic-version": _API_VERSION}

    def list_models(self, client: Client) -> tuple[str, ...]:
        """See Adapter."""
        models: list[str] = []
        after: dict[str, str] = {}
        until = client.deadline()
        for _ in range(MAX_MODEL_PAGES):
            params: dict[str, str | int] = {"limit": _PAGE_SIZE, **after}
            document = self._get(client, "/v1/models", params, until)
            models += model_ids(item.get("id") for item in objects(document.get("data")))
            last = text(document.get("last_id"))
            if document.get("has_more") is not True or not last:
                break
            after = {"after_id": last}
        return tuple(dict.fromkeys(models))

    def _request(self, prompt: ReviewPrompt) -> tuple[str, dict[str, Any]]:
        return "/v1/messages", {
            "model": prompt.model,
            "max_tokens": prompt.max_output_tokens,
            "system": prompt.system,
            "messages": [{"role": "user", "content": prompt.user}],
            "output_config": {"format": {"type": "json_schema", "schema": prompt.schema}},
            "stream": True,
        }

    def _piece(self, document: Mapping[str, Any]) -> Piece:
        # Models that think by default put their thinking into blocks and deltas of their own.
        delta = mapping(document.get("delta"))
        match document.get("type"):
            case "content_block_start":
                return Piece(text(mapping(document.get("content_block")).get("text")))
            case "content_block_delta":
                return Piece(text(delta.get("text")))
            case "message_delta" if delta.get("stop_reason") is not None:
                return Piece(end=text(delta["stop_reason"]))
        return Piece()

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
