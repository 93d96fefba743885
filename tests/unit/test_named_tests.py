"""docs/named-tests.md names each requirement once, and only tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

_TESTS = Path(__file__).resolve().parents[1]
_PAGE = _TESTS.parent / "docs" / "named-tests.md"
#: As many as the security and reliability requirements have.
_LAST = 59
_ROW = re.compile(r"\| (\d+) \| (.+?) \| (.+?) \| (.*?) ?\|")
_HELD = re.compile(r"`([^`]+)`")


class Row(NamedTuple):
    """A requirement, the tests that hold it, and what none holds."""

    number: int
    name: str
    held: list[str]
    missing: str


def rows(text: str) -> list[Row]:
    found = (_ROW.fullmatch(line) for line in text.splitlines())
    return [Row(int(row[1]), row[2], _HELD.findall(row[3]), row[4].strip()) for row in found if row]


def unknown(held: str, tests: Path = _TESTS) -> str:
    """Return what is wrong with `file::function`, or an empty text."""
    name, _, function = held.partition("::")
    file = tests / name
    if not file.is_file():
        return f"{held}: no such file"
    defined = {
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return "" if function in defined else f"{held}: no such function"


def test_each_number_stands_there_once() -> None:
    assert [row.number for row in rows(_PAGE.read_text())] == list(range(1, _LAST + 1))


def test_each_row_names_tests_or_says_what_is_missing() -> None:
    assert [row.name for row in rows(_PAGE.read_text()) if not row.held and not row.missing] == []


@pytest.mark.parametrize("row", rows(_PAGE.read_text()), ids=lambda row: f"{row.number}")
def test_each_named_test_is_there(row: Row) -> None:
    assert [why for held in row.held if (why := unknown(held))] == []


def test_a_test_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_b() -> None: ...\n")
    assert unknown("test_a.py::test_b", tmp_path) == ""
    assert unknown("test_a.py::test_c", tmp_path) == "test_a.py::test_c: no such function"
    assert unknown("test_d.py::test_b", tmp_path) == "test_d.py::test_b: no such file"


@pytest.mark.parametrize("page", ["threat-model.md", "security/claims.md"])
def test_each_test_that_a_page_names_is_there(page: str) -> None:
    """A file is named by its path, or by as much of it as tells which; `*` is what is several."""
    files = [file.relative_to(_TESTS).as_posix() for file in _TESTS.rglob("test_*.py")]
    text = (_PAGE.parent / page).read_text()
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)(?:::(\w+)`)?", text)
    assert named
    for name, function in named:
        (file,) = (each for each in files if f"/{each}".endswith(f"/{name}"))
        assert not function or unknown(f"{file}::{function}") == ""
