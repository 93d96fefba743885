"""OpenAI: model list and chat completions, streamed.

https://developers.openai.com/api/reference/resources/chat, and openai-python's
types/chat/chat_completion_chunk.py for a stream's events
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from services.llm_runner.providers.base import (
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

# The list gives ids only. These families speak chat completions with structured output...
_CHAT: Final = re.compile(r"(ft:)?(gpt-(4o|4\.|[5-9]|\d\d)|chatgpt-|o[1-9])")
# ...except these members, which take or give something else, or have other endpoints.
_NOT_CHAT: Final = re.compile(
    r"audio|codex|deep-research|image|live|realtime|search|transcribe|tts|-pro\b|instruct"
)


class OpenAI(Adapter):
    """OpenAI's public API."""

    name: ClassVar[str] = "openai"
    host: ClassVar[str] = "api.openai.com"

    def auth_headers(self, key: str) -> dict[str, str]:
        """See Adapter."""
        return {"authorization": f"Bearer {key}"}

    def list_models(self, client: Client) -> tuple[str, ...]:
        """See Adapter; the list has a single page."""
        document = self._get(client, "/v1/models", {}, client.deadline())
        ids = model_ids(item.get("id") for item in objects(document.get("data")))
        return tuple(i for i in ids if _CHAT.match(i) and not _NOT_CHAT.search(i))

    def _request(self, prompt: ReviewPrompt) -> tuple[str, dict[str, Any]]:
        return "/v1/chat/completions", {
            "model": prompt.model,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            "max_completion_tokens": prompt.max_output_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "review", "strict": True, "schema": prompt.schema},
            },
            "stream": True,
            # The customer's code is not for the provider's dashboard.
            "store": False,
        }

    def _piece(self, document: Mapping[str, Any]) -> Piece:
        choice = next(iter(objects(document.get("choices"))), {})
        delta, finish = mapping(choice.get("delta")), choice.get("finish_reason")
        if delta.get("refusal"):
            return Piece(end="refusal")
        return Piece(text(delta.get("content")), None if finish is None else text(finish))

    def _said(self, status: int, document: Mapping[str, Any]) -> Said:
        error = document.get("error")
        if isinstance(error, str):  # some authorisation errors; too little to know it by
            return Said(status, message=error)
        error = mapping(error)
        return Said(
            status,
            isinstance(error.get("message"), str) and {"type", "code"} <= error.keys(),
            code=text(error.get("code")),
            type=text(error.get("type")),
            message=text(error.get("message")),
        )
