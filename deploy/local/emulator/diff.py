"""Reads the annotated diff that a review prompt holds between ``<diff>`` and ``</diff>``.

``### path`` opens a file; then ``    12 +added``, ``    13  context``, ``       -removed``,
numbered by the new file's lines; ``     … +`` goes on with the line above. Whatever doesn't fit is
skipped: nothing here raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_NUMBERED: Final = re.compile(r" *(\d{1,9}|…) ([+ ])(.*)", re.DOTALL)
# Longer ones would make patterns slow: their two ends are looked at.
_MAX_LINE: Final = 2000


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the new file, or a part of one."""

    number: int
    added: bool
    text: str


@dataclass(frozen=True, slots=True)
class FileDiff:
    """The lines of one file's new side that the diff shows, in order."""

    path: str
    lines: list[Line]


def parse(prompt: str) -> list[FileDiff]:
    """Return the files of the last diff in the prompt; none if there is no diff."""
    files: list[FileDiff] = []
    for raw in _diff_lines(prompt):
        if raw.startswith("### "):
            files.append(FileDiff(raw[4:].strip(), []))
        elif files and (match := _NUMBERED.fullmatch(raw)):
            shown, sign, text = match.groups()
            lines = files[-1].lines
            number = int(shown) if shown != "…" else lines[-1].number if lines else 0
            lines.append(Line(number, sign == "+", text[:_MAX_LINE]))
            if len(text) > _MAX_LINE:
                lines.append(Line(number, sign == "+", text[_MAX_LINE:][-_MAX_LINE:]))
    return files


def _diff_lines(prompt: str) -> list[str]:
    # Only "\n" ends a line: a form feed inside the code does not.
    lines = prompt.split("\n")
    marks = [i for i, line in enumerate(lines) if line.strip() in ("<diff>", "</diff>")]
    for start, end in zip(reversed(marks[:-1]), reversed(marks[1:]), strict=True):
        if lines[start].strip() == "<diff>" and lines[end].strip() == "</diff>":
            return [line.removesuffix("\r") for line in lines[start + 1 : end]]
    return []
