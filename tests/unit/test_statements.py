"""Statements of services outlive a migration that adds a column (docs/operations.md, Upgrade)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_SERVICES = Path(__file__).resolve().parents[2] / "services"
_INNER = re.compile(r"\([^()]*\)")
# Whatever a function of ours gives has the columns that the statement names.
_ALL = re.compile(
    r"(SELECT|RETURNING|,)\s+(\w+\.)?\*(?!\s+FROM\s+(unnest|json_to_recordset))", re.I
)


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (one.value if isinstance(one, ast.Constant) else "x" for one in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _gives_all_columns(text: str) -> bool:
    """Whether a statement's own result, not that of a part of it, is every column there is."""
    before = ""
    while text != before:
        before, text = text, _INNER.sub("", text)
    return bool(_ALL.search(text))


def test_no_statement_gives_whatever_columns_there_are():
    """PostgreSQL fails a prepared statement whose result changes its type, on each connection that
    prepared it, for as long as that lives."""
    found = [
        f"{path.relative_to(_SERVICES)}: {text.strip()[:60]}"
        for path in sorted(_SERVICES.rglob("*.py"))
        if "migrations" not in path.parts
        for text in texts(ast.parse(path.read_text()))
        if re.search(r"\b(SELECT|RETURNING)\b", text) and _gives_all_columns(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("statement", "is_one"),
    [
        ("SELECT * FROM review", True),
        ("WITH r AS (INSERT INTO a VALUES (1) RETURNING *) SELECT r.*, 1 FROM r", True),
        ("UPDATE review SET a = b * 2 RETURNING id, *", True),
        ("WITH r AS (SELECT * FROM attempt) SELECT id, count(*) FROM r", False),
        ("INSERT INTO leaf SELECT * FROM unnest(%s::bigint[])", False),
    ],
)
def test_it_is_told_from_others(statement, is_one):
    assert _gives_all_columns(statement) == is_one
