"""deploy/ci-example as a customer's GitHub Actions runs it, against a fake of GitHub's API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from byokeep.testing import Stack

from tests.clients.conftest import ROOT, shell

EXAMPLE = ROOT / "deploy" / "ci-example"
WORKFLOW = yaml.safe_load((EXAMPLE / "byokeep-review.yml").read_text())
JOB = WORKFLOW["jobs"]["review"]
TOKEN = "ghs_" + "a1B2" * 9
KEY = "sk-proj-" + "aB3x" * 10
BAD = "rows = db.execute(\"SELECT * FROM users WHERE name = '%s'\" % name)\n"


@dataclass
class GitHub:
    """The three calls of GitHub's REST API that count, with the answers that it documents.

    Source: docs.github.com/rest/pulls/reviews (list, create). `refusals` are answered first.
    """

    reviews: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    refusals: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, str], Any]:
        if self.refusals and self.refusals[0][0] == method:
            _, status, headers = self.refusals.pop(0)
            return status, headers, {"message": "refused"}
        if not re.match(r"/repos/acme/shop/pulls/7/reviews(\?|$)", path):
            return 404, {}, {"message": "Not Found"}
        if method == "GET":
            return 200, {}, self.reviews
        wrong = set(body) - {"body", "event", "comments", "commit_id"}
        if wrong or body["event"] != "COMMENT" or any(not c.get("line") for c in body["comments"]):
            return 422, {}, {"message": "Unprocessable Entity"}
        made = {"id": len(self.reviews) + 1, "body": body["body"], "user": {"type": "Bot"}}
        self.reviews.append(made)
        return 200, {}, made

    def posted(self) -> list[dict[str, Any]]:
        return [body for method, _, _, body in self.requests if method == "POST"]


@pytest.fixture
def github() -> Iterator[GitHub]:
    fake = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.requests.append((self.command, self.path, dict(self.headers), body))
            status, headers, document = fake.answer(self.command, self.path, body)
            content = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _any

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, dist: Path, client_wheel: Path
) -> dict[str, str]:
    """The environment of a runner that has done the workflow's own step `Install byokeep`."""
    folder = tmp_path_factory.mktemp("python")
    shell(["uv", "venv", "--quiet", "--seed", "venv"], cwd=folder)
    path = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    found = f"{dist} {os.environ.get('PIP_FIND_LINKS', '')}"
    (install,) = [step for step in JOB["steps"] if step.get("name") == "Install byokeep"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path}
    subprocess.run(
        ["bash", "-e", "-c", install["run"]],
        env=environment | {"PIP_FIND_LINKS": found},
        cwd=folder,
        check=True,
    )
    return environment


@pytest.fixture
def key(stack: Stack) -> None:
    with stack.connect() as connection:
        held = connection.keys.ListKeys(_keys(connection.parent)).keys
        if not held:
            connection.add_key("openai", KEY)


def _keys(parent: str) -> Any:
    from byokeep.orchestrator.v1.key_pb2 import ListKeysRequest

    return ListKeysRequest(parent=parent)


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@acme.example"]
    return shell(["git", *identity, *arguments], cwd=repository).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What actions/checkout leaves: the head, detached, with the base as origin/main."""
    origin, work = tmp_path / "origin", tmp_path / "work"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    (origin / "app.py").write_text("import sqlite3\n")
    (origin / ".github").mkdir()
    (origin / ".github" / "byokeep_review.py").write_text(
        (EXAMPLE / "byokeep_review.py").read_text()
    )
    git(origin, "add", ".")
    git(origin, "commit", "-qm", "base")
    git(origin, "checkout", "-qb", "change")
    (origin / "app.py").write_text("import sqlite3\n" + BAD)
    git(origin, "commit", "-qam", "change")
    git(origin, "checkout", "-q", "main")
    shell(["git", "clone", "-q", origin, work], cwd=tmp_path)
    git(work, "checkout", "-q", "--detach", "origin/change")
    return work


@dataclass
class Runner:
    """Runs the workflow's own `run` steps with bash, as Actions does."""

    checkout: Path
    environment: dict[str, str]
    contexts: dict[str, str]

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        (step,) = [step for step in JOB["steps"] if step.get("name") == name]
        given = {key: self._evaluated(value) for key, value in step.get("env", {}).items()}
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
            cwd=self.checkout,
            env=self.environment | given,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def _evaluated(self, text: str) -> str:
        return re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda found: self.contexts[found[1]], text)


@pytest.fixture
def runner(
    checkout: Path, command: dict[str, str], github: GitHub, stack: Stack, key: None, tmp_path: Path
) -> Runner:
    head = git(checkout, "rev-parse", "HEAD")
    event = {
        "pull_request": {
            "number": 7,
            "title": "Orders: `export` $(touch owned)",
            "head": {"sha": head},
            "base": {"ref": "main"},
        }
    }
    (tmp_path / "event.json").write_text(json.dumps(event))
    client = stack.config.parent
    contexts = {
        "secrets.BYOKEEP_CERTIFICATE": (client / "submitter.pem").read_text(),
        "secrets.BYOKEEP_PRIVATE_KEY": (client / "submitter.key").read_text(),
        "vars.BYOKEEP_TRUST": stack.trust.read_text(),
        "vars.BYOKEEP_ORCHESTRATOR": stack.address("orchestrator"),
        "vars.BYOKEEP_ORCHESTRATOR_NAME": "orchestrator.byokeep.internal",
        "vars.BYOKEEP_TENANT": "demo",
        "runner.temp": str(tmp_path / "temp"),
        "github.token": TOKEN,
    }
    (tmp_path / "temp").mkdir()
    environment = command | {
        "GITHUB_API_URL": github.url,
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "GITHUB_REPOSITORY": "acme/shop",
        "RUNNER_TEMP": str(tmp_path / "temp"),
    }
    made = Runner(checkout, environment, contexts)
    written = made.run("Write the identity")
    assert written.returncode == 0, written.stderr
    return made


def test_the_workflow_reviews_writes_sarif_and_posts(runner: Runner, github: GitHub) -> None:
    done = runner.run("Review")
    assert done.returncode == 1, done.stderr  # --fail-on high, and there is a critical finding
    sarif = json.loads((runner.checkout / "byokeep.sarif").read_text())
    (result,) = sarif["runs"][0]["results"]
    assert result["level"] == "error"
    (posted,) = github.posted()
    assert [(each["path"], each["line"]) for each in posted["comments"]] == [("app.py", 2)]
    head = git(runner.checkout, "rev-parse", "HEAD")
    assert posted["commit_id"] == head
    assert f"<!-- byokeep {head} -->" in posted["body"]
    headers = {name.lower(): value for name, value in github.requests[-1][2].items()}
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert headers["x-github-api-version"] == "2022-11-28"
    assert not (runner.checkout / "owned").exists()
    for secret in (TOKEN, KEY, "PRIVATE KEY"):
        assert secret not in done.stdout + done.stderr + json.dumps(posted) + json.dumps(sarif)


def test_a_run_that_is_repeated_posts_once(runner: Runner, github: GitHub) -> None:
    assert [runner.run("Review").returncode for _ in range(2)] == [1, 1]
    assert len(github.posted()) == 1


def test_whoever_writes_the_marker_stops_no_review(runner: Runner, github: GitHub) -> None:
    head = git(runner.checkout, "rev-parse", "HEAD")
    github.reviews.append({"body": f"<!-- byokeep {head} -->", "user": {"type": "User"}})
    runner.run("Review")
    assert len(github.posted()) == 1


def test_where_github_takes_no_comment_on_a_line_the_body_has_it(
    runner: Runner, github: GitHub
) -> None:
    github.refusals = [("POST", 422, {})]
    assert runner.run("Review").returncode == 1
    refused, posted = github.posted()
    assert refused["comments"]
    assert posted["comments"] == []
    assert "`app.py:2`" in posted["body"]


def test_a_limit_of_githubs_is_waited_for(runner: Runner, github: GitHub) -> None:
    github.refusals = [("GET", 503, {}), ("POST", 403, {"Retry-After": "1"})]
    assert runner.run("Review").returncode == 1
    assert len(github.reviews) == 1


def test_a_refusal_of_githubs_fails_and_shows_no_token(runner: Runner, github: GitHub) -> None:
    github.refusals = [("POST", 401, {})]
    done = runner.run("Review")
    assert done.returncode
    assert "GitHub answers 401" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_review_that_can_not_be_had_fails_and_posts_nothing(
    runner: Runner, github: GitHub
) -> None:
    runner.contexts["vars.BYOKEEP_ORCHESTRATOR"] = "127.0.0.1:1"
    assert runner.run("Write the identity").returncode == 0
    assert runner.run("Review").returncode == 5
    assert github.requests == []


def test_the_private_key_is_its_owners_alone(runner: Runner) -> None:
    for path in (Path(runner.environment["RUNNER_TEMP"]) / "byokeep").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_no_author_of_a_fork_gets_a_secret() -> None:
    events = WORKFLOW[True]  # YAML 1.1 reads `on` so
    assert set(events) == {"pull_request"}
    assert "head.repo.full_name == github.repository" in JOB["if"]
    assert WORKFLOW["permissions"] == {
        "contents": "read",
        "pull-requests": "write",
        "security-events": "write",
    }
    (checkout,) = [step for step in JOB["steps"] if "actions/checkout" in step.get("uses", "")]
    assert checkout["with"]["persist-credentials"] is False
    # What an author writes, such as a title, is never pasted into a shell's script.
    assert not [step for step in JOB["steps"] if "${{" in step.get("run", "")]
