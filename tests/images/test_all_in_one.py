"""`byokeep.testing`, as processes and in a container: the same promises, kept by both."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import byokeep
import psycopg
import pytest
from byokeep.testing import Stack
from byokeep.testing.api import StackApi
from byokeep.testing.remote import PORTS, Control

from tests.harness.pages import block

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/testing.md"
DIFF = (ROOT / "deploy/local/demo.diff").read_text()
KEY = "sk-proj-" + "aB3x" * 10
KINDS = ("processes", "container")


@pytest.fixture(scope="module")
def image(docker: None) -> str:
    """The image that the page names, built as it says."""
    subprocess.run(block(PAGE, "image"), shell=True, cwd=ROOT, check=True)
    # No registry has testcontainers' own container here; ours end with their blocks.
    os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"
    return "byokeep/all-in-one:dev"


def _new(kind: str, **settings) -> StackApi:
    if kind == "processes":
        return Stack(**settings)
    from byokeep.testing.containers import ByokeepContainer

    return ByokeepContainer(**settings)


@pytest.fixture(scope="module", params=KINDS)
def stack(request: pytest.FixtureRequest, image: str) -> Iterator[StackApi]:
    begun = time.monotonic()
    with _new(request.param) as running:
        print(f"{request.param}: {time.monotonic() - begun:.1f} s to a stack")
        yield running


@pytest.fixture(autouse=True)
def _emulator_as_new(request: pytest.FixtureRequest) -> None:
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").emulator.reset()


def _reviewed(stack: StackApi) -> int:
    with stack.connect() as connection:
        return connection.review(DIFF, "acme/shop").finding_count


def test_a_review_runs_and_a_fault_is_what_it_meets(stack: StackApi):
    with stack.connect() as connection:
        connection.add_key("openai", KEY, name="one")
    assert _reviewed(stack) == 8
    assert [call.kind for call in stack.emulator.calls()] == ["models", "chat"]
    stack.emulator.fault("context_too_long", path="chat")
    with pytest.raises(byokeep.ReviewFailedError) as failed:
        _reviewed(stack)
    assert failed.value.reason == "CONTEXT_TOO_LONG"


def test_a_process_is_killed_and_started_again(stack: StackApi):
    runner = stack.process("runner")
    before = runner.pid
    runner.kill()
    assert (runner.running, runner.exit_status) == (False, -9)
    stack.restart("runner")
    assert runner.running
    assert runner.pid != before
    assert _reviewed(stack) == 8
    assert '"event"' in stack.log("runner")


def test_the_stacks_authority_makes_identities(stack: StackApi, tmp_path: Path):
    """One that nobody allowed is known, and refused; one of another trust domain is not known."""
    reasons = {}
    for name, uri in (
        ("nobody", "spiffe://byokeep.local/client/nobody"),
        ("foreign", "spiffe://elsewhere.example/client/developer"),
    ):
        files = stack.authority.issue(tmp_path / name, uris=[uri])
        own = tmp_path / f"{name}.toml"
        config = re.sub(r'"\S+/developer\.pem"', f'"{files.certificate}"', stack.config.read_text())
        own.write_text(re.sub(r'"\S+/developer\.key"', f'"{files.key}"', config))
        with pytest.raises(byokeep.CallError) as refused, byokeep.connect(config=own) as connection:
            connection.add_key("openai", KEY, name="never")
        reasons[name] = refused.value.reason
    assert reasons == {"nobody": "TENANT_NOT_ALLOWED", "foreign": "IDENTITY_INVALID"}


def test_each_zones_database_is_reached_by_its_role(stack: StackApi):
    for zone, table in (("keyvault", "lease"), ("orchestrator", "review")):
        with psycopg.connect(stack.database_url(zone)) as session:
            ((user, count),) = session.execute(f"SELECT user, count(*) FROM {table}").fetchall()
        assert user == f"byokeep_{zone}"
        assert count > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_that_is_wrong_is_named(kind: str, image: str):
    stack = _new(kind, environment={"runner": {"BYOKEEP_MAX_CHILDREN": "many"}})
    with pytest.raises(RuntimeError, match="BYOKEEP_MAX_CHILDREN"):
        stack.start()


@pytest.mark.parametrize("kind", KINDS)
def test_ports_are_fixed_on_request(kind: str, image: str):
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    with _new(kind, ports={"orchestrator": number}) as stack:
        assert stack.address("orchestrator").endswith(f":{number}")
        with stack.connect("submitter") as connection, pytest.raises(byokeep.CallError):
            connection.add_key("openai", KEY)
    with pytest.raises((RuntimeError, ValueError), match="no port nothing; there are: "):
        _new(kind, ports={"nothing": 1}).start()


def test_the_container_is_nobodys_root_says_its_health_and_obeys_its_owner_alone(image: str):
    """With a root that can't be written and no rights, as a strict engine runs it."""
    strict = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
    with _new("container", **strict) as stack:
        assert stack.exec(["id", "-u"]).output == b"65532\n"
        check = stack.get_wrapped_container().image.attrs["Config"]["Healthcheck"]["Test"][1:]
        assert stack.exec(check).exit_code == 0
        stack.process("keyvault").kill()
        assert stack.exec(check).exit_code == 1
        port = stack.get_exposed_port(PORTS["control"])
        stranger = Control(f"http://{stack.get_container_host_ip()}:{port}", "guess")
        with pytest.raises(RuntimeError, match="the token is another"):
            stranger.ask("database_url", zone="keyvault")
        stranger.close()


@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
def test_the_pages_tests_pass_outside_the_checkout(resolution: str, image: str, tmp_path: Path):
    """With the oldest testcontainers that we allow, and the newest."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "venv"], cwd=tmp_path, check=True)
    wanted = f"byokeep[containers] @ {(ROOT / 'clients/python').as_uri()}"
    install = [uv, "pip", "install", "--quiet", "--python", "venv/bin/python"]
    subprocess.run([*install, "--resolution", resolution, wanted], cwd=tmp_path, check=True)
    subprocess.run([*install, "pytest"], cwd=tmp_path, check=True)
    container = block(PAGE, "container")
    assert len([line for line in container.splitlines() if line.strip()]) <= 10
    (tmp_path / "conftest.py").write_text(
        block(PAGE, "conftest").replace(
            "from byokeep.testing.plugin import byokeep_stack\n", container
        )
    )
    (tmp_path / "test_reviews.py").write_text(block(PAGE, "tests"))
    done = subprocess.run(
        ["venv/bin/python", "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert re.search(r"^[3-9] passed", done.stdout, re.M), done.stdout + done.stderr
