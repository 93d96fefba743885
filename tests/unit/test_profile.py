"""trust.json and config.toml: what is read, and what is refused with a name."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byokeep.client import connect
from byokeep.profile import ProfileError, find_config, load_profile, load_trust
from byokeep.transport import TlsFiles

from deploy.local.pki import CertificateAuthority
from tests.harness.chain import SigningKey

CA = CertificateAuthority.new("byokeep.test").pem
PROFILE = """
orchestrator = "127.0.0.1:1"
orchestrator_name = "orchestrator.byokeep.internal"
trust = "trust.json"
certificate = "me.pem"
key = "me.key"
"""


def trust(**changes):
    key = base64.b64encode(SigningKey("isk").public.public_bytes_raw()).decode()
    return {
        "deployment": "test",
        "ca": [CA],
        "intake_signing_keys": {"isk_1": key},
        "audit_log_keys": {"alk_1": key},
    } | changes


@pytest.fixture
def config(tmp_path):
    (tmp_path / "trust.json").write_text(json.dumps(trust()))
    (tmp_path / "me.pem").write_text("certificate")
    (tmp_path / "me.key").write_text("key")
    (tmp_path / "me.key").chmod(0o600)
    path = tmp_path / "config.toml"
    path.write_text(f"[profiles.demo]{PROFILE}")
    return path


def test_paths_are_relative_to_the_file(config):
    profile = load_profile(config=config)
    assert profile.name == "demo"
    assert profile.certificate == config.parent / "me.pem"
    assert profile.trust.deployment == "test"
    assert profile.keyvault is None
    assert profile.read_identity() == (b"certificate", b"key")


def test_default_profile_and_named_profile(config):
    both = (
        f'default_profile = "two"\n[profiles.one]{PROFILE}\n[profiles.two]{PROFILE}tenant = "t"\n'
    )
    config.write_text(both)
    assert load_profile(config=config).tenant == "t"
    assert load_profile("one", config).name == "one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no \\[profiles"),
        ("x = ", "not TOML"),
        ("profiles = 3", "no \\[profiles"),
        (f"[profiles.a]{PROFILE}[profiles.b]{PROFILE}", "several profiles"),
        ('default_profile = "x"\n[profiles.a]', "no such profile"),
        (f"[profiles.a]{PROFILE}proxy = 'proxy:3128'", "http://HOST:PORT"),
        (f"[profiles.a]{PROFILE}tenant = 'Acme!'", "`tenant` must be"),
        (f"[profiles.a]{PROFILE.replace('127', 'https://127')}", "must be HOST:PORT"),
        (f"[profiles.a]{PROFILE.replace(':1', ':99999')}", "must be HOST:PORT"),
        ("default_profile = []\n[profiles.a]", "default_profile must be"),
        ("[profiles.a]" + PROFILE.replace("trust.json", "\\u0000"), "NUL"),
        ("[profiles.a]", "no `orchestrator`"),
        (f"[profiles.a]{PROFILE}tenent = 'x'", "unknown setting tenent"),
        (f"[profiles.a]{PROFILE}keyvault = 'h:1'", "no `keyvault_name`"),
        (f"[profiles.a]{PROFILE.replace('me.key', '')}", "no `key`"),
        (f"[profiles.a]{PROFILE.replace('trust.json', 'none.json')}", "can't be read"),
    ],
)
def test_a_wrong_config_is_named(config, text, said):
    config.write_text(text)
    with pytest.raises(ProfileError, match=said):
        load_profile(config=config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deployment": ""}, "deployment"),
        ({"deployment": 3}, "deployment"),
        ({"ca": []}, "ca"),
        ({"ca": ["/etc/ssl/ca.pem"]}, "ca"),
        ({"ca": CA}, "ca"),
        ({"ca": [CA.replace("MII", "AII")]}, "ca"),
        ({"intake_signing_keys": []}, "intake_signing_keys"),
        ({"intake_signing_keys": {"isk_1": "short"}}, "intake_signing_keys"),
        ({"audit_log_keys": {"alk_1": base64.b64encode(bytes(31)).decode()}}, "audit_log_keys"),
        ({"audit_log_keys": {"alk_1": None}}, "audit_log_keys"),
    ],
)
def test_a_wrong_trust_bundle_is_named(tmp_path, changes, said):
    path = tmp_path / "trust.json"
    path.write_text(json.dumps(trust(**changes)))
    with pytest.raises(ProfileError, match=said):
        load_trust(path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_trust_bundle(tmp_path, text):
    (tmp_path / "trust.json").write_text(text)
    with pytest.raises(ProfileError):
        load_trust(tmp_path / "trust.json")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(config, mode):
    """Shown to fail: without the check of the mode, a key that came with a repository is used."""
    (config.parent / "me.key").chmod(mode)
    with pytest.raises(ProfileError, match="others") as caught:
        load_profile(config=config).read_identity()
    assert caught.value.hint.startswith("chmod 600")


@pytest.fixture
def checkout(tmp_path):
    """A checkout with its own config file; what find_config is told of it."""
    root = tmp_path / "checkout"
    config = root / ".byokeep" / "config.toml"
    config.parent.mkdir(parents=True, mode=0o700)
    config.touch(mode=0o600)
    package = root / "clients" / "python" / "src" / "byokeep"
    package.mkdir(parents=True)
    return config, {"prefix": root / ".venv", "package": package}


def test_where_the_config_is_looked_for(tmp_path, checkout):
    config, place = checkout
    environ = {"HOME": str(tmp_path / "home")}
    in_home = tmp_path / "home" / ".config" / "byokeep" / "config.toml"
    elsewhere = {"prefix": tmp_path / "other" / ".venv", "package": place["package"]}
    assert find_config(environ, **elsewhere) is None
    in_home.parent.mkdir(parents=True)
    in_home.touch()
    assert find_config(environ, **elsewhere) == in_home
    assert find_config(environ, **place) == config
    assert find_config(environ | {"BYOKEEP_CONFIG": "named"}, **place) == Path("named")


def test_the_working_directory_brings_no_config(checkout, monkeypatch, tmp_path):
    """Shown to fail with the search in the working directory: a cloned repository names the
    endpoint, the CA and the intake keys, and so gets the customer's key sealed to itself."""
    config, _ = checkout
    inside = config.parents[1] / "src"
    inside.mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    for directory in (inside, config.parents[1]):
        monkeypatch.chdir(directory)
        assert find_config({"HOME": str(tmp_path)}) is None


def test_a_virtual_environment_in_a_foreign_repository_brings_no_config(checkout, tmp_path):
    """Shown to fail without the comparison of `package`."""
    _, place = checkout
    installed = place["prefix"] / "lib" / "python3.11" / "site-packages" / "byokeep"
    environ = {"HOME": str(tmp_path)}
    assert find_config(environ, prefix=place["prefix"], package=installed) is None


def test_this_environment_looks_in_its_checkout(tmp_path, checkout):
    """A copy of the package, run by an interpreter of the checkout, from another directory."""
    config, place = checkout
    import byokeep

    shutil.copytree(Path(byokeep.__file__).parent, place["package"], dirs_exist_ok=True)
    (place["prefix"] / "bin").mkdir(parents=True)
    code = "import sys; sys.prefix = sys.argv[1]\n"
    code += "from byokeep.profile import find_config; print(find_config())"
    found = subprocess.run(
        [sys.executable, "-c", code, str(place["prefix"])],
        env={"HOME": str(tmp_path), "PYTHONPATH": str(place["package"].parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == str(config), found.stderr


@pytest.mark.parametrize("what", ["config.toml", "trust.json", "."])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_refused(config, what, mode):
    """Shown to fail without `_check_owned`, in `_profiles` and in `load_trust`."""
    path = config.parent / what
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(ProfileError, match="writable by others") as caught:
        load_profile(config=config)
    assert caught.value.hint.endswith(f"chmod go-w {path}")


@pytest.mark.parametrize("what", ["config.toml", "trust.json"])
def test_what_another_user_owns_is_refused(config, what, monkeypatch):
    """Shown to fail without `_check_owned`, in `_profiles` and in `load_trust`."""
    if os.geteuid() == 0:
        os.chown(config.parent / what, 4321, 4321)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(ProfileError, match="another user"):
        load_profile(config=config)


def test_a_link_into_a_folder_of_others_is_refused(config, tmp_path):
    """Shown to fail where only the link's own folder is looked at."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (config.parent / "trust.json").rename(shared / "trust.json")
    (config.parent / "trust.json").symlink_to(shared / "trust.json")
    assert load_profile(config=config).name == "demo"
    shared.chmod(0o777)
    with pytest.raises(ProfileError, match="writable by others"):
        load_profile(config=config)


def test_a_folder_where_nobody_replaces_files_of_others_will_do(config):
    config.parent.chmod(0o1777)
    assert load_profile(config=config).name == "demo"


def test_a_config_with_a_byte_order_mark_is_read(config):
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert load_profile(config=config).name == "demo"


@pytest.mark.parametrize("nested", ["[" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_what_is_nested_too_deep_is_told(config, nested):
    """Shown to fail with json's and tomllib's RecursionError let through."""
    trusted = (config.parent / "trust.json").read_text()
    (config.parent / "trust.json").write_text(nested)
    with pytest.raises(ProfileError, match="nested too deep"):
        load_profile(config=config)
    (config.parent / "trust.json").write_text(trusted)
    config.write_text(f"x = {nested}")
    with pytest.raises(ProfileError, match="nested too deep"):
        load_profile(config=config)


@pytest.mark.parametrize("name", ["config.toml", "trust.json", "me.key"])
def test_a_device_a_pipe_and_a_heap_are_not_read(config, name):
    """Shown to fail with `read_bytes`: /dev/zero takes all memory, a pipe hangs."""
    path = config.parent / name
    for kind in ("device", "pipe", "heap"):
        path.unlink()
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(b" " * 1_048_577)
        with pytest.raises(ProfileError, match=r"not a regular file|longer than"):
            load_profile(config=config).read_identity()


def test_no_config_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BYOKEEP_CONFIG", raising=False)
    with pytest.raises(ProfileError) as caught:
        load_profile()
    assert "make up" in caught.value.hint


def test_a_connection_without_a_profile(config):
    files = TlsFiles(config.parent / "me.pem", config.parent / "me.key", config.parent / "ca.pem")
    files.ca.write_text(CA)
    with connect(
        orchestrator="127.0.0.1:1",
        orchestrator_name="orchestrator.byokeep.internal",
        tls=files,
        trust=config.parent / "trust.json",
        tenant="demo",
    ) as connection:
        assert connection.parent == "tenants/demo"
        assert connection.trust.ca == CA.encode()
        with pytest.raises(ProfileError, match="no keyvault address"):
            _ = connection.audit


@pytest.mark.parametrize("lacking", ["orchestrator_name", "tls", "trust"])
def test_an_explicit_connection_is_whole_or_refused(config, lacking):
    files = TlsFiles(config, config, config)
    given = {"orchestrator_name": "o", "tls": files, "trust": config.parent / "trust.json"}
    del given[lacking]
    with pytest.raises(ProfileError):
        connect(orchestrator="127.0.0.1:1", **given)


def test_a_tenant_has_to_be_chosen(config):
    with connect(config=config) as connection, pytest.raises(ProfileError, match="no tenant"):
        _ = connection.parent
    with connect(config=config, tenant="acme") as connection:
        assert connection.tenant == "acme"


def test_the_package_itself_loads_no_grpc():
    code = "import sys, byokeep, byokeep.sealing; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
