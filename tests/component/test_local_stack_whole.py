"""A stack as a whole: up, down, killed, beside another one, and from `byokeep.testing`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from byokeep.orchestrator.v1 import tenant_pb2
from byokeep.testing.emulator import Emulator
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import Ports
from deploy.local.processes import alive, wait_for
from deploy.local.state import CHECKOUT, open_state
from deploy.local.topology import SERVICES

_SECONDS = 110


def _run(root: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    profile = [f"--config={root.parent / 'config.toml'}"] if command in ("up", "clean") else []
    return subprocess.run(
        [sys.executable, "-m", "deploy.local", command, f"--state={root}", *profile, *more],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )


def _description(root: Path) -> dict:
    return json.loads((root / "stack.json").read_text())


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="byokeep-test-", dir="/tmp") as parent:
        Path(parent).chmod(0o711)
        root = Path(parent) / "stack"
        yield root
        _run(root, "clean")


@pytest.mark.timeout(300)
def test_up_twice_killed_up_again_down(root, stack) -> None:
    """Beside the session's stack: neither minds the other."""
    held = Ports()
    first = _run(root, "up")
    assert first.returncode == 0, first.stdout + first.stderr
    profile = root.parent / "config.toml"
    before = profile.read_text()
    profile.unlink()
    again = _run(root, "up")
    assert profile.read_text() == before
    assert (again.returncode, "already up" in again.stdout) == (0, True)
    assert _run(root, "status").returncode == 0
    # What ends is started again, and known by its new process.
    runner = _description(root)["processes"]["runner"]
    os.kill(runner, signal.SIGKILL)
    assert wait_for(lambda: _description(root)["processes"]["runner"] != runner, 60)
    assert wait_for(lambda: _run(root, "status").returncode == 0, 60)
    pids = list(_description(root)["processes"].values())
    assert all(map(alive, pids))

    os.kill(_description(root)["pid"], signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, pids)), 60)
    assert _run(root, "status").returncode == 3

    # Fixed ports, and an emulator whose control is where `up` says.
    orchestrator, control = (held.reserve() for _ in range(2))
    held.close()
    wanted = (f"--port=orchestrator={orchestrator}", f"--port=emulator-control={control}")
    third = _run(root, "up", *wanted)
    assert third.returncode == 0, third.stdout + third.stderr
    assert _description(root)["ports"]["orchestrator"] == orchestrator
    assert f"its control: http://127.0.0.1:{control}" in third.stdout
    with Emulator(f"http://127.0.0.1:{control}") as emulator:
        assert emulator.calls() == []
    pids = [_description(root)["pid"], *_description(root)["processes"].values()]
    assert _run(root, "down").returncode == 0
    assert not any(map(alive, pids))
    with stack.connect("operator") as connection:
        assert connection.tenants.ListTenants(tenant_pb2.ListTenantsRequest()).tenants


def test_failure_names_the_process_and_shows_its_log(root) -> None:
    (open_state(root).secrets / "keyring.json").write_text("{}")
    failed = _run(root, "up")
    assert failed.returncode == 1
    assert "keyvault" in failed.stdout
    assert "keyring" in failed.stdout
    assert _run(root, "status").returncode == 3


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_says_that_it_serves(service, stack) -> None:
    port = _description(stack.root)["ports"][f"{service}-health"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("role", ["developer", "submitter", "key-admin", "auditor", "operator"])
def test_every_role_sees_tenant_demo(role, stack) -> None:
    with stack.connect(role) as connection:
        tenants = connection.tenants.ListTenants(tenant_pb2.ListTenantsRequest()).tenants
    assert "tenants/demo" in [tenant.name for tenant in tenants]


def test_developer_is_an_operator_of_the_orchestrator(stack) -> None:
    """As profile demo, so that `byokeep tenant create` and the like can be tried."""
    name = "tenants/made-by-developer"
    with stack.connect("developer") as connection:
        connection.tenants.CreateTenant(
            tenant_pb2.CreateTenantRequest(name=name, request_id="made-by-developer")
        )
        listed = connection.tenants.ListTenants(tenant_pb2.ListTenantsRequest()).tenants
    assert name in [tenant.name for tenant in listed]


@pytest.mark.parametrize("service", SERVICES)
def test_killed_process_is_started_again_by_hand(service, stack) -> None:
    before = stack.process(service).pid
    stack.process(service).kill()
    assert stack.process(service).exit_status == -signal.SIGKILL
    stack.restart(service)
    assert stack.process(service).running
    assert stack.process(service).pid != before
