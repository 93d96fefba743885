"""docs/identities.md: certificates made by its commands are those of a whole stack."""

from __future__ import annotations

import subprocess
from pathlib import Path

import byokeep
import pytest
from byokeep.common.v1 import options_pb2

from deploy.local.state import throwaway_state
from deploy.local.supervisor import LocalStack
from services.common.authz import CallerClasses
from tests.harness.pages import ROOT, block

PAGE = "docs/identities.md"


def test_a_stack_runs_on_certificates_that_are_made_by_hand():
    diff = (ROOT / "deploy/local/demo.diff").read_text()
    with throwaway_state(in_memory=True) as state:
        _run(block(PAGE, "by-hand"), state.pki)
        for path in _files(state.pki, ("operator", "developer")):
            path.rename(state.client / path.name)
        names = ("ca", "keyvault", "orchestrator", "runner")
        made = {path: path.read_bytes() for path in _files(state.pki, names)}
        made |= {
            path: path.read_bytes() for path in _files(state.client, ("operator", "developer"))
        }
        with LocalStack(state), byokeep.connect(config=state.config) as connection:
            connection.add_key("openai", "sk-proj-" + "aB3x" * 10)
            assert connection.review(diff, "acme/shop").finding_count == 8
        # The stack made no others in their place.
        assert {path: path.read_bytes() for path in made} == made


def _run(commands: str, folder: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-euc", commands], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / f"{name}.{suffix}" for name in names for suffix in ("pem", "key")]


def test_the_pages_classes_are_the_protos():
    text = (ROOT / PAGE).read_text().partition("## Classes")[2].partition("For example")[0]
    told = {row.split("`")[1] for row in text.splitlines() if row.startswith("| `")}
    known = {
        name.removeprefix("CALLER_CLASS_").lower()
        for name in options_pb2.CallerClass.DESCRIPTOR.values_by_name
    }
    assert told == known - {"unspecified"}


@pytest.mark.parametrize(
    ("service", "path", "classes"),
    [
        ("keyvault", "runner/default", {"RUNNER"}),
        ("keyvault", "client/operator", {"OPERATOR"}),
        ("keyvault", "client/developer", set()),
        ("orchestrator", "client/operator", {"CLIENT", "OPERATOR"}),
        ("orchestrator", "runner/default", set()),
        ("runner", "orchestrator", {"ORCHESTRATOR"}),
    ],
)
def test_the_pages_callers_are_taken(service: str, path: str, classes: set[str]):
    settings = dict(line.split(":", 1) for line in block(PAGE, "callers").splitlines())
    found = CallerClasses(settings[service], "byokeep.local").identify(
        f"spiffe://byokeep.local/{path}"
    )
    named = {options_pb2.CallerClass.Name(value) for value in found.classes}
    assert named == {f"CALLER_CLASS_{name}" for name in classes}
