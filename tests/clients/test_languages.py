"""clients/go and clients/typescript: compiled, held against the vectors, run against a stack."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from byokeep.testing import Stack

from tests.clients.conftest import ROOT, shell
from tests.harness.pages import block

PROTOS = ROOT / "protos"
GO = ROOT / "clients" / "go"
TYPESCRIPT = ROOT / "clients" / "typescript"
DIFF = ROOT / "deploy" / "local" / "demo.diff"
KEY = "sk-proj-" + "aB3x" * 10

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="there is no go on PATH")
needs_node = pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm on PATH")


def environment(stack: Stack) -> dict[str, str]:
    client = stack.config.parent
    return {
        "BYOKEEP_ORCHESTRATOR": stack.address("orchestrator"),
        "BYOKEEP_ORCHESTRATOR_NAME": "orchestrator.byokeep.internal",
        "BYOKEEP_TRUST": str(stack.trust),
        "BYOKEEP_CERTIFICATE": str(client / "developer.pem"),
        "BYOKEEP_KEY": str(client / "developer.key"),
        "BYOKEEP_TENANT": "demo",
        "OPENAI_API_KEY": KEY,
    }


def test_plain_buf_builds_and_lints_the_protos() -> None:
    shell(["buf", "build"], cwd=PROTOS)
    shell(["buf", "lint"], cwd=PROTOS)


def test_plain_protoc_compiles_the_protos(tmp_path: Path) -> None:
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("byokeep/**/*.proto"))
    protoc = ["python", "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    shell([*protoc, f"--descriptor_set_out={tmp_path / 'all.binpb'}", *sources], cwd=tmp_path)
    for source in sources:
        text = (PROTOS / source).read_text()
        zone = source.split("/")[1]
        assert f'option go_package = "byokeep.dev/go/{zone}/v1;{zone}v1";' in text


@pytest.fixture(scope="session")
def go() -> Path:
    shell(["buf", "generate"], cwd=GO)
    return GO


@needs_go
def test_plain_protoc_makes_what_buf_makes(go: Path, tmp_path: Path) -> None:
    """README.md's own command, with the protoc of grpcio-tools and go.mod's plugins on PATH."""
    tools = tmp_path / "bin"
    plugins = ["google.golang.org/protobuf/cmd/protoc-gen-go"]
    plugins += ["google.golang.org/grpc/cmd/protoc-gen-go-grpc"]
    shell(["go", "build", "-o", f"{tools}/", *plugins], cwd=go)
    (tools / "protoc").write_text('#!/bin/sh\nexec python -m grpc_tools.protoc "$@"\n')
    (tools / "protoc").chmod(0o755)
    command = block("clients/go/README.md", "protoc")
    work = tmp_path / "clients" / "go"
    work.mkdir(parents=True)
    (tmp_path / "protos").symlink_to(PROTOS)
    shell(f"PATH={tools}:$PATH; {command}", cwd=work)
    made = {path.relative_to(work): path.read_text() for path in work.rglob("*.go")}
    assert len(made) > 20
    for path, text in made.items():
        assert _code(text) == _code((go / path).read_text())


def _code(text: str) -> str:
    """Without the versions of the tools, which stand in comments."""
    return re.sub(r"^//.*\n", "", text, flags=re.M)


@needs_go
def test_go_opens_the_vectors_and_believes_what_is_pinned(go: Path) -> None:
    shell(["go", "vet", "./..."], cwd=go)
    assert re.search(r"^ok\s+byokeep.dev/go\s", shell(["go", "test", "./..."], cwd=go).stdout, re.M)
    assert shell(["gofmt", "-l", "byokeep.go", "byokeep_test.go", "cmd"], cwd=go).stdout == ""


@needs_go
def test_go_adds_a_key_and_reviews_a_diff(go: Path, stack: Stack) -> None:
    commands = block("clients/go/README.md", "example").replace("my.diff", str(DIFF))
    done = shell(f"set -e\n{commands}", cwd=go, env=environment(stack))
    assert re.search(r"^key key_[0-9a-z]{26} VALID$", done.stdout, re.M)
    assert "SEVERITY_CRITICAL SQL built from strings" in done.stdout
    assert KEY not in done.stdout + done.stderr


@needs_go
def test_go_refuses_an_unpinned_intake_key(go: Path, stack: Stack, tmp_path: Path) -> None:
    done = shell(
        ["go", "run", "./cmd/review", DIFF],
        cwd=go,
        env=environment(stack) | {"BYOKEEP_TRUST": str(unpinned(stack, tmp_path))},
        check=False,
    )
    assert "intake statement refused" in done.stderr
    assert stack.emulator.calls() == []


@pytest.fixture(scope="session")
def typescript() -> Path:
    shell(["npm", "ci", "--no-fund", "--no-audit"], cwd=TYPESCRIPT)
    shell(["npm", "run", "generate"], cwd=TYPESCRIPT)
    shell(["npm", "run", "build"], cwd=TYPESCRIPT)
    return TYPESCRIPT


def test_the_lock_file_names_no_registry() -> None:
    text = (TYPESCRIPT / "package-lock.json").read_text()
    assert '"resolved"' not in text
    assert '"integrity"' in text


@needs_node
def test_typescript_opens_the_vectors_and_believes_what_is_pinned(typescript: Path) -> None:
    assert "# fail 0" in shell(["npm", "test"], cwd=typescript).stdout


@needs_node
def test_typescript_adds_a_key_and_reviews_a_diff(typescript: Path, stack: Stack) -> None:
    commands = block("clients/typescript/README.md", "example").replace("my.diff", str(DIFF))
    done = shell(f"set -e\n{commands}", cwd=typescript, env=environment(stack))
    assert re.search(r"^key key_[0-9a-z]{26} VALID$", done.stdout, re.M)
    assert "CRITICAL SQL built from strings" in done.stdout
    assert KEY not in done.stdout + done.stderr


@needs_node
def test_typescript_refuses_an_unpinned_intake_key(
    typescript: Path, stack: Stack, tmp_path: Path
) -> None:
    done = shell(
        ["npm", "run", "-s", "review", "--", str(DIFF)],
        cwd=typescript,
        env=environment(stack) | {"BYOKEEP_TRUST": str(unpinned(stack, tmp_path))},
        check=False,
    )
    assert "intake statement refused" in done.stderr
    assert stack.emulator.calls() == []


def unpinned(stack: Stack, folder: Path) -> Path:
    """A trust bundle that pins another intake signing key under the same ids."""
    text = stack.trust.read_text()
    other = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    path = folder / "trust.json"
    path.write_text(re.sub(r'("isk_[0-9a-f]+": )"[^"]+"', rf'\1"{other}"', text))
    assert path.read_text() != text
    return path
