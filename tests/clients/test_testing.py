"""`byokeep.testing` as an engineer of another project has it: one pip install, no checkout."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT, shell
from tests.harness.pages import block

PAGE = "docs/testing.md"


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, dist: Path, client_wheel: Path, services_wheel: Path
) -> Path:
    """A project outside the checkout, with what the page says to install and to write."""
    folder = tmp_path_factory.mktemp("project")
    shell(["uv", "venv", "--quiet", "--seed", "venv"], cwd=folder)
    install = block(PAGE, "install").strip()
    found = f"{dist} {os.environ.get('PIP_FIND_LINKS', '')}"
    outside(folder, f"venv/bin/python -m {install} --quiet", PIP_FIND_LINKS=found)
    (folder / "conftest.py").write_text(block(PAGE, "conftest"))
    (folder / "test_reviews.py").write_text(block(PAGE, "tests"))
    return folder


def outside(folder: Path, command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell outside the checkout would."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_pages_tests_pass_in_a_fresh_environment(project: Path) -> None:
    done = outside(project, "venv/bin/python -m pytest -q")
    assert re.search(r"^[3-9] passed", done.stdout, re.M), done.stdout


def test_nothing_of_ours_is_at_the_top_of_site_packages(project: Path) -> None:
    (packages,) = project.glob("venv/lib/python3*/site-packages")
    assert not {"services", "deploy", "tests", "buf"} & {path.name for path in packages.iterdir()}
    assert (packages / "byokeep_services").is_dir()


def test_a_stack_has_the_ports_that_it_is_told(project: Path) -> None:
    script = """
from byokeep.testing import Stack
import socket, time
free = socket.create_server(("127.0.0.1", 0)); number = free.getsockname()[1]; free.close()
begun = time.monotonic()
with Stack(ports={"orchestrator": number}) as stack:
    assert stack.address("orchestrator") == f"127.0.0.1:{number}"
    print(f"{time.monotonic() - begun:.1f} s to a stack")
"""
    (project / "fixed.py").write_text(script)
    done = outside(project, "venv/bin/python fixed.py")
    print(done.stdout)


def test_its_types_are_checked_where_it_is_used(project: Path) -> None:
    (project / "typed.py").write_text(
        "from byokeep.testing import Stack\n"
        "with Stack() as stack:\n"
        "    stack.emulator.fault('rate_limited', provider='openai', seconds=2.0)\n"
        "    stack.emulator.fault('rate_limitted')\n"
        "    stack.emulator.fault('slow', provider='nobody')\n"
    )
    mypy = ROOT / ".venv" / "bin" / "mypy"
    done = shell(
        [mypy, "--python-executable", "venv/bin/python", "--follow-imports=silent", "typed.py"],
        cwd=project,
        check=False,
    )
    wrong = re.findall(r"^typed\.py:(\d+): error", done.stdout, re.M)
    assert wrong == ["4", "5"], done.stdout
