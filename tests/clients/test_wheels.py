"""What is installed: wheels that are whole or not built, on the oldest and newest libraries."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.clients.conftest import BIN, ROOT, build_wheel, shell, tracked

CLIENT = "clients/python"
PACKAGE = f"{CLIENT}/src/byokeep"
ZONES = ("common", "keyvault", "orchestrator", "runner")
# The client's tests that need no database and few processes.
LIBRARY = ("client", "client_following", "profile", "sealing", "sealing_vectors", "keyshape")
COMMAND = ("cli_keys", "auditlog_view")


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_of_a_fresh_clone_is_whole(client_wheel: Path) -> None:
    names = _names(client_wheel)
    written = {
        name.removeprefix(f"{CLIENT}/src/") for name in tracked(PACKAGE) if name.endswith(".py")
    }
    assert written <= names
    for path in ROOT.glob("protos/byokeep/*/v1/*.proto"):
        stem = path.relative_to(ROOT / "protos").with_suffix("")
        assert {f"{stem}_pb2.py", f"{stem}_pb2.pyi", f"{stem}_pb2_grpc.py"} <= names
    assert {"byokeep/py.typed", "byokeep/_buf/validate/validate_pb2.py"} <= names
    assert {name.split("/")[0] for name in names} == {"byokeep", "byokeep-0.1.0.dist-info"}


def test_readme_licence_and_changelog_are_in_it(client_wheel: Path) -> None:
    with zipfile.ZipFile(client_wheel) as archive:
        about = archive.read("byokeep-0.1.0.dist-info/METADATA").decode()
        for name in ("LICENSE", "CHANGELOG.md"):
            text = archive.read(f"byokeep-0.1.0.dist-info/licenses/{name}").decode()
            assert text == (ROOT / CLIENT / name).read_text()
    assert (ROOT / CLIENT / "README.md").read_text() in about
    assert "License-Expression: Apache-2.0" in about
    assert (ROOT / CLIENT / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_pip_builds_it_too_and_leaves_the_checkout_as_it_was(clone: Path, tmp_path: Path) -> None:
    shell(
        [BIN / "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, CLIENT],
        cwd=clone,
    )
    assert len(list(tmp_path.glob("*.whl"))) == 1
    assert not [zone for zone in ZONES if (clone / PACKAGE / zone).exists()]


def test_without_protos_nothing_is_built(clone: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(clone / CLIENT, alone)
    done = shell(
        ["uv", "build", "--wheel", "--out-dir", tmp_path, alone], cwd=tmp_path, check=False
    )
    assert done.returncode
    assert "protos/" in done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_an_sdist_is_whole_and_builds_the_same_wheel(
    clone: Path, client_wheel: Path, tmp_path: Path
) -> None:
    shell(
        ["uv", "build", "--quiet", "--sdist", "--out-dir", tmp_path, clone / CLIENT], cwd=tmp_path
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("README.md", "LICENSE", "CHANGELOG.md"):
        assert (source / name).read_text() == (ROOT / CLIENT / name).read_text()
    (tmp_path / "built").mkdir()
    assert _names(build_wheel(source, tmp_path / "built")) == _names(client_wheel)


def test_the_services_wheel_is_whole_and_keeps_to_one_name(services_wheel: Path) -> None:
    names = _names(services_wheel)
    written = {
        f"byokeep_services/{name}"
        for name in tracked("services", "deploy/local")
        if not name.startswith("deploy/local/prove/")
    }
    assert written <= names
    assert {name.split("/")[0] for name in names} == {
        "byokeep_services",
        "byokeep_services-0.1.0.dist-info",
    }


@pytest.fixture
def installed(tmp_path: Path, client_wheel: Path):
    """Install the client's wheel into a virtual environment of its own."""

    def install(extra: str, resolution: str) -> Path:
        shell(["uv", "venv", "--quiet", tmp_path / "venv"], cwd=tmp_path)
        python = tmp_path / "venv" / "bin" / "python"
        install = ["uv", "pip", "install", "--quiet", "--python", python]
        wanted = f"byokeep{extra} @ {client_wheel.as_uri()}"
        shell([*install, "--resolution", resolution, wanted], cwd=tmp_path)
        versions = shell(["uv", "pip", "freeze", "--python", python], cwd=tmp_path).stdout
        (tmp_path / "held.txt").write_text(
            "".join(line + "\n" for line in versions.splitlines() if "@" not in line)
        )
        tools = ["pytest", "pytest-asyncio", "pytest-timeout", "hypothesis"]
        shell([*install, "--constraint", "held.txt", *tools], cwd=tmp_path)
        return python

    return install


@pytest.mark.parametrize(
    ("extra", "tests", "resolution"),
    [
        ("", LIBRARY, "lowest-direct"),
        ("", LIBRARY, "highest"),
        ("[cli]", COMMAND, "lowest-direct"),
    ],
)
def test_the_clients_tests_pass_on_the_wheel(
    installed, clone: Path, extra, tests, resolution
) -> None:
    python = installed(extra, resolution)
    where = shell([python, "-c", "import byokeep; print(byokeep.__file__)"], cwd=clone).stdout
    assert "site-packages" in where
    files = [f"tests/unit/test_{name}.py" for name in tests]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *files],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
