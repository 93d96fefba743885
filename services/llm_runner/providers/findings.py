"""The shape of a review's answer: one schema for all providers, and its check."""

from __future__ import annotations

import json
from typing import Any, Final

from services.llm_runner.providers.errors import FailureKind, ProviderError

SEVERITIES: Final = ("info", "low", "medium", "high", "critical")
CATEGORIES: Final = ("security", "correctness", "performance", "maintainability", "style")

_PROPERTIES: Final[dict[str, dict[str, Any]]] = {
    "path": {"type": "string", "description": "File path exactly as the diff names it."},
    "start_line": {"type": "integer", "description": "First line, as numbered in the diff."},
    "end_line": {"type": "integer", "description": "Last line, as numbered in the diff."},
    "severity": {"type": "string", "enum": list(SEVERITIES)},
    "category": {"type": "string", "enum": list(CATEGORIES)},
    "title": {"type": "string", "description": "One short line, at most 80 characters."},
    "message": {"type": "string", "description": "What is wrong and why it matters."},
    "suggestion": {"type": "string", "description": "What to do instead; empty if unclear."},
}

# Only keywords that all three strict modes accept: no length or range limits.
FINDINGS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "findings": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": _PROPERTIES,
                "required": list(_PROPERTIES),
                "additionalProperties": False,
            },
        }
    },
    "required": ["findings"],
    "additionalProperties": False,
}


def load_json(text: str | bytes) -> object:
    """Parse JSON, or return None for anything that isn't JSON.

    The parser's exceptions hold the whole document, so none leaves this function.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_findings(text: str) -> list[dict[str, Any]]:
    """Return the findings in a model's answer text.

    Raises ProviderError(BAD_RESPONSE) unless the text is a JSON object of exactly the
    shape of FINDINGS_SCHEMA. Whether a line is in the diff is the caller's to check.
    """
    document = load_json(text)
    if isinstance(document, dict) and document.keys() == {"findings"}:
        findings = document["findings"]
        if isinstance(findings, list) and all(_is_finding(item) for item in findings):
            return findings
    raise ProviderError(FailureKind.BAD_RESPONSE, http_status=200)


def _is_finding(item: object) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == _PROPERTIES.keys()
        and all(_fits(item[name], rule) for name, rule in _PROPERTIES.items())
    )


def _fits(value: object, rule: dict[str, Any]) -> bool:
    if rule["type"] == "integer":
        return type(value) is int  # bool is an int in Python, not in JSON
    return isinstance(value, str) and value in rule.get("enum", (value,))
