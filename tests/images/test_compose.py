"""The Compose stack for real: it comes up, a review runs through it, and it goes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.compose.__main__ import STATE, main
from deploy.docker import images
from deploy.docker.images import Tree
from tests.harness import engine
from tests.images.conftest import TAG

pytestmark = pytest.mark.timeout(1800)  # builds everything, where it is the first
_ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def stack(trees: dict[str, Tree]) -> Iterator[Path]:
    """The stack on ports of its own; the config file of its profiles."""
    for image in (engine.POSTGRES, engine.OPENBAO):
        engine.ensure(image)
    try:
        images.docker("compose", "version")
    except images.ImageError:
        engine.install("docker-compose")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TAG", TAG)
        patched.setenv("ORCHESTRATOR_PORT", _free_port())
        patched.setenv("KEYVAULT_PORT", _free_port())
        try:
            assert main(["up"]) == 0
            yield STATE / "client/config.toml"
        finally:
            assert main(["down", "--volumes"]) == 0


def _byokeep(config: Path, *arguments: str, text: str = "") -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("byokeep"), "--config", config, *arguments],
        check=False,
        capture_output=True,
        text=True,
        input=text,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_review_runs_through_the_stack(stack: Path):
    _byokeep(stack, "key", "add", "openai", "--stdin", text=f"sk-proj-{'cMp' * 14}\n")
    diff = str(_ROOT / "deploy/local/demo.diff")
    output = _byokeep(stack, "--json", "review", "--repo=acme/shop", f"--diff={diff}")
    assert '"state": "REVIEW_STATE_COMPLETED"' in output.splitlines()[-1]
    assert "leases live now: 0" in _byokeep(stack, "key", "trail", "openai")


def test_who_shares_no_network_can_not_be_reached(stack: Path):
    """From the orchestrator's container: keyvault's data role, and no more of what is behind it."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    named = "--filter=label=com.docker.compose.service=orchestrator"
    orchestrator = images.docker("ps", "--quiet", named)
    reached = {
        target: subprocess.run(
            ["docker", "exec", orchestrator, "/opt/byokeep/bin/python", "-c", code, target, port],
            check=False,
            capture_output=True,
        ).returncode
        == 0
        for target, port in (
            ("keyvault-data", "8443"),
            ("postgres", "5432"),
            ("keyvault-admin", "8443"),
            ("openbao", "8200"),
            ("emulator", "8443"),
        )
    }
    assert [target for target, there in reached.items() if there] == ["keyvault-data", "postgres"]
