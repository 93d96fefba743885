"""OpenAI: model list and chat completions.

https://platform.openai.com/docs/api-reference/chat and .../guides/error-codes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import httpx

from services.llm_runner.providers.base import (
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

    def list_models(self, client: httpx.Client) -> tuple[str, ...]:
        """See Adapter; the list has a single page."""
        document = self._call(client, "GET", "/v1/models")
        ids = model_ids(item.get("id") for item in objects(document.get("data")))
        return tuple(i for i in ids if _CHAT.match(i) and not _NOT_CHAT.search(i))

    def review(self, client: httpx.Client, prompt: ReviewPrompt) -> ReviewAnswer:
        """See Adapter."""
        document = self._call(client, "POST", "/v1/chat/completions", body=_request(prompt))
        choice = next(iter(objects(document.get("choices"))), {})
        message = mapping(choice.get("message"))
        finish = choice.get("finish_reason")
        self._ended("refusal" if message.get("refusal") else text(finish))
        return ReviewAnswer(parse_findings(text(message.get("content"))))

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


def _request(prompt: ReviewPrompt) -> dict[str, Any]:
    return {
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
        # The customer's code is not for the provider's dashboard.
        "store": False,
    }
