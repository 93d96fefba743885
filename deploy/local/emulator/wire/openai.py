"""OpenAI's wire format: https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from deploy.local.emulator.http import Reply, Request, json_reply
from deploy.local.emulator.models import CHAT_MODELS, listed
from deploy.local.emulator.state import PathKind
from deploy.local.emulator.wire.base import (
    USAGE_TOKENS,
    Chat,
    End,
    Wire,
    dig,
    event,
    is_positive,
    strict_schema_fault,
)

_CREATED = 1_780_000_000


class OpenAI(Wire):
    """api.openai.com"""

    name: ClassVar[str] = "openai"
    host: ClassVar[str] = "api.openai.com"

    def route(self, request: Request) -> PathKind:
        """See Wire."""
        routes: dict[tuple[str, str], PathKind] = {
            ("GET", "/v1/models"): "models",
            ("POST", "/v1/chat/completions"): "chat",
        }
        return routes.get((request.method, request.path), "other")

    def key(self, request: Request) -> str | None:
        """See Wire."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return key or None if scheme == "Bearer" else None

    def plausible(self, key: str) -> bool:
        """See Wire; an Anthropic key begins alike, an admin key can't chat."""
        return (
            len(key) >= 20
            and key.startswith("sk-")
            and not key.startswith(("sk-ant-", "sk-admin-"))
        )

    def not_found(self, request: Request) -> Reply:
        """See Wire."""
        return _error(
            404, f"Invalid URL ({request.method} {request.path})", "invalid_request_error"
        )

    def no_key(self) -> Reply:
        """See Wire."""
        message = (
            "You didn't provide an API key. You need to provide your API key in an Authorization "
            "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
        return _error(401, message, "invalid_request_error")

    def unauthorized(self, key: str) -> Reply:
        """See Wire."""
        hint = f"{key[:8]}{'*' * 20}{key[-4:]}"
        message = (
            f"Incorrect API key provided: {hint}. You can find your API key at "
            "https://platform.openai.com/account/api-keys."
        )
        return _error(401, message, "invalid_request_error", "invalid_api_key")

    def missing_scope(self, kind: PathKind) -> Reply:
        """See Wire; on the model list the error is a bare string."""
        scope = "api.model.read" if kind == "models" else "model.request"
        message = (
            f"You have insufficient permissions for this operation. Missing scopes: {scope}. "
            "Check that you have the correct role in your organization (Reader, Writer, Owner) "
            "and project (Member, Owner), and if you're using a restricted API key, that it has "
            "the necessary scopes."
        )
        if kind == "models":
            return json_reply(401, {"error": message})
        return _error(401, message, "invalid_request_error")

    def quota(self) -> Reply:
        """See Wire."""
        message = "You exceeded your current quota, please check your plan and billing details."
        return _error(429, message, "insufficient_quota", "credit_balance_exhausted")

    def rate_limited(self, seconds: float) -> Reply:
        """See Wire."""
        message = f"Rate limit reached. Please try again in {seconds:g}s."
        waits = (
            ("retry-after", str(math.ceil(seconds))),
            ("retry-after-ms", str(round(seconds * 1000))),
        )
        return _error(429, message, "requests", "rate_limit_exceeded", headers=waits)

    def server_error(self, status: int) -> Reply:
        """See Wire."""
        message = "The server had an error while processing your request. Sorry about that!"
        return _error(status, message, "server_error")

    def bad_request(self, message: str) -> Reply:
        """See Wire."""
        return _error(400, message, "invalid_request_error")

    def context_too_long(self) -> Reply:
        """See Wire."""
        message = "Your input exceeds the context window of this model. Please adjust your input."
        return _error(400, message, "invalid_request_error", "context_length_exceeded")

    def region_refused(self) -> Reply:
        """See Wire."""
        message = "Country, region, or territory not supported"
        code = "unsupported_country_region_territory"
        return _error(403, message, "request_forbidden", code)

    def models(self, request: Request, more: Sequence[str] = ()) -> Reply:
        """See Wire; the list has one page."""
        data = [
            {"id": model, "object": "model", "created": _CREATED, "owned_by": "system"}
            for model in (*listed(self.name), *(f"gpt-6-{one}" for one in more))
        ]
        return json_reply(200, {"object": "list", "data": data})

    def chat(self, request: Request) -> Chat | Reply:
        """See Wire."""
        body = request.json()
        if not isinstance(body, dict):
            return self.bad_request("We could not parse the JSON body of your request.")
        model, messages = body.get("model"), body.get("messages")
        if model not in CHAT_MODELS[self.name]:
            message = f"The model `{model}` does not exist or you do not have access to it."
            return _error(404, message, "invalid_request_error", "model_not_found")
        if body.get("stream") is not True:
            return self.bad_request("The emulator streams only: 'stream' must be true.")
        if not isinstance(messages, list) or not messages:
            return self.bad_request("Missing required parameter: 'messages'.")
        if "max_tokens" in body or not is_positive(body.get("max_completion_tokens")):
            message = (
                "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead."
            )
            return _error(400, message, "invalid_request_error", "unsupported_parameter")
        if fault := _format_fault(body):
            return self.bad_request(fault)
        user = [m.get("content") for m in messages if dig(m, "role") == "user"]
        return Chat(model, "\n".join(text for text in user if isinstance(text, str)))

    def events(self, model: str, pieces: Sequence[str], end: End) -> Iterator[bytes]:
        """See Wire; the usage stands in the last chunk, which the real one sends if asked."""
        chunk = {
            "id": "chatcmpl-emulator",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "service_tier": "default",
        }

        def choice(delta: dict[str, str | None], finish: str | None = None) -> dict[str, Any]:
            return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

        first = {"role": "assistant", "content": "" if pieces else None, "refusal": None}
        yield event({**chunk, "choices": [choice(first)]})
        for piece in pieces:
            yield event({**chunk, "choices": [choice({"content": piece})]})
        if end == "refusal":
            for piece in ("I'm sorry,", " I can't assist with that."):
                yield event({**chunk, "choices": [choice({"refusal": piece})]})
        usage = {
            "prompt_tokens": USAGE_TOKENS,
            "completion_tokens": USAGE_TOKENS,
            "total_tokens": USAGE_TOKENS,
        }
        finish = "length" if end == "length" else "stop"
        yield event({**chunk, "choices": [choice({}, finish)], "usage": usage})
        yield b"data: [DONE]\n\n"

    def error_event(self) -> bytes:
        """See Wire."""
        message = "The server is currently overloaded. Please try again later."
        error = {"message": message, "type": "server_error", "param": None}
        return event({"error": {**error, "code": "server_is_overloaded"}})


def _format_fault(body: dict[str, object]) -> str | None:
    wanted = dig(body, "response_format", "json_schema")
    if dig(body, "response_format", "type") != "json_schema" or not isinstance(wanted, dict):
        return "Missing required parameter: 'response_format.json_schema'."
    if not isinstance(wanted.get("name"), str) or wanted.get("strict") is not True:
        return "Missing required parameter: 'response_format.json_schema.name'."
    if fault := strict_schema_fault(wanted.get("schema")):
        return f"Invalid schema for response_format '{wanted['name']}': In context={fault}."
    return None


def _error(
    status: int,
    message: str,
    kind: str,
    code: str | None = None,
    *,
    headers: tuple[tuple[str, str], ...] = (),
) -> Reply:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json_reply(status, {"error": error}, headers)
