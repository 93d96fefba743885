"""What providers say when a call fails or an answer ends, and what it means: one table.

A row is a provider's own words, and so recognises its answer. Where no row fits, the HTTP
status decides; it judges a key only where the body has the shape that the provider documents,
for the 401 or 403 of anything that stands in between (a CDN, a proxy) says nothing of a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from services.llm_runner.providers.errors import FailureKind as Kind


@dataclass(frozen=True, slots=True)
class Said:
    """An error answer, reduced to what the table looks at.

    ``code`` and ``type`` are the provider's own (Anthropic: ``details.error_code``; Gemini: every
    reason and quota id, and ``status``). ``status`` is HTTP's, 200 for an error in mid-stream.
    ``documented`` says whether the body has the shape that the provider documents.
    """

    status: int
    documented: bool = False
    code: str = field(default="", repr=False)
    type: str = field(default="", repr=False)
    message: str = field(default="", repr=False)


class _Row(NamedTuple):
    statuses: tuple[int, ...]
    """HTTP statuses that it is for; none: all of them."""
    where: Literal["code", "type", "message"]
    pattern: str
    kind: Kind
    source: str


_STREAM: Final = (200,)
_OPENAI_DOC: Final = "https://developers.openai.com/api/docs/guides/error-codes"
_ANTHROPIC_DOC: Final = "https://platform.claude.com/docs/en/api/errors"
# Its 2.14.0 has a class for each error_code: anthropic/types/shared/*_details.py.
_ANTHROPIC_CODES: Final = "https://github.com/anthropics/anthropic-sdk-python"
_GEMINI_DOC: Final = "https://ai.google.dev/gemini-api/docs/generate-content/api-errors"

# fmt: off
_OPENAI: Final = (
    _Row((), "code", r"^(insufficient_quota|credit_balance_exhausted|billing_not_active"
         r"|billing_hard_limit_reached|.*_(spend|usage)_limit_exceeded)$",
         Kind.QUOTA_EXHAUSTED, _OPENAI_DOC),
    _Row((), "type", r"^insufficient_quota$", Kind.QUOTA_EXHAUSTED, _OPENAI_DOC),
    # Larger than the tokens of a whole minute: it never succeeds as it is.
    _Row((429,), "message", r"^request too large", Kind.CONTEXT_TOO_LONG,
         "https://github.com/Aider-AI/aider/issues/1880"),
    _Row((), "code", r"^context_length_exceeded$", Kind.CONTEXT_TOO_LONG,
         "https://github.com/anomalyco/opencode/issues/6071"),
    _Row((400,), "message",
         r"maximum context length|exceeds the context window|input tokens exceed",
         Kind.CONTEXT_TOO_LONG, "https://github.com/cline/cline/issues/5474"),
    _Row((), "code", r"^model_not_found$", Kind.MODEL_NOT_FOUND, _OPENAI_DOC),
    _Row((401, 403), "message", r"missing scopes|insufficient permissions|ip allowlist",
         Kind.KEY_RESTRICTED, _OPENAI_DOC),
    _Row((401, 403), "code", r"^(insufficient_scope|ip_not_authorized)$",
         Kind.KEY_RESTRICTED, _OPENAI_DOC),
    _Row((403,), "code", r"^unsupported_country_region_territory$",
         Kind.REGION_REFUSED, _OPENAI_DOC),
    _Row((403,), "message", r"country, region, or territory not supported",
         Kind.REGION_REFUSED, _OPENAI_DOC),
    _Row((400,), "code", r"^(content_policy_violation|invalid_prompt)$",
         Kind.REFUSED, _OPENAI_DOC),
    _Row(_STREAM, "code", r"^(rate_limit_exceeded|slow_down)$", Kind.RATE_LIMITED, _OPENAI_DOC),
    _Row(_STREAM, "code", r"overloaded|server_error", Kind.PROVIDER_UNAVAILABLE,
         "https://github.com/editor-code-assistant/eca/pull/559"),
    _Row(_STREAM, "type", r"server_error|service_unavailable",
         Kind.PROVIDER_UNAVAILABLE, _OPENAI_DOC),
)
_ANTHROPIC: Final = (
    _Row((), "code", r"_spend_limit_reached$|^linked_organization_billing_unavailable$",
         Kind.QUOTA_EXHAUSTED, _ANTHROPIC_CODES),
    _Row((), "code", r"^(organization_on_hold|claude_code_key_creator_not_member)$",
         Kind.KEY_REJECTED, _ANTHROPIC_CODES),
    # The customer's own encryption key of a workspace: nothing is wrong with the API key.
    _Row((), "code", r"^cmek_", Kind.PROVIDER_UNAVAILABLE, _ANTHROPIC_CODES),
    _Row((), "type", r"^billing_error$", Kind.QUOTA_EXHAUSTED, _ANTHROPIC_DOC),
    _Row((), "message", r"credit balance is too low"
         r"|reached your (specified )?(workspace )?api usage limits",
         Kind.QUOTA_EXHAUSTED, _ANTHROPIC_DOC),
    _Row((400, 403), "message", r"organization has been disabled",
         Kind.KEY_REJECTED, _ANTHROPIC_DOC),
    _Row((401,), "message", r"^cors requests are not allowed", Kind.BAD_REQUEST, _ANTHROPIC_DOC),
    _Row((400,), "message", r"prompt is too long", Kind.CONTEXT_TOO_LONG,
         "https://github.com/anthropics/claude-code/issues/12186"),
    _Row((400,), "message", r"exceed context limit", Kind.CONTEXT_TOO_LONG,
         "https://github.com/docker/docker-agent/issues/569"),
    _Row((), "type", r"^request_too_large$", Kind.CONTEXT_TOO_LONG, _ANTHROPIC_DOC),
    # What calls from elsewhere and from blocked networks get, with a key that works too.
    _Row((403,), "message", r"^request not allowed$", Kind.REGION_REFUSED,
         "https://github.com/anthropics/claude-code/issues/1613"),
    _Row((), "message", r"unsupported countries, regions", Kind.REGION_REFUSED,
         "https://github.com/anthropics/claude-code/issues/2656"),
    _Row(_STREAM, "type", r"^(overloaded|api|timeout)_error$", Kind.PROVIDER_UNAVAILABLE,
         "https://platform.claude.com/docs/en/build-with-claude/streaming"),
    _Row(_STREAM, "type", r"^rate_limit_error$", Kind.RATE_LIMITED, _ANTHROPIC_DOC),
    _Row(_STREAM, "type", r"^authentication_error$", Kind.KEY_REJECTED, _ANTHROPIC_DOC),
    _Row(_STREAM, "type", r"^permission_error$", Kind.KEY_RESTRICTED, _ANTHROPIC_DOC),
    _Row(_STREAM, "type", r"^invalid_request_error$", Kind.BAD_REQUEST, _ANTHROPIC_DOC),
)
_GEMINI: Final = (
    _Row((), "code", r"\bAPI_KEY_INVALID\b", Kind.KEY_REJECTED,
         "https://cloud.google.com/apis/design/errors#error_info"),
    _Row((), "message", r"api key not valid", Kind.KEY_REJECTED, _GEMINI_DOC),
    _Row((403,), "message", r"reported as leaked|has been suspended",
         Kind.KEY_REJECTED, _GEMINI_DOC),
    _Row((403,), "code", r"\bCONSUMER_SUSPENDED\b", Kind.KEY_REJECTED,
         "https://cloud.google.com/apis/design/errors#error_info"),
    _Row((429,), "code", r"PerDay", Kind.QUOTA_EXHAUSTED,
         "https://ai.google.dev/gemini-api/docs/rate-limits"),
    _Row((429,), "message", r"credits are depleted", Kind.QUOTA_EXHAUSTED,
         "https://ai.google.dev/gemini-api/docs/billing"),
    _Row((400,), "message", r"token count .*exceeds the maximum number of tokens",
         Kind.CONTEXT_TOO_LONG, "https://github.com/google-gemini/gemini-cli/issues/4231"),
    _Row((400,), "message", r"user location is not supported", Kind.REGION_REFUSED,
         "https://github.com/google-gemini/gemini-cli/issues/24641"),
    _Row((400,), "message", r"free tier is not available in your country",
         Kind.REGION_REFUSED, _GEMINI_DOC),
)
# fmt: on
_ROWS: Final = {
    provider: tuple((row, re.compile(row.pattern, re.IGNORECASE)) for row in rows)
    for provider, rows in (("openai", _OPENAI), ("anthropic", _ANTHROPIC), ("gemini", _GEMINI))
}

# By HTTP status (RFC 9110; all three providers document it so): of a documented body, of another.
_STATUSES: Final = {
    400: (Kind.BAD_REQUEST, Kind.BAD_REQUEST),
    401: (Kind.KEY_REJECTED, Kind.PROVIDER_UNAVAILABLE),
    402: (Kind.QUOTA_EXHAUSTED, Kind.PROVIDER_UNAVAILABLE),
    403: (Kind.KEY_RESTRICTED, Kind.PROVIDER_UNAVAILABLE),
    404: (Kind.MODEL_NOT_FOUND, Kind.PROVIDER_UNAVAILABLE),
    408: (Kind.PROVIDER_UNAVAILABLE, Kind.PROVIDER_UNAVAILABLE),
    413: (Kind.CONTEXT_TOO_LONG, Kind.CONTEXT_TOO_LONG),
    429: (Kind.RATE_LIMITED, Kind.RATE_LIMITED),
}
_CLASSES: Final = {
    2: (Kind.BAD_RESPONSE, Kind.BAD_RESPONSE),
    3: (Kind.REDIRECTED, Kind.REDIRECTED),
    4: (Kind.BAD_REQUEST, Kind.PROVIDER_UNAVAILABLE),
    5: (Kind.PROVIDER_UNAVAILABLE, Kind.PROVIDER_UNAVAILABLE),
}


def failure(provider: str, said: Said) -> Kind:
    """Return what an answer that is none means."""
    for row, pattern in _ROWS[provider]:
        if row.statuses and said.status not in row.statuses:
            continue
        if pattern.search(getattr(said, row.where)):
            return row.kind
    unknown = (Kind.BAD_RESPONSE, Kind.BAD_RESPONSE)
    kinds = _STATUSES.get(said.status) or _CLASSES.get(said.status // 100, unknown)
    return kinds[0 if said.documented else 1]


_ANTHROPIC_STOPS: Final = (
    "https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons"
)
# https://developers.openai.com/api/reference/resources/chat (finish_reason), _ANTHROPIC_STOPS,
# https://ai.google.dev/api/generate-content#FinishReason and googleapis/python-genai types.py.
_ENDS: Final[Mapping[str, Mapping[str, Kind | None]]] = MappingProxyType(
    {
        "openai": {
            "stop": None,
            "length": Kind.TRUNCATED,
            "content_filter": Kind.REFUSED,
            # Not a finish_reason: the field that a refusal is written to.
            "refusal": Kind.REFUSED,
            "tool_calls": Kind.BAD_RESPONSE,
            "function_call": Kind.BAD_RESPONSE,
        },
        "anthropic": {
            "end_turn": None,
            "max_tokens": Kind.TRUNCATED,
            "refusal": Kind.REFUSED,
            # Prompt and answer together fill the context: less of a prompt leaves more room.
            "model_context_window_exceeded": Kind.CONTEXT_TOO_LONG,
            "stop_sequence": Kind.BAD_RESPONSE,
            "tool_use": Kind.BAD_RESPONSE,
            "pause_turn": Kind.BAD_RESPONSE,
        },
        "gemini": {
            "STOP": None,
            "MAX_TOKENS": Kind.TRUNCATED,
            "CONTINUATION": Kind.TRUNCATED,
            # Not a finishReason: promptFeedback.blockReason, whatever its value.
            "PROMPT_BLOCKED": Kind.REFUSED,
            **dict.fromkeys(
                (
                    *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT"),
                    *("SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
                    *("ESCALATION", "MODEL_ARMOR", "PUP_LIMITED_DISABLED"),
                ),
                Kind.REFUSED,
            ),
            **dict.fromkeys(
                (
                    *("FINISH_REASON_UNSPECIFIED", "OTHER", "IMAGE_OTHER", "NO_IMAGE"),
                    *("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"),
                    *("MISSING_THOUGHT_SIGNATURE", "MALFORMED_RESPONSE"),
                ),
                Kind.BAD_RESPONSE,
            ),
        },
    }
)


def end(provider: str, reason: str) -> Kind | None:
    """Return what a model's reason to stop means; None: the answer is whole.

    A reason that nobody published yet is a bad response: half an answer must not pass for one
    that found nothing.
    """
    return _ENDS[provider].get(reason, Kind.BAD_RESPONSE)
