"""The client pages' code, run as it is printed against a stack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byokeep.testing import Stack

from tests.clients.conftest import ROOT, end_all_keys

README = ROOT / "clients" / "python" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def folder(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page")
    end_all_keys(stack)  # other tests' names
    shutil.copy(ROOT / "deploy" / "local" / "demo.diff", made / "my.diff")
    return made


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (BLOCKS[0], r"^shop/\S+:\d+ SQL built from strings$"),
        (BLOCKS[1], r"^(\d+) of \1$"),
        (BLOCKS[2], r"^NOT_FOUND NOT_FOUND None "),
    ],
    ids=["blocking", "asyncio", "errors"],
)
def test_the_readmes_code_runs(block: str, says: str, folder: Path, stack: Stack) -> None:
    environment = {
        "BYOKEEP_CONFIG": str(stack.config),
        "OPENAI_API_KEY": "sk-proj-" + "aB3x" * 10,
    }
    done = subprocess.run(
        [sys.executable, "-c", block],
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
    assert len(BLOCKS) == 3
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10
