"""`python -m tests.sizes`: how many lines somebody has to read, held against pyproject.toml.

A number of `[tool.byokeep.sizes]` may only fall: more lines than that fail, and so does a number
that is two in a hundred above the lines that there are.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLACK = 1.02


def lines_of(group: dict) -> int:
    """Return how many lines a group has. Raises FileNotFoundError: a pattern is of no file."""
    without = [ROOT / folder for folder in group.get("without", ())]
    found = set()
    for pattern in group["files"]:
        paths = [one for one in ROOT.glob(pattern) if not any(map(one.is_relative_to, without))]
        if not paths:
            raise FileNotFoundError(pattern)
        found.update(paths)
    return sum(len(path.read_text().splitlines()) for path in found)


def verdict(lines: int, most: int) -> str:
    """Return what is wrong; empty where nothing is."""
    if lines > most:
        return f"{lines - most} more than the {most} that pyproject.toml has: make it smaller"
    if lines * SLACK < most:
        return f"pyproject.toml still has {most}: write {lines}"
    return ""


def main() -> None:
    """Print each group's lines; fail where one is wrong."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["byokeep"]["sizes"]
    wrong = False
    for name, group in groups.items():
        lines = lines_of(group)
        why = verdict(lines, group["lines"])
        wrong = wrong or bool(why)
        print(f"{name}: {lines} lines{f'; {why}' if why else ''}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
