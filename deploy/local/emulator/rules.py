"""The emulator's review: a handful of plain rules for real classes of defect.

Not a reviewer, only something that finds true lines in a true diff.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from deploy.local.emulator.diff import FileDiff, Line, parse
from deploy.local.emulator.rulebook import RULES, Rule

MAX_FINDINGS: Final = 200
_STATEMENT_LINES: Final = 10
_COMMENT: Final = re.compile(r"\s*(#(?!\[)|//|/?\*|--)")
_STRING: Final = re.compile(
    r"""(?P<prefix>\b[fF][rR]?|\b[rRbBuU]{1,2})?(?P<quote>["'`])(?P<body>(?:\\.|(?!(?P=quote)).)*)(?P=quote)"""
)
_HOLE: Final = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class _Place:
    """An added line, with what follows it in the new file."""

    line: Line
    statement: str
    last_number: int
    next_text: str


def review(prompt: str) -> list[dict[str, Any]]:
    """Return findings on added lines, each of the shape of a review's findings."""
    findings: list[dict[str, Any]] = []
    for file in parse(prompt):
        rules = _rules_for(file)
        for index, line in enumerate(file.lines):
            hits = _hits(rules, line.text) if line.added else ()
            if not hits:
                continue
            place = _place(file.lines, index)
            findings += (_finding(file.path, place, r) for r in hits if _applies(r, place))
            if len(findings) >= MAX_FINDINGS:
                return findings[:MAX_FINDINGS]
    return findings


def _rules_for(file: FileDiff) -> list[Rule]:
    suffix = PurePosixPath(file.path).suffix.lower()
    rules = [rule for rule in RULES if rule.suffixes is None or suffix in rule.suffixes]
    return _hits(rules, "\n".join(line.text for line in file.lines if line.added))


def _hits(rules: list[Rule], text: str) -> list[Rule]:
    lowered = text.lower()
    return [rule for rule in rules if any(needle in lowered for needle in rule.needles)]


def _place(lines: list[Line], index: int) -> _Place:
    line, following = lines[index], _adjacent(lines, index)
    parts, depth, last = [line.text], _depth(line.text), line.number
    for later in following:
        if depth <= 0:
            break
        parts.append(later.text)
        depth += _depth(later.text)
        last = later.number
    if depth > 0:  # the end is out of sight: judge the line alone
        parts, last = parts[:1], line.number
    return _Place(line, "\n".join(parts), last, following[0].text if following else "")


def _adjacent(lines: list[Line], index: int) -> list[Line]:
    following = lines[index + 1 : index + 1 + _STATEMENT_LINES]
    expected = range(lines[index].number + 1, lines[index].number + 1 + len(following))
    return [line for line, number in zip(following, expected, strict=True) if line.number == number]


def _depth(text: str) -> int:
    return text.count("(") - text.count(")")


def _applies(rule: Rule, place: _Place) -> bool:
    text = place.statement if rule.whole_statement else place.line.text
    if not rule.comments and _COMMENT.match(text):
        return False
    if rule.outside_strings:
        text = _without_strings(text)
    if not rule.pattern.search(text):
        return False
    if rule.unless is not None and rule.unless.search(text):
        return False
    if rule.also is not None and not rule.also.search(text):
        return False
    return rule.then is None or rule.then.search(place.next_text) is not None


def _without_strings(text: str) -> str:
    """Drop the text of string literals, but keep what is interpolated into them."""

    def holes(match: re.Match[str]) -> str:
        interpolates = "f" in (match["prefix"] or "").lower() or match["quote"] == "`"
        return " ".join(_HOLE.findall(match["body"])) if interpolates else " "

    return _STRING.sub(holes, text)


def _finding(path: str, place: _Place, rule: Rule) -> dict[str, Any]:
    return {
        "path": path,
        "start_line": place.line.number,
        "end_line": place.last_number if rule.whole_statement else place.line.number,
        "severity": rule.severity,
        "category": rule.category,
        "title": rule.title,
        "message": f"{rule.message} [emulator rule {rule.name}]",
        "suggestion": rule.suggestion,
    }
