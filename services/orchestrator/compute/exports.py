"""Forms of a review that has ended: text for people, SARIF 2.1.0, a GitHub review.

A finding's words come from a model that read somebody's diff: they are data. So
control characters go, and Markdown keeps nothing but code of theirs: no mention, no
reference to an issue, no link, no image that a reader's browser would load.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar
from urllib.parse import quote

from byokeep.loglines import disarmed
from byokeep.orchestrator.v1.review_pb2 import (
    Category,
    DiffSide,
    Finding,
    Review,
    ReviewState,
    Severity,
    UnreadReason,
)

T = TypeVar("T")
#: Most bytes of an export's findings: what a service sends and GitHub takes in one message.
MAX_BYTES: Final = 8 * 1024 * 1024
_TEXT = "text/plain; charset=utf-8"
_SARIF = "application/sarif+json"
_JSON = "application/json"

_SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_ROOT = "%SRCROOT%"
_CATEGORIES = {
    Category.CATEGORY_UNSPECIFIED: ("other", "Something else about the change."),
    Category.CATEGORY_SECURITY: ("security", "The change can be attacked."),
    Category.CATEGORY_CORRECTNESS: ("correctness", "The change does the wrong thing."),
    Category.CATEGORY_PERFORMANCE: ("performance", "The change is slower or larger than it must."),
    Category.CATEGORY_MAINTAINABILITY: ("maintainability", "The change makes code hard to change."),
    Category.CATEGORY_STYLE: ("style", "The change reads badly."),
}
_SEVERITIES = {
    Severity.SEVERITY_CRITICAL: "critical",
    Severity.SEVERITY_HIGH: "high",
    Severity.SEVERITY_MEDIUM: "medium",
    Severity.SEVERITY_LOW: "low",
    Severity.SEVERITY_INFO: "info",
}
_UNREAD = {
    UnreadReason.UNREAD_REASON_BINARY: "binary file",
    UnreadReason.UNREAD_REASON_SUBMODULE: "submodule: commits of another repository",
    UnreadReason.UNREAD_REASON_POINTER: "pointer of Git LFS or git-annex: its content is elsewhere",
    UnreadReason.UNREAD_REASON_NOT_SHOWN: "named in the diff without its text",
}
_LEVELS = {"critical": "error", "high": "error", "medium": "warning", "low": "note", "info": "note"}
# GitHub's bands: critical above 9, high from 7, medium from 4, low from 0.1
# (https://docs.github.com/code-security/reference/code-scanning/sarif-support).
_SECURITY_SCORES = {"critical": "9.5", "high": "8.0", "medium": "5.5", "low": "2.0", "info": "0.1"}

# GitHub takes 65,536 characters a comment; Markdown escapes at most triple a text, and
# a comment has two of them beside its title.
_MAX_WORDS = 8_000
_MAX_TITLE = 500
# Unread parts that a text names: GitHub takes 65,536 characters, and a path may have 1,024 bytes.
_MAX_NAMED = 20

_ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS
    r"|\x1b[ -/]*[0-~]"
)
_JOINERS = "\u200c\u200d"  # part of how some scripts and emoji are written
_SEEN = frozenset(string.printable[:95] + "\n" + _JOINERS)
_FENCE = re.compile(r"^ *```[^`\n]*$", re.MULTILINE)
_INDENT = re.compile(r"\n +")
_SPAN = re.compile(r"`([^`\n]++)`")
_PUNCTUATION = str.maketrans({mark: f"\\{mark}" for mark in string.punctuation})
# What GitHub turns into a mention, a reference or a link, once it is escaped.
_ACTIVE = re.compile(r"(\\[@#](?=\w)|\bGH\\-(?=\d)|\\:(?=\\/\\/)|\bwww(?=\\\.))", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def text(review: Review) -> tuple[str, str]:
    """Return a review for people to read, without control characters and what a CI run takes for a
    command, and its media type."""
    findings, cut = _rendered(review.findings, _paragraph, len)
    lines = [_headline(review), *_notes(review), *cut, *findings]
    return disarmed("\n".join(lines)) + "\n", _TEXT


def sarif(review: Review) -> tuple[str, str]:
    """Return a review as SARIF 2.1.0 (OASIS standard), and its media type.

    A rule is a category; the security rules are also one a severity, since GitHub
    reads `security-severity` from rules. GitHub adds its own fingerprint of the
    line where its upload action finds the source. What no model read, and that a
    review failed, are notifications: as results they would be alerts about code.
    """
    rules = sorted({_rule_id(finding) for finding in review.findings})
    seen: Counter[str] = Counter()
    results, cut = _rendered(
        review.findings, lambda finding: _result(finding, rules, seen), _json_bytes
    )
    run = {
        "tool": {"driver": {"name": "byokeep", "rules": [_rule(rule) for rule in rules]}},
        "automationDetails": {"id": "byokeep/"},
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The root of the repository."}}},
        "invocations": [
            {
                "executionSuccessful": review.state == ReviewState.REVIEW_STATE_COMPLETED,
                "toolExecutionNotifications": _notifications(review),
            }
        ],
        "results": results,
    }
    if cut:
        run["properties"] = {"notes": cut}
    log = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2) + "\n", _SARIF


def github(review: Review) -> tuple[str, str]:
    """Return the body of GitHub's "create a review for a pull request", and its media type.

    Source: https://docs.github.com/rest/pulls/reviews. It comments, and neither
    approves nor requests changes: that is people's to do.
    """
    comments, cut = _rendered(review.findings, _comment, _json_bytes)
    body: dict[str, object] = {
        "event": "COMMENT",
        "body": "\n\n".join(_prose(line) for line in [_headline(review), *_notes(review), *cut]),
        "comments": comments,
    }
    if _COMMIT.fullmatch(review.head_commit):
        body["commit_id"] = review.head_commit
    return json.dumps(body, indent=2) + "\n", _JSON


def _rendered(
    findings: Sequence[Finding], render: Callable[[Finding], T], size: Callable[[T], int]
) -> tuple[list[T], list[str]]:
    """Return findings in their form and order, the worst of them where all are too many bytes,
    and then a note that says so."""
    room, kept = MAX_BYTES, {}
    for at in sorted(range(len(findings)), key=lambda at: -findings[at].severity):
        form = render(findings[at])
        room -= size(form)
        if room < 0:
            break
        kept[at] = form
    left_out = len(findings) - len(kept)
    cut = (
        [
            f"Left out, for the export would be too large: {left_out} findings, none worse than"
            " those that are here"
        ]
        if left_out
        else []
    )
    return [kept[at] for at in sorted(kept)], cut


def _json_bytes(form: object) -> int:
    return len(json.dumps(form, indent=2))


def _paragraph(finding: Finding) -> str:
    lines = [
        "",
        f"{_place(finding)}: {_severity(finding)}, {_category(finding)}: {_line(finding.title)}",
    ]
    lines += [f"    {line}".rstrip() for line in _clean(finding.message).split("\n")]
    if finding.suggestion.strip():
        first, *rest = _clean(finding.suggestion).split("\n")
        lines += [f"    Suggestion: {first}", *(f"    {line}".rstrip() for line in rest)]
    return "\n".join(lines)


def _headline(review: Review) -> str:
    what = review.repository + (f" #{review.pull_request}" if review.pull_request else "")
    if review.head_commit:
        what += f" at {review.head_commit[:12]}"
    return _line(f"Review of {what} by byokeep with {review.model}: {_count(review.findings)}")


def _count(findings: Iterable[Finding]) -> str:
    counts = Counter(_severity(finding) for finding in findings)
    if not counts:
        return "no findings"
    total = counts.total()
    parts = ", ".join(f"{counts[name]} {name}" for name in _SEVERITIES.values() if counts[name])
    return f"{total} finding{'s' if total > 1 else ''} ({parts})"


def _notes(review: Review) -> list[str]:
    notes = []
    if review.state != ReviewState.REVIEW_STATE_COMPLETED:
        state = ReviewState.Name(review.state).removeprefix("REVIEW_STATE_").lower()
        notes.append(
            _line(f"The review is {state}; findings are not whole. {review.failure_message}")
        )
    if review.dropped_findings:
        notes.append(f"Dropped, for they named no line of the diff: {review.dropped_findings}")
    unread = [f"{_line(part.path)} ({_why(part.reason)})" for part in review.unread[:_MAX_NAMED]]
    notes += _named("Read by no model", unread, review.unread_count)
    skipped = [_line(path) for path in review.skipped_files[:_MAX_NAMED]]
    notes += _named("Without a changed line, so not read", skipped, review.skipped_count)
    return notes


def _named(what: str, shown: list[str], number: int) -> list[str]:
    if not number:
        return []
    more = [f"- and {number - len(shown)} more"] if number > len(shown) else []
    return [f"{what}: {number}", *(f"- {one}" for one in shown), *more]


def _why(reason: UnreadReason.ValueType) -> str:
    return _UNREAD.get(reason, "no reason given")


def _notifications(review: Review) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [
        {
            "level": "warning",
            "message": {"text": f"Read by no model: {_why(part.reason)}"},
            "locations": [{"physicalLocation": {"artifactLocation": _artifact(part.path)}}],
        }
        for part in review.unread
    ]
    found += [
        {
            "level": "note",
            "message": {"text": "No line is changed, so nothing was read"},
            "locations": [{"physicalLocation": {"artifactLocation": _artifact(path)}}],
        }
        for path in review.skipped_files
    ]
    if review.unread_count > len(review.unread):
        more = review.unread_count - len(review.unread)
        found.append({"level": "warning", "message": {"text": f"Read by no model: {more} more"}})
    if review.state != ReviewState.REVIEW_STATE_COMPLETED:
        state = ReviewState.Name(review.state).removeprefix("REVIEW_STATE_").lower()
        said = _line(f"The review is {state}. {review.failure_message}")
        found.append({"level": "error", "message": {"text": said}})
    return found


def _artifact(path: str) -> dict[str, str]:
    # A leading "/" would make it a place on the disk or another host.
    return {"uri": quote(path.lstrip("/"), safe="/"), "uriBaseId": _ROOT}


def _result(finding: Finding, rules: list[str], seen: Counter[str]) -> dict[str, object]:
    rule, severity = _rule_id(finding), _severity(finding)
    first, last = _lines(finding)
    identity = json.dumps([finding.path, rule, _line(finding.title).casefold()])
    seen[identity] += 1
    fingerprint = hashlib.sha256(f"{identity}{seen[identity]}".encode()).hexdigest()
    properties = {"category": _category(finding), "severity": severity}
    if finding.category == Category.CATEGORY_SECURITY:
        properties["security-severity"] = _SECURITY_SCORES[severity]
    place: dict[str, object] = {"artifactLocation": _artifact(finding.path)}
    words = _message(finding)
    if _is_old(finding):
        # A region would be one of the file as it is now, if there is one.
        properties["place"] = _place(finding)
        words = f"At {_place(finding)}: {words}"
    else:
        place["region"] = {"startLine": first, "endLine": last}
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": _LEVELS[severity],
        "message": {"text": words},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"byokeep/v1": fingerprint},
        "properties": properties,
    }


def _rule(rule: str) -> dict[str, object]:
    name, _, severity = rule.partition("/")
    description = next(about for known, about in _CATEGORIES.values() if known == name)
    properties: dict[str, object] = {"tags": [name]}
    if severity:
        properties["security-severity"] = _SECURITY_SCORES[severity]
    return {
        "id": rule,
        "name": "".join(part.capitalize() for part in rule.split("/")),
        "shortDescription": {"text": description},
        "fullDescription": {"text": description},
        "help": {"text": "A model's finding: judge it before you act on it."},
        "properties": properties,
    }


def _rule_id(finding: Finding) -> str:
    category = _category(finding)
    if finding.category == Category.CATEGORY_SECURITY:
        return f"{category}/{_severity(finding)}"
    return category


def _message(finding: Finding) -> str:
    parts = [_line(finding.title), _clean(finding.message)]
    if finding.suggestion.strip():
        parts.append(f"Suggestion: {_clean(finding.suggestion)}")
    # SARIF 3.11.6: "[text](target)" would be a link.
    return re.sub(r"\]\(", "] (", "\n\n".join(part for part in parts if part)) or "(no text)"


def _comment(finding: Finding) -> dict[str, object]:
    first, last = _lines(finding)
    title = _prose(_cut(_line(finding.title), _MAX_TITLE))
    head = f"**{_severity(finding)}, {_category(finding)}: {title}**"
    parts = [head, _markdown(finding.message)]
    if finding.suggestion.strip():
        # Not a "suggestion" block: it is advice, not lines that a button may commit.
        parts.append(f"Suggestion:\n\n{_markdown(finding.suggestion)}")
    side = "LEFT" if _is_old(finding) else "RIGHT"
    comment: dict[str, object] = {"path": finding.path, "line": last, "side": side}
    if first != last:
        comment |= {"start_line": first, "start_side": side}
    return comment | {"body": "\n\n".join(part for part in parts if part)}


def _markdown(raw: str) -> str:
    """Escape all Markdown but code spans and fenced code, which are rebuilt.

    What it returns must begin a line: it may begin with a fence.
    """
    pieces = _FENCE.split(_cut(_clean(raw), _MAX_WORDS))
    # As Markdown has it, a fence that nobody closed runs to the end.
    return "".join(
        _fenced(piece) if number % 2 else _prose(piece) for number, piece in enumerate(pieces)
    )


def _fenced(code: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    inner = code.strip("\n")
    return f"{fence}\n{inner}\n{fence}"


def _prose(source: str) -> str:
    # Every second piece is what stands between two backticks.
    pieces = _SPAN.split(source)
    return "".join(
        f"`{piece}`" if number % 2 else _escape(piece) for number, piece in enumerate(pieces)
    )


def _escape(prose: str) -> str:
    # Indentation would make code, where the backslashes show.
    escaped = _INDENT.sub("\n", prose).translate(_PUNCTUATION)
    # GitHub looks for names and numbers in what is rendered, behind the backslash. One character
    # is no name, and there may be thousands of such pieces.
    return _ACTIVE.sub("\\1\u200b", escaped) if len(prose) > 1 else escaped


def _clean(raw: str) -> str:
    """Remove terminal sequences, control and invisible characters but newlines."""
    plain = _ANSI.sub("", raw.replace("\r\n", "\n").replace("\r", "\n"))
    plain = "\n".join(line.rstrip() for line in plain.replace("\t", "    ").split("\n")).strip()
    # Each character is looked up once, however often it stands there.
    unseen = {ord(char) for char in set(plain) - _SEEN if _invisible(char)}
    return plain.translate(dict.fromkeys(unseen)) if unseen else plain


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _line(raw: str) -> str:
    return " ".join(_clean(raw).split())


def _place(finding: Finding) -> str:
    first, last = _lines(finding)
    place = f"{_line(finding.path)}:{first}" + (f"-{last}" if last != first else "")
    return f"{place} before the change" if _is_old(finding) else place


def _is_old(finding: Finding) -> bool:
    return finding.side == DiffSide.DIFF_SIDE_OLD


def _lines(finding: Finding) -> tuple[int, int]:
    first = max(1, finding.start_line)
    return first, max(first, finding.end_line)


def _severity(finding: Finding) -> str:
    return _SEVERITIES.get(finding.severity, "info")


def _category(finding: Finding) -> str:
    return _CATEGORIES.get(finding.category, _CATEGORIES[Category.CATEGORY_UNSPECIFIED])[0]
