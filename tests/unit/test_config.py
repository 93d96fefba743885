"""Settings: what is missing or wrong is named, with what is allowed, and not echoed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from services.common.config import ConfigError, load, read_secret_file
from services.keyvault.config import Settings
from services.keyvault.kek.keyring import Keyring, load_keyring, new_keyring

GOOD = {
    "BYOKEEP_DEPLOYMENT": "test",
    "BYOKEEP_TRUST_DOMAIN": "byokeep.test",
    "BYOKEEP_LISTEN": "127.0.0.1:0",
    "BYOKEEP_HEALTH_LISTEN": "127.0.0.1:0",
    "BYOKEEP_TLS_CERT": "c.pem",
    "BYOKEEP_TLS_KEY": "c.key",
    "BYOKEEP_TLS_CA": "ca.pem",
    "BYOKEEP_CALLERS": "runner=spiffe://byokeep.test/runner",
    "BYOKEEP_DATABASE_URL_FILE": "url",
    "BYOKEEP_ANCHOR_FILE": "anchor",
    "BYOKEEP_GRANT_KEYS_DIR": "grants",
}
CANARY = "sk-CANARY-in-the-wrong-place"


def test_good_settings_load():
    settings = load(Settings, GOOD)
    assert settings.mode == "production"
    assert settings.tls.key.name == "c.key"


@pytest.mark.parametrize("name", [name for name in GOOD if name != "BYOKEEP_ANCHOR_FILE"])
def test_a_missing_setting_is_named(name):
    with pytest.raises(ConfigError, match=f"{name} is not set: "):
        load(Settings, {**GOOD, name: ""})


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("BYOKEEP_MODE", "production, development"),
        ("BYOKEEP_LOG_LEVEL", "debug, info, warning, error"),
        ("BYOKEEP_KEK_BACKEND", "local"),
        ("BYOKEEP_INTAKE_PER_HOUR", "whole number"),
        ("BYOKEEP_ALLOW_LOCAL_KEK", "yes or no"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(name, allowed):
    with pytest.raises(ConfigError, match=name) as error:
        load(Settings, {**GOOD, name: CANARY})
    assert allowed in str(error.value)
    assert "CANARY" not in str(error.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        load(Settings, {"BYOKEEP_MODE": "x"})
    # All but the anchor's file, which may be in Vault instead, and the wrong mode.
    assert str(error.value).count("\n") == len(GOOD) - 1


def test_local_keks_in_production_are_said_on_purpose():
    with pytest.raises(ConfigError, match="BYOKEEP_ALLOW_LOCAL_KEK=yes"):
        load(Settings, GOOD).check()
    load(Settings, {**GOOD, "BYOKEEP_ALLOW_LOCAL_KEK": "yes"}).check()
    load(Settings, {**GOOD, "BYOKEEP_MODE": "development"}).check()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_secret_file_that_others_read_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    path.write_text(CANARY)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600") as error:
        read_secret_file("BYOKEEP_X", path)
    assert "CANARY" not in str(error.value)


def _file(folder, text):
    path = folder / "byokeep-keyring"
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def test_a_keyring_comes_from_a_file_the_environment_or_systemd(tmp_path):
    text = new_keyring()
    path = _file(tmp_path, text)
    for file, environ in (
        (path, {}),
        (None, {"BYOKEEP_KEYRING": text}),
        (None, {"CREDENTIALS_DIRECTORY": str(tmp_path)}),
    ):
        assert load_keyring(file, environ).primary == "1"


def test_two_keyrings_or_none_are_refused(tmp_path):
    text = new_keyring()
    with pytest.raises(ConfigError, match="both set"):
        load_keyring(_file(tmp_path, text), {"BYOKEEP_KEYRING": text})
    with pytest.raises(ConfigError, match="no keyring"):
        load_keyring(None, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        CANARY,
        "[]",
        "{}",
        json.dumps({"keys": {"1": CANARY}, "primary": "1"}),
        json.dumps({"keys": {"1": "AAAA"}, "primary": "1"}),
        json.dumps({"keys": {}, "primary": "1"}),
        json.dumps({"keys": ["1"], "primary": "1"}),
    ],
)
def test_a_malformed_keyring_is_refused_and_not_shown(text):
    with pytest.raises(ConfigError, match="not of the form") as error:
        Keyring.parse(text)
    assert "CANARY" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_keyring_shows_ids_only():
    text = new_keyring()
    secret = json.loads(text)["keys"]["1"]
    assert secret not in repr(Keyring.parse(text))


@pytest.mark.parametrize("zone", ["keyvault", "orchestrator", "llm_runner"])
def test_a_service_says_what_it_lacks_and_exits(zone):
    done = subprocess.run(
        [sys.executable, "-m", f"services.{zone}", "serve"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "BYOKEEP_DEPLOYMENT is not set" in done.stderr
    assert "Traceback" not in done.stderr
