"""What the tests of the client packages share: a stack, and what a shell would do."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from byokeep.client import new_request_id
from byokeep.orchestrator.v1 import key_pb2
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


def tracked(*below: str) -> list[str]:
    """The files that git knows or would take, below some folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *below]
    names = shell(command, cwd=ROOT).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone has, with what has changed here."""
    target = tmp_path_factory.mktemp("clone")
    for name in tracked():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    return target


def build_wheel(source: Path, target: Path) -> Path:
    """Build the wheel of a project into a folder."""
    before = set(target.glob("*.whl"))
    shell(["uv", "build", "--quiet", "--wheel", "--out-dir", target, source], cwd=target)
    (wheel,) = set(target.glob("*.whl")) - before
    return wheel


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels, as an index would have them."""
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="session")
def client_wheel(clone: Path, dist: Path) -> Path:
    return build_wheel(clone / "clients" / "python", dist)


@pytest.fixture(scope="session")
def services_wheel(clone: Path, dist: Path) -> Path:
    return build_wheel(clone, dist)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with Stack() as running:
        yield running


def end_all_keys(stack: Stack) -> None:
    """Destroy the tenant's keys, so that their names are free."""
    with stack.connect() as connection:
        held = connection.keys.ListKeys(key_pb2.ListKeysRequest(parent=connection.parent)).keys
        for each in held:
            name = each.provider_key.name
            connection.keys.DestroyKey(
                key_pb2.DestroyKeyRequest(name=name, request_id=new_request_id())
            )


@pytest.fixture(autouse=True)
def _emulator_as_new(request: pytest.FixtureRequest) -> None:
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").emulator.reset()
