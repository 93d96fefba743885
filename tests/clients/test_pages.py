"""The client pages' code, run as it is printed against a stack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byokeep.testing import Stack

from tests.clients.conftest import ROOT, end_all_keys, shell
from tests.harness.pages import block

PAGE = "clients/python/README.md"


@pytest.fixture(scope="module")
def folder(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page")
    shutil.copy(ROOT / "deploy" / "local" / "demo.diff", made / "my.diff")
    return made


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (block(PAGE, "blocking"), r"^shop/\S+:\d+ SQL built from strings$"),
        (block(PAGE, "asyncio"), r"^(\d+) of \1$"),
        (block(PAGE, "errors"), r"^NOT_FOUND NOT_FOUND None "),
        (block("README.md", "library"), ""),
    ],
    ids=["blocking", "asyncio", "errors", "the checkout's README"],
)
def test_the_readmes_code_runs(code: str, says: str, folder: Path, stack: Stack) -> None:
    end_all_keys(stack)
    environment = {
        "BYOKEEP_CONFIG": str(stack.config),
        "OPENAI_API_KEY": "sk-proj-" + "aB3x" * 10,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout, re.M), done.stdout


def test_a_key_is_added_and_a_diff_reviewed_in_ten_lines() -> None:
    lines = block(PAGE, "blocking").splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


def test_the_command_is_installed_as_the_page_says(
    dist: Path, client_wheel: Path, tmp_path: Path
) -> None:
    shell(["uv", "venv", "--quiet", "--seed", "venv"], cwd=tmp_path)
    found = f"{dist} {os.environ.get('PIP_FIND_LINKS', '')}"
    install = block(PAGE, "install")
    shell(f"venv/bin/python -m {install}", cwd=tmp_path, env={"PIP_FIND_LINKS": found})
    assert "review" in shell(["venv/bin/byokeep", "--help"], cwd=tmp_path).stdout
