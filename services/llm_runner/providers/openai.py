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

# The list gives ids only. These families speak chat completions with structured output...
_CHAT: Final = re.compile(r"(ft:)?(gpt-(4o|4\.|[5-9]|\d\d)|chatgpt-|o[1-9])")
# ...except these members, which take or give something else, or have other endpoints.
_NOT_CHAT: Final = re.compile(
    r"audio|codex|deep-research|image|live|realtime|search|transcribe|tts|-pro\b|instruct"
)
_QUOTA_CODES: Final = re.compile(
    r"insufficient_quota|credit_balance_exhausted|.*_spend_limit_exceeded"
    r"|.*_usage_limit_exceeded|billing_hard_limit_reached|billing_not_active"
)
_SCOPE: Final = re.compile(
    r"missing scopes|insufficient_scope|insufficient permissions|ip allowlist"
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
        if message.get("refusal") or finish == "content_filter":
            raise ProviderError(FailureKind.REFUSED, http_status=200)
        if finish == "length":
            raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200, detail="truncated")
        return ReviewAnswer(parse_findings(text(message.get("content"))))

    def _classify(self, answer: Answer, error: Mapping[str, Any]) -> FailureKind | None:
        code, message = text(error.get("code")), text(error.get("message")).lower()
        if _QUOTA_CODES.fullmatch(code) or error.get("type") == "insufficient_quota":
            return FailureKind.QUOTA_EXHAUSTED
        if code == "model_not_found":
            return FailureKind.MODEL_NOT_FOUND
        if answer.status == 401 and (_SCOPE.search(message) or _SCOPE.search(code)):
            return FailureKind.KEY_RESTRICTED
        if answer.status == 403 and code == "unsupported_country_region_territory":
            return FailureKind.BAD_REQUEST
        if answer.status == 400 and code in ("content_policy_violation", "invalid_prompt"):
            return FailureKind.REFUSED
        return None


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
