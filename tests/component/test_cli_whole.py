"""The command against a whole stack: each line as a new user would try it, wrong ones too."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pytest

DIFF = """diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(query, name):
+    return eval(query)
     return None
"""
CRLF = DIFF.replace("\n", "\r\n")
LONG = DIFF.replace("return eval(query)", "eval(query); x = '" + "a" * 200_000 + "'")
NO_END = DIFF.rstrip("\n") + "\n\\ No newline at end of file\n"
RENAME = """diff --git "a/caf\\303\\251 x.py" "b/caf\\303\\251 y.py"
similarity index 90%
rename from "caf\\303\\251 x.py"
rename to "caf\\303\\251 y.py"
--- "a/caf\\303\\251 x.py"
+++ "b/caf\\303\\251 y.py"
@@ -1 +1,2 @@
 a = 1
+b = eval(a)
"""
MODE_ONLY = "diff --git a/run.sh b/run.sh\nold mode 100644\nnew mode 100755\n"
BINARY = "diff --git a/x.png b/x.png\nindex 1..2 100644\nBinary files a/x.png and b/x.png differ\n"


@pytest.fixture
def byokeep(stack):
    def run(*arguments: str, stdin: str = "", **environment: str):
        return subprocess.run(
            [sys.executable, "-m", "byokeep.cli", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                "BYOKEEP_CONFIG": str(stack.config),
                "NO_COLOR": "1",
                "COLUMNS": "200",
                **environment,
            },
        )

    return run


def fresh(prefix: str = "sk-proj-") -> str:
    return prefix + secrets.token_hex(20)


@pytest.fixture
def key(byokeep):
    """An active key of its own name, gone at the end."""
    name = f"k{secrets.token_hex(4)}"
    done = byokeep("key", "add", "openai", "--name", name, "--stdin", stdin=fresh() + "\n")
    assert done.returncode == 0, done.stderr
    yield name
    byokeep("key", "destroy", name, "--yes")


@pytest.mark.parametrize(
    ("name", "diff"),
    {"plain": DIFF, "crlf": CRLF, "long line": LONG, "no end": NO_END, "rename": RENAME}.items(),
)
def test_a_review_finds_the_defect(byokeep, key, name, diff):
    done = byokeep("review", "--diff", "-", "--model", "openai/gpt-6.1-terra", stdin=diff)
    assert done.returncode == 0, done.stderr
    assert "1 finding" in done.stdout, done.stdout
    if name == "rename":
        assert "café y.py:2" in done.stdout


def test_fail_on_and_formats(byokeep, key):
    base = ("review", "--diff", "-", "--model", "openai/gpt-6.1-terra")
    assert byokeep(*base, "--fail-on", "high", stdin=DIFF).returncode == 1
    sarif = byokeep(*base, "--format", "sarif", stdin=DIFF)
    assert json.loads(sarif.stdout)["version"] == "2.1.0"
    github = byokeep(*base, "--format", "github", stdin=DIFF)
    assert json.loads(github.stdout)["comments"][0]["path"] == "app.py"
    body = byokeep(*base, "--format", "json", stdin=DIFF).stdout
    assert '"findings"' in body


def test_a_dry_run_makes_no_call(byokeep, key, stack):
    before = len(stack.emulator.calls())
    done = byokeep("review", "--diff", "-", "--dry-run", stdin=DIFF)
    assert done.returncode == 0, done.stderr
    assert "app.py" in done.stdout
    assert len(stack.emulator.calls()) == before


BAD_DIFFS = {
    "empty": ("", "empty"),
    "binary only": (BINARY, "DIFF_BINARY_ONLY"),
    "mode only": (MODE_ONLY, "DIFF_NO_TEXT"),
    "not a diff": ("sk-CANARY-hello\n", "DIFF_NOT_A_DIFF"),
    "cut": (DIFF[: DIFF.index("+    return")] + "+CANARY", "DIFF_MALFORMED"),
    "too large": (DIFF + "# CANARY\n" * 300_000, "DIFF_TOO_LARGE"),
}


@pytest.mark.parametrize(("diff", "reason"), BAD_DIFFS.values(), ids=BAD_DIFFS)
def test_a_bad_diff_is_refused_by_reason(byokeep, key, diff, reason):
    done = byokeep("review", "--diff", "-", stdin=diff)
    assert done.returncode == 2, done.stdout
    assert reason in done.stderr
    assert "CANARY" not in done.stdout + done.stderr


BAD_KEYS = {
    "space": ("sk-CANARY CANARY01234567", "KEY_CHARSET"),
    "newline": ("sk-CANARY\nCANARY01234567", "KEY_CHARSET"),
    "non-ascii": ("sk-CANARYéCANARY01234567", "KEY_CHARSET"),
    "short": ("sk-CANARY", "KEY_LENGTH"),
    "long": ("sk-CANARY" * 100, "KEY_LENGTH"),
    "admin": ("sk-admin-CANARY01234567", "KEY_IS_ADMIN"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_refused_by_reason(byokeep, text, reason):
    done = byokeep("key", "add", "openai", "--name", "bad", "--stdin", stdin=text)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "CANARY" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "add", "openai", "sk-proj-CANARYCANARYCANARY"),
        ("key", "add", "sk-proj-CANARYCANARYCANARY"),
        ("key", "add", "openai", "--key", "sk-proj-CANARYCANARYCANARY"),
        ("key", "add", "openai", "--name", "sk-proj-CANARYCANARYCANARY"),
        ("key", "rotate", "openai", "sk-ant-api03-CANARYCANARYCANARY"),
        ("sk-proj-CANARYCANARYCANARY",),
    ],
)
def test_a_key_as_an_argument_is_refused_and_not_echoed(byokeep, arguments):
    done = byokeep(*arguments)
    assert done.returncode == 2
    assert "CANARY" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("key", "add", "mistral", "--stdin"), 2, "openai"),
        (("key", "show", "key_nothere"), 2, "no key"),
        (("review", "show", "rev_nothere"), 2, "no review"),
        (("--tenant", "nobody", "key", "list"), 3, "TENANT_NOT_ALLOWED"),
        (("--profile", "auditor", "review", "--diff", "-"), 3, "SUBMITTER"),
        (("--profile", "nosuch", "key", "list"), 2, "no such profile"),
        (("model", "set", "gpt-5"), 2, "provider/model"),
        (("tenant", "create", "demo"), 2, "exists"),
        (("key", "rollback", "openai"), 2, ""),
    ],
)
def test_wrong_lines_say_what_is_wrong(byokeep, key, arguments, status, says):
    done = byokeep(*arguments, stdin=DIFF)
    assert done.returncode == status, done.stderr + done.stdout
    assert says.lower() in (done.stderr + done.stdout).lower()
    assert "Traceback" not in done.stderr


def test_the_life_of_a_key(byokeep, key, tmp_path):
    assert key in byokeep("key", "list").stdout
    assert "ACTIVE" in byokeep("key", "show", key).stdout
    again = byokeep("key", "add", "openai", "--name", key, "--stdin", stdin=fresh())
    assert again.returncode == 2
    assert "byokeep key rotate" in again.stderr
    rotated = byokeep("key", "rotate", key, "--stdin", stdin=fresh())
    assert rotated.returncode == 0, rotated.stderr
    trail = byokeep("key", "trail", key).stdout
    assert "recorded" in trail
    assert "reported" in trail
    revoked = byokeep("key", "revoke", key)
    assert revoked.returncode == 0, revoked.stderr
    assert "REVOKED" in byokeep("key", "show", key).stdout


def test_an_invalid_key_is_never_kept(byokeep):
    done = byokeep("key", "add", "openai", "--name", "inv", "--stdin", stdin=fresh("sk-invalid-"))
    assert done.returncode == 4, done.stderr
    assert "inv " not in byokeep("key", "list").stdout


def test_audit_export_verify_and_tampering(byokeep, key, tmp_path):
    """35. `audit_tamper`: any change that the signed head covers is found, and named."""
    file = tmp_path / "audit.jsonl"
    assert byokeep("audit", "export", "--output", str(file)).returncode == 0
    assert byokeep("audit", "verify", str(file)).returncode == 0
    lines = file.read_text().splitlines()
    middle = len(lines) // 2
    for changed in (
        [*lines[:middle], *lines[middle + 1 :]],
        [*lines[: middle - 1], lines[middle], lines[middle - 1], *lines[middle + 1 :]],
        [*lines[:-3], lines[-1]],
        lines[:-1],
    ):
        file.write_text("\n".join(changed) + "\n")
        assert byokeep("audit", "verify", str(file)).returncode == 6


def test_status_and_doctor(byokeep):
    assert byokeep("status").returncode == 0
    doctor = byokeep("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr


def test_json_is_json(byokeep, key):
    assert "keys" in json.loads(byokeep("--json", "key", "list").stdout)
    error = byokeep("--json", "key", "show", "key_nothere")
    assert json.loads(error.stderr)
