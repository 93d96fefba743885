"""Anthropic's wire format: https://platform.claude.com/docs/en/api"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from deploy.local.emulator.http import Reply, Request, json_reply
from deploy.local.emulator.models import CHAT_MODELS, MAX_PAGE, listed
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

_SERVER_ERRORS: Final = {
    504: ("timeout_error", "Request timed out"),
    529: ("overloaded_error", "Overloaded"),
}


class Anthropic(Wire):
    """api.anthropic.com"""

    name: ClassVar[str] = "anthropic"
    host: ClassVar[str] = "api.anthropic.com"

    def route(self, request: Request) -> PathKind:
        """See Wire."""
        routes: dict[tuple[str, str], PathKind] = {
            ("GET", "/v1/models"): "models",
            ("POST", "/v1/messages"): "chat",
        }
        return routes.get((request.method, request.path), "other")

    def key(self, request: Request) -> str | None:
        """See Wire; Anthropic's SDKs send a bearer token from API version 2026-10-21 on."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return request.headers.get("x-api-key") or (token if scheme == "Bearer" else "") or None

    def plausible(self, key: str) -> bool:
        """See Wire."""
        return len(key) >= 20 and key.startswith("sk-ant-") and not key.startswith("sk-ant-admin")

    def not_found(self, request: Request) -> Reply:
        """See Wire."""
        return _error(404, "not_found_error", "Not Found")

    def no_key(self) -> Reply:
        """See Wire."""
        return _error(401, "authentication_error", "x-api-key header is required")

    def unauthorized(self, key: str) -> Reply:
        """See Wire."""
        return _error(401, "authentication_error", "invalid x-api-key")

    def missing_scope(self, kind: PathKind) -> Reply:
        """See Wire."""
        message = "Your API key does not have permission to use the specified resource."
        return _error(403, "permission_error", message)

    def quota(self) -> Reply:
        """See Wire."""
        message = (
            "Your credit balance is too low to access the Anthropic API. Please go to Plans & "
            "Billing to upgrade or purchase credits."
        )
        return _error(400, "invalid_request_error", message)

    def rate_limited(self, seconds: float) -> Reply:
        """See Wire."""
        message = "This request would exceed your organization's rate limit."
        wait = (("retry-after", str(math.ceil(seconds))),)
        return _error(429, "rate_limit_error", message, wait)

    def server_error(self, status: int) -> Reply:
        """See Wire."""
        kind, message = _SERVER_ERRORS.get(status, ("api_error", "Internal server error"))
        return _error(status, kind, message)

    def bad_request(self, message: str) -> Reply:
        """See Wire."""
        return _error(400, "invalid_request_error", message)

    def context_too_long(self) -> Reply:
        """See Wire."""
        return self.bad_request("prompt is too long: 1208310 tokens > 1000000 maximum")

    def region_refused(self) -> Reply:
        """See Wire; it comes without the type that other errors have."""
        error = {"type": "forbidden", "message": "Request not allowed"}
        return json_reply(403, {"error": error})

    def models(self, request: Request, more: Sequence[str] = ()) -> Reply:
        """See Wire."""
        if fault := self._version_fault(request):
            return fault
        ids = (*more, *listed(self.name))
        after = request.query.get("after_id")
        if after is not None and after not in ids:
            return self.bad_request("after_id: not found")
        start = ids.index(after) + 1 if after is not None else 0
        limit = request.query.get("limit", "20")
        size = min(int(limit) if limit.isdecimal() else 20, MAX_PAGE)
        page = ids[start : start + size]
        data = [
            {
                "type": "model",
                "id": model,
                "display_name": model.replace("-", " ").title(),
                "created_at": "2026-06-30T00:00:00Z",
            }
            for model in page
        ]
        document = {
            "data": data,
            "has_more": start + len(page) < len(ids),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }
        return json_reply(200, document)

    def chat(self, request: Request) -> Chat | Reply:
        """See Wire."""
        if fault := self._version_fault(request):
            return fault
        body = request.json()
        if not isinstance(body, dict):
            return self.bad_request("The request body is not valid JSON")
        model, messages = body.get("model"), body.get("messages")
        if model not in CHAT_MODELS[self.name]:
            return _error(404, "not_found_error", f"model: {model}")
        if not is_positive(body.get("max_tokens")):
            return self.bad_request("max_tokens: Field required")
        if body.get("stream") is not True:
            return self.bad_request("stream: the emulator streams only")
        if not isinstance(messages, list) or not messages:
            return self.bad_request("messages: Field required")
        if any(dig(message, "role") not in ("user", "assistant") for message in messages):
            return self.bad_request("messages: Unexpected role")
        wanted = dig(body, "output_config", "format")
        if dig(wanted, "type") != "json_schema":
            return self.bad_request("output_config.format: Field required")
        if schema_fault := strict_schema_fault(dig(wanted, "schema")):
            return self.bad_request(f"output_config.format.schema: {schema_fault}")
        user = [m.get("content") for m in messages if dig(m, "role") == "user"]
        return Chat(model, "\n".join(text for text in user if isinstance(text, str)))

    def events(self, model: str, pieces: Sequence[str], end: End) -> Iterator[bytes]:
        """See Wire."""
        usage = {"input_tokens": USAGE_TOKENS, "output_tokens": USAGE_TOKENS}
        message: dict[str, Any] = {
            "id": "msg_emulator",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event("message_start", message=message)
        # The current models think by default, in a block of their own.
        thinking = {"type": "thinking", "thinking": "", "signature": ""}
        yield _event("content_block_start", index=0, content_block=thinking)
        signature = {"type": "signature_delta", "signature": "emulator"}
        yield _event("content_block_delta", index=0, delta=signature)
        yield _event("content_block_stop", index=0)
        yield _event("ping")
        if pieces:
            yield _event("content_block_start", index=1, content_block={"type": "text", "text": ""})
            for piece in pieces:
                delta = {"type": "text_delta", "text": piece}
                yield _event("content_block_delta", index=1, delta=delta)
            yield _event("content_block_stop", index=1)
        stop = {"stop": "end_turn", "length": "max_tokens", "refusal": "refusal"}[end]
        last = {"stop_reason": stop, "stop_sequence": None}
        yield _event("message_delta", delta=last, usage={"output_tokens": USAGE_TOKENS})
        yield _event("message_stop")

    def error_event(self) -> bytes:
        """See Wire."""
        return _event("error", error={"type": "overloaded_error", "message": "Overloaded"})

    def _version_fault(self, request: Request) -> Reply | None:
        if request.headers.get("anthropic-version") in ("2023-06-01", "2026-10-21"):
            return None
        return self.bad_request("anthropic-version: header is required")


def _event(name: str, **fields: object) -> bytes:
    return event({"type": name, **fields}, name)


def _error(
    status: int, kind: str, message: str, headers: tuple[tuple[str, str], ...] = ()
) -> Reply:
    error = {"type": kind, "message": message}
    return json_reply(
        status, {"type": "error", "error": error, "request_id": "req_emulator"}, headers
    )
