"""Mutants of the trust core that nobody thought of: each place where an operator of its kind can be
turned over, in an order that a seed gives."""

from __future__ import annotations

import ast
import random
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tests.mutants.table import Mutant

ROOT = Path(__file__).resolve().parents[2]
#: What is to notice, the fastest first.
_TESTS = (
    "tests/unit/test_lifecycle.py",
    "tests/unit/test_merkle.py",
    "tests/security/test_envelope.py",
    "tests/security/test_core_rules.py",
    "tests/security/test_core_regressions.py",
    "tests/security/test_grants.py",
    "tests/security/test_rogue_orchestrator.py",
    "tests/security/test_intake.py",
    "tests/security/test_rotate_live.py",
    "tests/security/test_holds.py",
    "tests/security/test_lease_faults.py",
    "tests/component/test_keyvault.py",
    "tests/component/test_keyvault_changes.py",
)
_COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
# Whoever reads a log may miss a line; nothing else follows from it.
_UNHELD = ("logs.", "tracing.")


def mutants(seed: int) -> list[Mutant]:
    """Return every mutant, in a seed's order."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["byokeep"]["sizes"]
    found = [one for file in files["trust-core"]["files"] for one in _of(file)]
    random.Random(seed).shuffle(found)
    return found


def _of(file: str) -> Iterator[Mutant]:
    text = (ROOT / file).read_text()
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()
    for node in ast.walk(ast.parse(text)):
        for what, start, end, new in _changes(node, starts, raw):
            changed = raw[:start] + new.encode() + raw[end:]
            line = raw.count(b"\n", 0, start)
            place = f"line {line + 1}, {what}: {lines[line].strip()}"
            yield Mutant(place, file, text, changed.decode(), _TESTS)


def _changes(node: ast.AST, starts: list[int], raw: bytes) -> Iterator[tuple[str, int, int, str]]:
    """Yield (what is done, start, end, what stands there then) of what can be turned over."""

    def at(line: int | None, column: int | None) -> int:
        assert line is not None
        assert column is not None
        return starts[line - 1] + column

    if isinstance(node, ast.Compare):
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            start, end = (
                at(left.end_lineno, left.end_col_offset),
                at(right.lineno, right.col_offset),
            )
            # A bracket around a side stays where it is.
            between = raw[start:end].decode()
            core = between.strip(" ()\n")
            new = between.replace(core, _COMPARISONS[type(operator)], 1)
            yield f"{core} is {_COMPARISONS[type(operator)]}", start, end, new
            left = right
    elif isinstance(node, ast.BoolOp):
        word, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for one, two in pairwise(node.values):
            start, end = at(one.end_lineno, one.end_col_offset), at(two.lineno, two.col_offset)
            between = raw[start:end].decode()
            yield f"{word} is {new}", start, end, between.replace(word, new, 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        start, end = (
            at(node.lineno, node.col_offset),
            at(node.operand.lineno, node.operand.col_offset),
        )
        yield "no not", start, end, raw[start + 3 : end].decode().lstrip(" ")
    elif isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr)
        and not isinstance(node.value, ast.Constant | ast.Yield)
        and not ast.unparse(node).startswith(_UNHELD)
    ):
        start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        yield "left out", start, end, "pass"
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Constant):
        start = at(node.value.lineno, node.value.col_offset)
        end = at(node.value.end_lineno, node.value.end_col_offset)
        if isinstance(node.value.value, bool):
            yield "the other answer", start, end, str(not node.value.value)
