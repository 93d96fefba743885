"""README.md as somebody walks it from a fresh clone: its two commands, and the stack that stays."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import shell
from tests.harness.pages import block

KEY = "sk-proj-" + "aB3x" * 10
_SECONDS = 400


@pytest.fixture(scope="module")
def fresh(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    target = tmp_path_factory.mktemp("fresh") / "byokeep"
    shutil.copytree(clone, target)
    yield target
    shell(["make", "clean"], cwd=target)


def test_the_two_commands(fresh: Path):
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb"}
    done = subprocess.run(
        ["/bin/sh", "-ec", block("README.md", "two-commands")],
        cwd=fresh,
        env={**_registry(), **environment},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plaintext existed in 2 processes" in done.stdout
    assert "attacks, " in done.stdout.splitlines()[-1]


def test_a_stack_that_stays(fresh: Path):
    """In a terminal, where the command asks for the key and shows none of it."""
    shown = _terminal(block("README.md", "a-stack-that-stays"), fresh, "API key of openai", KEY)
    assert KEY not in shown
    assert "VALID: the provider accepts it" in shown
    assert "findings: 2 critical" in shown
    assert "plaintext existed in 2 processes" in shown
    assert "stopped; data and keys stay in" in shown


def _registry() -> dict[str, str]:
    """How this machine's pip and uv reach a package index."""
    begins = ("PIP_", "UV_", "SSL_", "REQUESTS_", "HOME")
    return {name: value for name, value in os.environ.items() if name.startswith(begins)}


def _terminal(commands: str, folder: Path, prompt: str, answer: str) -> str:
    """Run lines in a terminal of their own, answer one question, and return what is to be seen."""
    environment = {**_registry(), "PATH": os.environ["PATH"], "TERM": "dumb"}
    controller, terminal = pty.openpty()
    shell = subprocess.Popen(
        ["/bin/sh", "-ec", commands],
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown, end = "", time.monotonic() + _SECONDS
    try:
        while shell.poll() is None or select.select([controller], [], [], 0)[0]:
            assert time.monotonic() < end, shown
            if select.select([controller], [], [], 0.2)[0]:
                try:
                    shown += os.read(controller, 65536).decode(errors="replace")
                except OSError:  # every other end is closed
                    break
            if prompt and prompt in shown:
                os.write(controller, f"{answer}\n".encode())
                prompt = ""
    finally:
        shell.kill()
        os.close(controller)
    assert shell.wait() == 0, shown
    return shown
