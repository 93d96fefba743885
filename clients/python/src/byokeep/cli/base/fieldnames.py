"""Refused fields of a request, told by the option or argument that was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping

_TYPED: Mapping[str, tuple[str, str]] = {
    "caller.spiffe_id": (
        "SPIFFE_ID",
        "takes one of this deployment's own trust domain, as byokeep caller list and doctor show",
    ),
    "filter": ("the options", ""),
    "filter.pull_request": ("--pr", ""),
    "filter.repository": ("--repo", "takes OWNER/NAME"),
    "filter.states": ("--state", ""),
    "filter.submitted_after": ("--since", ""),
    "filter.submitted_before": ("--before", ""),
    "filter.user": ("--user", "takes letters, digits and . _ @ + -"),
    "display_name": ("--name", "takes 1 to 64 letters, digits, dots, hyphens and underscores"),
    "input.context_files": ("--context", ""),
    "input.description": ("--description", ""),
    "input.diff": ("the diff", ""),
    "input.guidance": ("--guidance", ""),
    "input.head_commit": ("--head", "takes 7 to 64 hexadecimal digits, in lower case"),
    "input.key": ("--key", ""),
    "input.model": ("--model", "takes PROVIDER/MODEL"),
    "input.pull_request": ("--pr", ""),
    "input.repository": ("--repo", "takes OWNER/NAME"),
    "input.title": ("--title", ""),
    "input.user": ("--user", "takes letters, digits and . _ @ + -"),
    "key": ("KEY", "takes one of the tenant's own keys, that has not ended"),
    "key_id": ("KEY_ID", "takes the id that the step before printed"),
    "lease_id": ("LEASE", "takes a lease's id, as byokeep key trail shows it"),
    "page_size": ("--limit", ""),
    "path_pattern": ("--path", "takes a pattern such as services/pay/*"),
    "plan": ("PLAN", ""),
    "reason": ("--reason", ""),
    "repository": ("--repo", "takes OWNER/NAME"),
    "repository_pattern": ("--repo", "takes a pattern such as acme/*"),
    "request_id": ("--request-id", "takes 8 to 64 letters, digits, hyphens and underscores"),
    "settings.default_model": ("PROVIDER/MODEL", "looks like openai/gpt-6.1-terra"),
    "settings.fallback_models": ("PROVIDER/MODEL", "looks like openai/gpt-6.1-terra"),
    "settings.max_calls_per_day": ("--max-calls-per-day", ""),
    "settings.max_calls_per_review": ("--max-calls-per-review", ""),
    "settings.max_diff_bytes": ("--max-diff-bytes", ""),
    "settings.max_reviews_per_day": ("--max-reviews-per-day", ""),
    "target_backend": ("--to", "takes the name of a KEK backend"),
    "tenant": ("TENANT", "takes lower-case letters, digits and hyphens"),
    "user": ("--user", "takes letters, digits and . _ @ + -"),
}


def said_of(field: str, message: str) -> str:
    """Return the server's sentence on a field of a request, in the words of the command line.

    A pattern is told as what it takes; a field that nothing on the command line sets, as it is.
    """
    name = re.sub(r"\[[^]]*\]", "", field)
    while name and name not in _TYPED:
        name = name.rpartition(".")[0]
    said = message.removeprefix(f"{field}: ")
    typed, takes = _TYPED.get(name, (field, ""))
    if "regex" in said or "expected" in said:
        said = takes or "has a form that it can't have"
    return f"{typed} {said}".strip()
