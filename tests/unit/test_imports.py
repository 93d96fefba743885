"""What is loaded when, that import-linter can't see."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _loaded(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import byokeep",
        "from byokeep import hpke, sealing, dsse",
        "import services.llm_runner.child",
    ],
)
def test_grpc_is_loaded_only_where_it_is_used(statement):
    assert not {"grpc", "byokeep.client"} & _loaded(statement)


def test_the_orchestrator_never_loads_what_opens_a_key():
    loaded = _loaded("import services.orchestrator.server")
    opens_a_key = {"byokeep.hpke", "byokeep.sealing", "byokeep.leasing", "hvac"}
    assert not (opens_a_key | {"httpx", "h11"}) & loaded


def test_a_serving_keyvault_never_loads_its_schema_tools():
    loaded = _loaded("import services.keyvault.server")
    assert not {"sqlalchemy", "alembic", "httpx", "h11"} & loaded


def test_the_bench_loads():
    """`make lint` does not type-check tests: a name that moved would be noticed by nobody."""
    import tests.bench.__main__  # noqa: F401
