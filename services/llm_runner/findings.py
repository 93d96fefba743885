"""Check a model's findings against the diff before anybody sees them.

A model's answer is untrusted: it may be wrong about lines, and a diff's author may have made it
say things. What is accepted here is short, is printable on a terminal, and names a line of the
diff.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.common.chunks import Chunk
from services.common.diff import Diff
from services.llm_runner.providers.findings import CATEGORIES, SEVERITIES

MAX_TITLE: Final = 200
MAX_TEXT: Final = 4000
"""Longest message and suggestion, in characters."""

MAX_FINDINGS: Final = 100
"""Most findings of one chunk: at their longest they still fit a gRPC message of 4 MiB."""

_ELLIPSIS: Final = "…"
# ECMA-48 control sequences, operating system commands and two-character escapes, so that no
# "[31m" stays behind once the escape character itself is gone.
_ESCAPE_SEQUENCE: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\x9d]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_BREAK: Final = re.compile(r"\r\n|[\u2028\u2029\x85]")
# Controls, invisible formatting (bidirectional overrides, tags), surrogates, private use.
_DROPPED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect. Lines count from 1 and lie in one hunk of the diff: in the new file, or in the
    old one where that hunk leaves no line of it."""

    path: str
    start_line: int
    end_line: int
    severity: str
    category: str
    title: str
    message: str
    suggestion: str
    old_side: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """Findings by path, line and severity (worst first), and the number of unusable ones."""

    findings: tuple[Finding, ...]
    dropped: int


def accept(raw: Sequence[object], diff: Diff, chunk: Chunk) -> Accepted:
    """Keep the findings that have the right shape and a line that the chunk's files changed.

    A finding must name a file of the chunk and start on a numbered line of one of its hunks; its
    end is moved into that hunk. Repeated findings count once, as the worst of them. Nothing in
    `raw` raises: what can't be used, or exceeds `MAX_FINDINGS`, is dropped and counted.
    """
    hunks = _hunks(diff, chunk)
    unique: dict[tuple[str, int, str, str], Finding] = {}
    dropped = 0
    for item in raw:
        finding = _finding(item, hunks)
        if finding is None:
            dropped += 1
            continue
        key = (finding.path, finding.start_line, finding.category, finding.title.casefold())
        unique[key] = min(unique.get(key, finding), finding, key=_order)
    worst = sorted(unique.values(), key=lambda finding: (_rank(finding), _order(finding)))
    kept = sorted(worst[:MAX_FINDINGS], key=_order)
    return Accepted(tuple(kept), dropped + len(worst) - len(kept))


def _hunks(diff: Diff, chunk: Chunk) -> Mapping[str, list[tuple[bool, range]]]:
    """Return the numbered lines of each file's hunks, and whether they are of the old side: those
    after the others, where one number is on both."""
    hunks: dict[str, list[tuple[bool, range]]] = {}
    for file in diff.files:
        if file.path in chunk.files:
            hunks.setdefault(file.path, []).extend(
                (not hunk.new_len, hunk.new_lines if hunk.new_len else hunk.old_lines)
                for hunk in file.hunks
            )
    return {path: sorted(found, key=lambda one: one[0]) for path, found in hunks.items()}


def _finding(item: object, hunks: Mapping[str, list[tuple[bool, range]]]) -> Finding | None:
    if not isinstance(item, dict):
        return None
    path, start, end = item.get("path"), item.get("start_line"), item.get("end_line")
    severity, category = item.get("severity"), item.get("category")
    title = _clean(item.get("title"), MAX_TITLE).replace("\n", " ").strip()
    message = _clean(item.get("message"), MAX_TEXT)
    # `type`, because a bool is an int.
    if not isinstance(path, str) or type(start) is not int or not (title and message):
        return None
    if severity not in SEVERITIES or category not in CATEGORIES:
        return None
    found = next((one for one in hunks.get(path, ()) if start in one[1]), None)
    if found is None:
        return None
    old_side, hunk = found
    end = min(max(start, end), hunk[-1]) if type(end) is int else start
    suggestion = _clean(item.get("suggestion"), MAX_TEXT)
    return Finding(path, start, end, severity, category, title, message, suggestion, old_side)


def _clean(value: object, limit: int) -> str:
    """Text without anything that a terminal obeys or a reader can't see; empty if not text."""
    if not isinstance(value, str):
        return ""
    text = _BREAK.sub("\n", _ESCAPE_SEQUENCE.sub("", value))
    text = "".join(
        c for c in text if c in "\n\t" or unicodedata.category(c) not in _DROPPED_CATEGORIES
    ).strip()
    return text if len(text) <= limit else text[: limit - 1].rstrip() + _ELLIPSIS


def _rank(finding: Finding) -> int:
    return -SEVERITIES.index(finding.severity)


def _order(finding: Finding) -> tuple[str, int, int, int, str, str, str, str]:
    return (
        finding.path,
        finding.start_line,
        _rank(finding),
        finding.end_line,
        finding.category,
        finding.title,
        finding.message,
        finding.suggestion,
    )
