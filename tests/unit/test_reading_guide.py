"""The auditors' reading guide leads through functions that are there, in their calls' order."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_CODE = _ROOT / "services" / "keyvault"
_PAGE = (_ROOT / "docs" / "audit-in-an-hour.md").read_text()
_STEP = re.compile(r"^\d+\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)\. ", re.MULTILINE)
_MOST_FILES, _MOST_LINES = 10, 1_200


class Step(NamedTuple):
    """A function of a file, and its source."""

    file: str
    name: str
    source: str


def source_of(file: str, name: str) -> str:
    """Return the source of a function, or of a class's method. Raises LookupError."""
    text = (_CODE / file).read_text()
    nodes: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [one for one in nodes if isinstance(one, kinds) and one.name == part]
        if len(found) != 1:
            raise LookupError(f"{file}: {name}")
        nodes = found[0].body
    return ast.get_source_segment(text, found[0]) or ""


def steps(heading: str) -> list[Step]:
    section = _PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    numbers = re.findall(r"^(\d+)\. ", section, re.MULTILINE)
    found = _STEP.findall(section)
    assert numbers == [str(number) for number in range(1, len(found) + 1)]
    return [
        Step(file, name, source_of(file, name))
        for file, names in found
        for name in re.findall(r"[\w.]+", names)
    ]


def unled(path: list[Step]) -> list[str]:
    """Return the steps that none before them names, by function or by module."""
    before, missing = "", []
    for step in path:
        words = set(re.findall(r"\w+", before))
        if before and not {step.name.rpartition(".")[2], Path(step.file).stem} & words:
            missing.append(step.name)
        before += step.source
    return missing


@pytest.mark.parametrize(("heading", "least"), [("A lease", 25), ("An intake", 11)])
def test_each_step_is_there_and_one_before_it_leads_to_it(heading, least):
    path = steps(heading)
    assert len(path) >= least
    assert unled(path) == []


def test_a_lease_is_read_in_ten_files_and_as_many_lines_as_the_page_says():
    path = steps("A lease")
    assert len({step.file for step in path}) <= _MOST_FILES
    lines = sum(len(source.splitlines()) for source in {step.source for step in path})
    told = re.search(r"^Fewer than ([\d,]+) lines in ten files", _PAGE, re.MULTILINE)
    assert told
    assert lines < int(told[1].replace(",", "")) <= _MOST_LINES


def test_a_step_that_is_not_there_or_that_nothing_leads_to_is_found():
    with pytest.raises(LookupError):
        source_of("lease.py", "Leasing.gone")
    path = steps("A lease")
    assert unled([path[0], path[-1]]) == [path[-1].name]
