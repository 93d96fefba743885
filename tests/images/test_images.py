"""Each zone's image: what is in it, what is not, and that it is what was signed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.docker import images, signing
from deploy.docker.__main__ import main
from deploy.docker.images import Tree
from deploy.docker.layout import TARGET, ZONES
from tests.harness import engine
from tests.images.conftest import TAG

pytestmark = pytest.mark.timeout(1800)
_ROOT = Path(__file__).resolve().parents[2]
_SERVICES = tuple(zone for zone in ZONES if zone != "tools")
_SQL = {"psycopg", "psycopg-binary", "sqlalchemy", "alembic"}
_KEK = {"hvac", "boto3", "botocore"}
_PROVIDERS = {"httpx", "httpcore"}
# What would break a zone's boundary if it were there.
_FOREIGN = {
    "keyvault": _PROVIDERS | {"boto3"},
    "keyvault-aws-kms": _PROVIDERS,
    "orchestrator": _KEK | _PROVIDERS,
    "runner": _KEK | _SQL,
}
_BASE = "byokeep/base:again"
_MEBIBYTES = {"keyvault": 120, "keyvault-aws-kms": 160, "orchestrator": 150, "runner": 120}


def _locked(zone: str) -> set[str]:
    text = (_ROOT / f"requirements/{ZONES[zone].requirements}.txt").read_text()
    return {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text, re.M)}


def _python(zone: str, code: str, *options: str) -> str:
    command = ["run", "--rm", "--read-only", "--network=none", *options]
    image = images.reference(zone, TAG)
    return images.docker(*command, f"--entrypoint={TARGET}/bin/python", image, "-c", code)


@pytest.mark.parametrize("zone", _SERVICES)
def test_packages_are_those_of_the_zones_lock(trees: dict[str, Tree], zone: str):
    found = set(images.distributions(trees[zone]))
    assert found - _locked(zone) == set()
    assert {"grpcio", "cryptography"} <= found
    assert found & _FOREIGN[zone] == set()


@pytest.mark.parametrize("zone", _SERVICES)
def test_code_is_the_zones_own(trees: dict[str, Tree], zone: str):
    code = {entry.path.partition("site-packages/")[2] for entry in trees[zone].entries}
    services = {path.split("/")[1] for path in code if path.startswith("services/")}
    assert services == {Path(folder).name for folder in ZONES[zone].code}
    assert not {path for path in code if path.startswith(("byokeep/cli", "byokeep/testing"))}
    assert not {path for path in code if path.startswith(("deploy/", "tests/"))}


def test_the_orchestrators_image_has_no_code_that_opens_a_key(trees: dict[str, Tree]):
    paths = {entry.path for entry in trees["orchestrator"].entries}
    assert not {path for path in paths if re.search(r"byokeep/(hpke|sealing|leasing)\.", path)}
    loads = "import byokeep.transport; import byokeep.hpke"
    with pytest.raises(images.ImageError, match=r"No module named 'byokeep.hpke'"):
        _python("orchestrator", loads)


@pytest.mark.parametrize("zone", ZONES)
def test_there_is_no_program_but_python(trees: dict[str, Tree], zone: str):
    folders = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin")
    programs = {
        entry.path
        for entry in trees[zone].entries
        if entry.path.rpartition("/")[0] in folders and entry.kind != "5"
    }
    assert programs
    assert {path for path in programs if not re.search(r"/python3?(\.\d+)?$", path)} == set()
    assert not {entry.path for entry in trees[zone].entries if entry.mode & 0o6000}
    assert not [name for name in images.distributions(trees[zone]) if name in ("pip", "setuptools")]


@pytest.mark.parametrize("zone", ZONES)
def test_nothing_in_it_is_the_users_to_change(trees: dict[str, Tree], zone: str):
    inspected = images.docker("image", "inspect", images.reference(zone, TAG))
    settings = json.loads(inspected)[0]["Config"]
    assert settings["User"] == "65532:65532"
    labels = settings["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == TAG
    assert labels["dev.byokeep.zone"] == zone
    assert {entry.owner for entry in trees[zone].entries} == {(0, 0)}
    writable = {
        entry.path for entry in trees[zone].entries if entry.mode & 0o022 and entry.kind != "2"
    }
    assert writable == {"tmp", "var/tmp"}


@pytest.mark.parametrize("zone", _SERVICES)
def test_it_starts_without_writing_and_names_what_is_missing(docker: None, zone: str, trees):
    image = images.reference(zone, TAG)
    started = subprocess.run(
        ["docker", "run", "--rm", "--read-only", "--cap-drop=ALL", "--network=none", image],
        check=False,
        capture_output=True,
        text=True,
    )
    assert started.returncode != 0
    assert "BYOKEEP_TLS_KEY is not set" in started.stderr
    assert "Traceback" not in started.stderr


@pytest.mark.parametrize("zone", _SERVICES)
def test_it_is_small(trees: dict[str, Tree], zone: str):
    code = (
        "import os\n"
        f"walk = os.walk('{TARGET}')\n"
        "print(sum(os.lstat(os.path.join(d, n)).st_size for d, _, names in walk for n in names))"
    )
    assert int(_python(zone, code)) < _MEBIBYTES[zone] * 2**20


@pytest.mark.parametrize("zone", ZONES)
def test_its_bill_of_materials_is_whole(trees: dict[str, Tree], zone: str):
    bill = json.loads(trees[zone].sbom)
    assert bill["bomFormat"] == "CycloneDX"
    listed = {re.sub(r"[_.]", "-", part["name"].lower()): part for part in bill["components"]}
    assert set(listed) == set(images.distributions(trees[zone]))
    # protobuf's wheel names none in its metadata; it is BSD-3-Clause.
    assert {name for name, part in listed.items() if not part.get("licenses")} == {"protobuf"}
    assert f"{TARGET}/LICENSE".lstrip("/") in {entry.path for entry in trees[zone].entries}


def test_a_build_from_another_clone_has_the_same_tree(trees: dict[str, Tree], tmp_path):
    zone = "keyvault"  # has the most packages
    clone = tmp_path / "clone"
    shutil.copytree(
        _ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".byokeep")
    )
    for path in clone.rglob("*"):
        # As a strict umask leaves a checkout, later.
        path.chmod(0o700 if path.is_dir() else 0o600)
    time.sleep(1.1)  # times of files are whole seconds in a layer
    # On a base of its own: of equal steps the legacy builder takes the newest from its cache, so
    # that these would be the next build's, whose files are not as strict.
    (tmp_path / "base").mkdir()
    (tmp_path / "base/Dockerfile").write_text(f"FROM {engine.PYTHON}\nLABEL run={uuid.uuid4()}\n")
    images.docker("build", f"--tag={_BASE}", str(tmp_path / "base"))
    again = images.tree(images.build(zone, "again", context=clone, base=_BASE))
    ours, theirs = set(trees[zone].entries), set(again.entries)
    assert sorted(entry.path for entry in ours ^ theirs) == []
    assert trees[zone].digest == again.digest


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A signing key's file; its public half is beside it, `.pub`."""
    private = Ed25519PrivateKey.generate()
    file = tmp_path / "release.pem"
    file.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    file.with_suffix(".pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return file


def test_a_signed_image_verifies_and_a_changed_one_does_not(trees, key, tmp_path, capsys):
    image = images.reference("runner", TAG)
    assert main(["sign", image, "--key", str(key)]) == 0
    statement = tmp_path / "statement.json"
    statement.write_text(capsys.readouterr().out)
    verify = ["verify", image, str(statement), "--key", str(key.with_suffix(".pub"))]
    assert main(verify) == 0

    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nCOPY release.pub /opt/byokeep/more.py\n")
    images.docker("build", "--tag", "byokeep/runner:changed", str(tmp_path))
    changed = ["verify", "byokeep/runner:changed", *verify[2:]]
    assert main(changed) == 1
    assert "its tree differs" in capsys.readouterr().err


def test_a_statement_of_another_key_or_text_is_refused(trees, key, tmp_path):
    image = images.reference("runner", TAG)
    statement = signing.sign(image, key)
    other = Ed25519PrivateKey.generate().public_key()
    pem = other.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "other.pub").write_bytes(pem)
    with pytest.raises(signing.SignatureError, match="does not verify"):
        signing.verify(image, statement, tmp_path / "other.pub")
    forged = json.loads(statement)
    forged["payload"] = json.loads(signing.sign(images.reference("tools", TAG), key))["payload"]
    with pytest.raises(signing.SignatureError, match="does not verify"):
        signing.verify(image, json.dumps(forged), key.with_suffix(".pub"))
    with pytest.raises(signing.SignatureError, match="not a signed in-toto statement"):
        signing.verify(image, "{}", key.with_suffix(".pub"))
    tools = signing.sign(images.reference("tools", TAG), key)
    with pytest.raises(signing.SignatureError, match="tree differs"):
        signing.verify(image, tools, key.with_suffix(".pub"))
