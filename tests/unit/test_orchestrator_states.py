"""States are named once: as the protos name them, and no statement has a name of its own."""

from __future__ import annotations

import ast
import re
from enum import StrEnum
from pathlib import Path

import pytest
from byokeep.orchestrator.v1 import key_pb2, review_pb2, tenant_pb2

from services.orchestrator.policy import states
from tests.unit.test_statements import texts

_STORE = Path("services/orchestrator/store")


@pytest.mark.parametrize(
    ("ours", "proto", "prefix"),
    [
        (states.TenantState, tenant_pb2.TenantState, "TENANT_STATE_"),
        (states.ReviewState, review_pb2.ReviewState, "REVIEW_STATE_"),
        (states.AttemptState, review_pb2.AttemptState, "ATTEMPT_STATE_"),
        (states.Verdict, key_pb2.ValidationVerdict, "VALIDATION_VERDICT_"),
        (states.Fallback, review_pb2.ModelFallback, "MODEL_FALLBACK_"),
        (states.Reason, review_pb2.FailureReason, "FAILURE_REASON_"),
    ],
)
def test_they_are_those_of_the_protos(ours: type[StrEnum], proto, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name in proto.keys()}  # noqa: SIM118 - no mapping
    assert {str(one) for one in ours} - {""} | {"UNSPECIFIED"} == names | {"UNSPECIFIED"}


# Columns by what they hold, as statements call them: `state` is an attempt's or a review's.
_COLUMNS: dict[str, set[str]] = {
    "state": {*states.TenantState, *states.ReviewState, *states.AttemptState},
    "kind": {*states.AttemptKind},
    "verdict": {*states.Verdict},
    "action": {*states.Action},
    "reason": {*states.Reason},
    "wait_reason": {*states.Reason},
    "failure": {*states.Reason},
    "model_fallback": {*states.Fallback},
}
_COMPARED = re.compile(r"(\w+)\s*(?:=|<>|(?:NOT )?IN \()\s*('\w*'(?:, '\w*')*)")
_WORD = re.compile(r"'([A-Z][A-Z_]+)'")


def _unknown(statement: str) -> list[str]:
    """Return what a statement calls a state, and is none of its column's."""
    found = [
        f"{column}: {value}"
        for column, values in _COMPARED.findall(statement)
        for value in re.findall(r"'(\w*)'", values)
        if value and value not in _COLUMNS.get(column, {value})
    ]
    every = set().union(*_COLUMNS.values())
    return found + [word for word in _WORD.findall(statement) if word not in every | {"TURN"}]


def test_no_statement_has_a_state_that_is_none() -> None:
    statements = [
        text
        for path in _STORE.glob("*.py")
        for text in texts(ast.parse(path.read_text()))
        if re.search(r"\b(SELECT|INSERT|UPDATE|DELETE|WHERE|state|kind)\b", text)
    ]
    assert sum(len(_WORD.findall(text)) for text in statements) > 80
    assert [one for text in statements for one in _unknown(text)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT FROM attempt WHERE state = 'QUEUD'",
        "SELECT FROM attempt WHERE state IN ('QUEUED', 'RUNING')",
        "UPDATE attempt SET kind = 'QUEUED'",
        "INSERT INTO attempt (id, kind) VALUES (1, 'REVIEWS')",
        "UPDATE key_validation SET action = 'PROMOTED'",
    ],
)
def test_a_wrong_one_is_seen(statement: str) -> None:
    assert _unknown(statement)
