"""What the failure of a call to another service becomes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grpc
import pytest

from services.common.errors import ByokeepError, from_rpc

ROOT = Path(__file__).parents[2]


class _Failed(grpc.RpcError):
    def __init__(self, code, metadata=()):
        self._code, self._metadata = code, metadata

    def code(self):
        return self._code

    def details(self):
        return "untold"

    def trailing_metadata(self):
        return self._metadata


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # A server that ends cuts what came in its last moment.
        grpc.StatusCode.CANCELLED,
        # So grpc.aio calls a connection that breaks while it writes, and a proxy one of its own.
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    ],
)
def test_who_did_not_answer_is_named(code):
    error = from_rpc(_Failed(code), "keyvault")
    assert (error.reason, error.metadata) == ("DEPENDENCY_UNAVAILABLE", {"dependency": "keyvault"})


def test_a_typed_error_passes_unchanged():
    """When to try again too. Shown to fail: where the RetryInfo stays behind."""
    told = ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "INTAKE_LIMIT",
        "too many",
        retry_after_seconds=3600.0,
        limit="60",
    )
    passed = from_rpc(_Failed(told.code, told.trailing_metadata()), "keyvault")
    assert (passed.reason, passed.metadata, passed.retry_after_seconds) == (
        "INTAKE_LIMIT",
        {"limit": "60"},
        3600.0,
    )


_COMMAND = re.compile(r"byokeep (key|model|limit|review|admin|tenant|caller|status|doctor|audit)\b")


@pytest.mark.parametrize("zone", ["common", "keyvault", "llm_runner", "orchestrator"])
def test_no_sentence_of_a_service_names_a_command(zone):
    """Most callers have no command: `byokeep` itself adds it, from the reason."""
    found = []
    for path in sorted((ROOT / "services" / zone).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        notes = {ast.get_docstring(node, clean=False) for node in nodes if _documented(node)}
        found += [
            f"{path.name}:{node.lineno}: {node.value}"
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node.value not in notes and _COMMAND.search(node.value)
        ]
    assert found == []


def _documented(node):
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
