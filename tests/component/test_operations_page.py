"""docs/operations.md: its commands as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from byokeep.testing import Stack

from deploy.local import binaries
from deploy.local.processes import Process, wait_for
from deploy.local.state import throwaway_state
from deploy.local.supervisor import LocalStack
from deploy.local.topology import SERVICES
from tests.harness import pages
from tests.harness.pages import block

PAGE = "docs/operations.md"
DIFF = pages.ROOT / "deploy/local/demo.diff"
Shell = Callable[[str], subprocess.CompletedProcess[str]]
MODEL = "anthropic/claude-sonnet-5-5"
PROVIDERS = {
    "openai": "sk-proj-" + "aB3x" * 10,
    "anthropic": "sk-ant-api03-" + "aB3x" * 10,
    "gemini": "AIza" + "aB3x" * 9,
}


@pytest.fixture
def shell(tmp_path: Path):
    """An operator's shell: a stack's profile, PostgreSQL's programs, a service file."""
    with Stack() as stack:
        services = tmp_path / "services.conf"
        services.touch(0o600)
        services.write_text(_service_file(stack))
        programs = binaries.reachable("") / "bin"
        path = [str(Path(sys.executable).parent), str(programs), os.environ["PATH"]]
        environment = {
            "PATH": ":".join(path),
            "BYOKEEP_CONFIG": str(stack.config),
            "PGSERVICEFILE": str(services),
        }

        def run(text: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["/bin/sh", "-euc", text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=100,
            )

        yield stack, run


def _service_file(stack: Stack) -> str:
    lines = []
    for zone in ("keyvault", "orchestrator"):
        url = urlsplit(stack.database_url(zone))
        (host,) = parse_qs(url.query)["host"]
        lines += [f"[{zone}]", f"host={host}", f"dbname={url.path[1:]}"]
        lines += [f"user={url.username}", f"password={url.password}"]
    return "\n".join([*lines, ""])


@pytest.mark.deep
def test_services_start_by_the_pages_lines():
    """Each in its service's environment, on a stack whose own are stopped."""
    with throwaway_state(in_memory=True) as state, LocalStack(state) as local:
        started = []
        for name in SERVICES:
            local.process(name).stop()
            local.topology.ready_file(name).unlink(missing_ok=True)
        for line in block(PAGE, "start").splitlines():
            *_, module, command = line.partition("#")[0].split()
            (name,) = (name for name, package in SERVICES.items() if package == module)
            process = Process(
                f"{name}-{command}",
                [sys.executable, "-m", module, command],
                environment=local.topology.environment(name, local.emulator_ports[0]),
                log=state.logs / f"page-{name}-{command}.log",
                cwd=pages.ROOT,
            )
            started.append(process)
            process.start()
            if command == "migrate":
                assert wait_for(lambda: not started[-1].running, 60)
                assert process.exit_status == 0, process.last_lines()
        assert [process.running for process in started].count(True) == len(SERVICES)
        for name in SERVICES:
            ready = local.topology.ready_file(name)
            assert wait_for(ready.exists, 60), name
        for process in started:
            process.stop()


@pytest.mark.deep
def test_what_the_page_says_brings_a_deployment_back(shell):
    """openai's key is revoked before the backup, anthropic's after it, gemini's never."""
    stack, run = shell

    def ok(text: str) -> str:
        done = run(text)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def states() -> dict[str, str]:
        rows = [line.split() for line in ok("byokeep key list").splitlines()[1:]]
        return {row[1]: row[4] for row in rows}

    with stack.connect() as connection:
        keys = {
            provider: connection.add_key(provider, key).provider_key.name.rpartition("/")[2]
            for provider, key in PROVIDERS.items()
        }
    ok(f"byokeep key revoke {keys['openai']}")
    ok(block(PAGE, "back-up"))
    anchor = (stack.root / "secrets/anchor").read_bytes()
    ok(f"byokeep key revoke {keys['anthropic']}")
    assert wait_for(lambda: (stack.root / "secrets/anchor").read_bytes() != anchor, 60)
    ok(block(PAGE, "keep-the-record"))

    for name in ("orchestrator", "keyvault"):
        stack.process(name).stop()
    ok(block(PAGE, "restore"))
    for name in ("keyvault", "orchestrator"):
        stack.process(name).start()
        stack.wait_ready(name)

    assert states() == {"openai": "REVOKED", "anthropic": "ACTIVE", "gemini": "ACTIVE"}
    assert "DATABASE_ROLLED_BACK" in ok(block(PAGE, "look"))
    ok(block(PAGE, "revoke-again"))
    assert states() == {"openai": "REVOKED", "anthropic": "REVOKED", "gemini": "ACTIVE"}

    with stack.connect() as connection:
        review = connection.review(DIFF.read_text(), "acme/shop")
    assert review.finding_count
    refused = run(f"byokeep review --repo acme/shop --model {MODEL} --diff {DIFF}")
    assert refused.returncode == 4, refused.stderr
    assert "the audit chain holds" in ok(block(PAGE, "verify"))
    against = run("byokeep audit verify restored.jsonl --against checkpoint.json")
    assert against.returncode == 6, against.stdout
