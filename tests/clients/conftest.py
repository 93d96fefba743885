"""What the tests of the client packages share: a stack, and what a shell would do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from byokeep.testing import Stack

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv" / "bin"


def shell(
    command: Sequence[str | Path] | str,
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 540,
) -> subprocess.CompletedProcess[str]:
    """Run a command with the checkout's tools on PATH; its output is in what it fails with."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **(env or {})},
        shell=isinstance(command, str),
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with Stack() as running:
        yield running


@pytest.fixture(autouse=True)
def _emulator_as_new(request: pytest.FixtureRequest) -> None:
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").emulator.reset()
