"""Gemini's wire format: https://ai.google.dev/api"""

from __future__ import annotations

import base64
import json
import re
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
)

_RPC: Final = "type.googleapis.com/google.rpc."
# Google's SDK calls v1 from its version 3 on; v1beta has all of it.
_LIST: Final = re.compile(r"/v1(?:beta)?/models")
_GENERATE: Final = re.compile(r"/v1(?:beta)?/models/([^/]+):streamGenerateContent")


class Gemini(Wire):
    """generativelanguage.googleapis.com"""

    name: ClassVar[str] = "gemini"
    host: ClassVar[str] = "generativelanguage.googleapis.com"

    def route(self, request: Request) -> PathKind:
        """See Wire."""
        if request.method == "GET" and _LIST.fullmatch(request.path):
            return "models"
        is_call = request.method == "POST" and _GENERATE.fullmatch(request.path)
        return "chat" if is_call else "other"

    def key(self, request: Request) -> str | None:
        """See Wire; the ``key`` query parameter, which the real one takes, counts as none."""
        return request.headers.get("x-goog-api-key") or None

    def plausible(self, key: str) -> bool:
        """See Wire."""
        return len(key) >= 20 and key.startswith(("AIza", "AQ."))

    def not_found(self, request: Request) -> Reply:
        """See Wire."""
        return _error(404, "NOT_FOUND", "Requested entity was not found.")

    def no_key(self) -> Reply:
        """See Wire."""
        message = (
            "Method doesn't allow unregistered callers (callers without established identity). "
            "Please use API Key or other form of API consumer identity to call this API."
        )
        return _error(403, "PERMISSION_DENIED", message)

    def unauthorized(self, key: str) -> Reply:
        """See Wire."""
        message = "API key not valid. Please pass a valid API key."
        details = [
            {
                "@type": f"{_RPC}ErrorInfo",
                "reason": "API_KEY_INVALID",
                "domain": "googleapis.com",
                "metadata": {"service": self.host},
            },
            {"@type": f"{_RPC}LocalizedMessage", "locale": "en-US", "message": message},
        ]
        return _error(400, "INVALID_ARGUMENT", message, details)

    def missing_scope(self, kind: PathKind) -> Reply:
        """See Wire."""
        method = "ModelService.ListModels" if kind == "models" else "GenerativeService"
        name = f"google.ai.generativelanguage.v1beta.{method}"
        details = [
            {
                "@type": f"{_RPC}ErrorInfo",
                "reason": "API_KEY_SERVICE_BLOCKED",
                "domain": "googleapis.com",
                "metadata": {"service": self.host, "methodName": name},
            }
        ]
        message = f"Requests to this API {self.host} method {name} are blocked."
        return _error(403, "PERMISSION_DENIED", message, details)

    def quota(self) -> Reply:
        """See Wire."""
        violation = {
            "quotaMetric": f"{self.host}/generate_content_free_tier_requests",
            "quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
            "quotaDimensions": {"location": "global", "model": "gemini-3.5-flash"},
            "quotaValue": "250",
        }
        details = [
            {"@type": f"{_RPC}QuotaFailure", "violations": [violation]},
            {"@type": f"{_RPC}RetryInfo", "retryDelay": "34s"},
        ]
        message = "You exceeded your current quota, please check your plan and billing details."
        return _error(429, "RESOURCE_EXHAUSTED", message, details)

    def rate_limited(self, seconds: float) -> Reply:
        """See Wire; there is no retry-after header, only RetryInfo."""
        violation = {
            "quotaMetric": f"{self.host}/generate_content_paid_tier_requests",
            "quotaId": "GenerateRequestsPerMinutePerProjectPerModel-PaidTier",
        }
        details = [
            {"@type": f"{_RPC}QuotaFailure", "violations": [violation]},
            {"@type": f"{_RPC}RetryInfo", "retryDelay": f"{seconds:g}s"},
        ]
        return _error(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted.", details)

    def server_error(self, status: int) -> Reply:
        """See Wire."""
        if status == 503:
            return _error(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")
        return _error(status, "INTERNAL", "An internal error has occurred.")

    def bad_request(self, message: str) -> Reply:
        """See Wire."""
        return _error(400, "INVALID_ARGUMENT", message)

    def context_too_long(self) -> Reply:
        """See Wire."""
        return self.bad_request(
            "The input token count (3475108) exceeds the maximum number of tokens allowed"
            " (1048576)."
        )

    def region_refused(self) -> Reply:
        """See Wire."""
        message = "User location is not supported for the API use."
        return _error(400, "FAILED_PRECONDITION", message)

    def models(self, request: Request, more: Sequence[str] = ()) -> Reply:
        """See Wire."""
        ids = (*more, *listed(self.name))
        start = _offset(request.query.get("pageToken"))
        if start is None:
            return self.bad_request("Invalid page token.")
        wanted = request.query.get("pageSize", "50")
        size = min(int(wanted) if wanted.isdecimal() else 50, MAX_PAGE)
        document: dict[str, Any] = {"models": [_model(i) for i in ids[start : start + size]]}
        if start + size < len(ids):
            document["nextPageToken"] = base64.urlsafe_b64encode(b"%d" % (start + size)).decode()
        return json_reply(200, document)

    def chat(self, request: Request) -> Chat | Reply:
        """See Wire."""
        named = _GENERATE.fullmatch(request.path)
        model = named[1] if named else ""
        if model not in CHAT_MODELS[self.name]:
            message = (
                f"models/{model} is not found for API version v1beta, or is not supported for "
                "generateContent. Call ListModels to see the list of available models and their "
                "supported methods."
            )
            return _error(404, "NOT_FOUND", message)
        if request.query.get("alt") != "sse":
            return self.bad_request("The emulator streams events only: alt=sse.")
        body = request.json()
        contents = dig(body, "contents")
        if not isinstance(contents, list) or not contents:
            return self.bad_request("* GenerateContentRequest.contents: contents is not specified")
        config = dig(body, "generationConfig")
        if dig(config, "responseMimeType") != "application/json" or not isinstance(
            dig(config, "responseJsonSchema"), dict
        ):
            return self.bad_request(
                "* GenerateContentRequest.generation_config.response_json_schema: required"
            )
        if not is_positive(dig(config, "maxOutputTokens")):
            return self.bad_request("max_output_tokens must be positive")
        return Chat(model, "\n".join(_texts(contents)))

    def events(self, model: str, pieces: Sequence[str], end: End) -> Iterator[bytes]:
        """See Wire; the real one's lines end like HTTP's, and nothing follows the last event."""
        usage = {"promptTokenCount": USAGE_TOKENS, "totalTokenCount": USAGE_TOKENS}
        more = {"usageMetadata": usage, "modelVersion": model, "responseId": "emulator"}
        if end == "refusal":
            yield _event({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, **more})
            return
        for piece in pieces:
            content = {"role": "model", "parts": [{"text": piece}]}
            yield _event({"candidates": [{"content": content, "index": 0}], **more})
        finish = "MAX_TOKENS" if end == "length" else "STOP"
        last = {"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": finish}
        yield _event({"candidates": [{**last, "index": 0}], **more})

    def error_event(self) -> bytes:
        """See Wire; no event at all: the bare document, as the real one does."""
        message = "This model is currently experiencing high demand. Please try again later."
        error = {"code": 503, "message": message, "status": "UNAVAILABLE"}
        return json.dumps({"error": error}, indent=2).encode()


def _event(document: dict[str, Any]) -> bytes:
    return event(document, newline="\r\n")


def _texts(contents: list[object]) -> list[str]:
    parts = [
        part
        for content in contents
        if dig(content, "role") in (None, "user") and isinstance(dig(content, "parts"), list)
        for part in dig(content, "parts")
    ]
    return [text for part in parts if isinstance(text := dig(part, "text"), str)]


def _offset(token: str | None) -> int | None:
    if token is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(token))
    except ValueError:
        return None


def _model(model: str) -> dict[str, Any]:
    methods = ["embedContent"] if "embedding" in model else ["generateContent", "countTokens"]
    return {
        "name": f"models/{model}",
        "version": "001",
        "displayName": model.replace("-", " ").title(),
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": methods,
    }


def _error(status: int, code: str, message: str, details: list[Any] | None = None) -> Reply:
    error: dict[str, Any] = {"code": status, "message": message, "status": code}
    if details:
        error["details"] = details
    return json_reply(status, {"error": error})
