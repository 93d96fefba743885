"""The command against a whole stack: each line as a new user would try it, wrong ones too."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pytest

pytest_plugins = ["tests.harness.cli_fixtures"]

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


@pytest.fixture(autouse=True)
def _profile(stack, monkeypatch):
    monkeypatch.setenv("BYOKEEP_CONFIG", str(stack.config))


def fresh(prefix: str = "sk-proj-") -> bytes:
    return f"{prefix}{secrets.token_hex(20)}\n".encode()


@pytest.fixture(scope="module")
def key(byokeep_stack):
    """The name of an active key for the tests that only use it. Added by the command as a
    process of its own; elsewhere it runs in this one, which spares a start per line."""
    name = "whole"

    def process(*arguments, stdin=b""):
        done = subprocess.run(
            [sys.executable, "-m", "byokeep.cli", *arguments],
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
            env=os.environ | {"BYOKEEP_CONFIG": str(byokeep_stack.config)},
        )
        assert done.returncode == 0, done.stderr

    process("key", "add", "openai", "--name", name, "--stdin", stdin=fresh())
    yield name
    process("key", "destroy", name, "--yes")


@pytest.mark.parametrize(
    ("name", "diff"),
    {"plain": DIFF, "crlf": CRLF, "long line": LONG, "no end": NO_END, "rename": RENAME}.items(),
)
def test_a_review_finds_the_defect(byokeep, key, name, diff):
    done = byokeep("review", "--diff", "-", "--model", "openai/gpt-6.1-terra", stdin=diff.encode())
    assert done.code == 0, done.err
    assert "1 finding" in done.out, done.out
    if name == "rename":
        assert "café y.py:2" in done.out


def test_fail_on_and_formats(byokeep, key):
    base = ("review", "--diff", "-", "--model", "openai/gpt-6.1-terra")
    assert byokeep(*base, "--fail-on", "high", stdin=DIFF.encode()).code == 1
    sarif = byokeep(*base, "--format", "sarif", stdin=DIFF.encode())
    assert json.loads(sarif.out)["version"] == "2.1.0"
    github = byokeep(*base, "--format", "github", stdin=DIFF.encode())
    assert json.loads(github.out)["comments"][0]["path"] == "app.py"
    body = byokeep(*base, "--format", "json", stdin=DIFF.encode()).out
    assert '"findings"' in body


def test_a_dry_run_makes_no_call(byokeep, key, stack):
    before = len(stack.emulator.calls())
    done = byokeep("review", "--diff", "-", "--dry-run", stdin=DIFF.encode())
    assert done.code == 0, done.err
    assert "app.py" in done.out
    assert len(stack.emulator.calls()) == before


@pytest.mark.parametrize(("diff", "code"), [(MODE_ONLY, 0), (BINARY, 8)])
@pytest.mark.parametrize("form", ["text", "sarif"])
def test_a_change_without_a_line_is_a_review_without_findings(byokeep, key, diff, code, form):
    options = ("--diff", "-", "--fail-on", "info", "--format", form)
    done = byokeep("review", *options, stdin=diff.encode())
    assert done.code == code, done.err
    if form == "sarif":
        (run,) = json.loads(done.out)["runs"]
        assert (run["results"], run["invocations"][0]["executionSuccessful"]) == ([], True)
    else:
        assert "no findings" in done.out


BAD_DIFFS = {
    "empty": ("", "empty"),
    "outside": (DIFF.replace("app.py", "../CANARY"), "DIFF_MALFORMED"),
    "not a diff": ("sk-CANARY-hello\n", "DIFF_NOT_A_DIFF"),
    "cut": (DIFF[: DIFF.index("+    return")] + "+CANARY", "DIFF_MALFORMED"),
    "too large": (DIFF + "# CANARY\n" * 300_000, "DIFF_TOO_LARGE"),
}


@pytest.mark.parametrize(("diff", "reason"), BAD_DIFFS.values(), ids=BAD_DIFFS)
def test_a_bad_diff_is_refused_by_reason(byokeep, key, diff, reason):
    done = byokeep("review", "--diff", "-", stdin=diff.encode())
    assert done.code == 2, done.out
    assert reason in done.err
    assert "CANARY" not in done.out + done.err


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
    done = byokeep("key", "add", "openai", "--name", "bad", "--stdin", stdin=text.encode())
    assert done.code == 2
    assert reason in done.err
    assert "CANARY" not in done.out + done.err


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
    assert done.code == 2
    assert "CANARY" not in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("key", "add", "mistral", "--stdin"), 2, "openai"),
        (("key", "show", "key_nothere"), 2, "no key"),
        (("review", "show", "rev_nothere"), 2, "no review"),
        (("--tenant", "nobody", "key", "list"), 2, "no such tenant"),
        (("--profile", "submitter", "--tenant", "nobody", "key", "list"), 3, "TENANT_NOT_ALLOWED"),
        (("--profile", "auditor", "review", "--diff", "-"), 3, "SUBMITTER"),
        (("--profile", "nosuch", "key", "list"), 2, "no such profile"),
        (("model", "set", "gpt-5"), 2, "provider/model"),
        (("tenant", "create", "demo"), 2, "exists"),
        (("key", "rollback", "openai"), 2, ""),
    ],
)
def test_wrong_lines_say_what_is_wrong(byokeep, key, arguments, status, says):
    done = byokeep(*arguments, stdin=DIFF.encode())
    assert done.code == status, done.err + done.out
    assert says.lower() in (done.err + done.out).lower()
    assert "Traceback" not in done.err


def test_the_life_of_a_key(byokeep):
    key = f"k{secrets.token_hex(4)}"
    added = byokeep("key", "add", "openai", "--name", key, "--stdin", stdin=fresh())
    assert added.code == 0, added.err
    assert key in byokeep("key", "list").out
    assert "ACTIVE" in byokeep("key", "show", key).out
    again = byokeep("key", "add", "openai", "--name", key, "--stdin", stdin=fresh())
    assert again.code == 2
    assert "byokeep key rotate" in again.err
    rotated = byokeep("key", "rotate", key, "--stdin", stdin=fresh())
    assert rotated.code == 0, rotated.err
    trail = byokeep("key", "trail", key).out
    assert "recorded" in trail
    assert "reported" in trail
    revoked = byokeep("key", "revoke", key)
    assert revoked.code == 0, revoked.err
    assert "REVOKED" in byokeep("key", "show", key).out
    assert byokeep("key", "destroy", key, "--yes").code == 0


def test_an_invalid_key_is_never_kept(byokeep):
    done = byokeep("key", "add", "openai", "--name", "inv", "--stdin", stdin=fresh("sk-invalid-"))
    assert done.code == 4, done.err
    assert "inv " not in byokeep("key", "list").out


def test_audit_export_verify_and_tampering(byokeep, key, tmp_path):
    """35. `audit_tamper`: any change that the signed head covers is found, and named."""
    file = tmp_path / "audit.jsonl"
    assert byokeep("audit", "export", "--output", str(file)).code == 0
    assert byokeep("audit", "verify", str(file)).code == 0
    lines = file.read_text().splitlines()
    middle = len(lines) // 2
    for changed in (
        [*lines[:middle], *lines[middle + 1 :]],
        [*lines[: middle - 1], lines[middle], lines[middle - 1], *lines[middle + 1 :]],
        [*lines[:-3], lines[-1]],
        lines[:-1],
    ):
        file.write_text("\n".join(changed) + "\n")
        assert byokeep("audit", "verify", str(file)).code == 6


def test_status_and_doctor(byokeep):
    assert byokeep("status").code == 0
    doctor = byokeep("doctor")
    assert doctor.code == 0, doctor.out + doctor.err


def test_json_is_json(byokeep, key):
    assert "keys" in json.loads(byokeep("--json", "key", "list").out)
    error = byokeep("--json", "key", "show", "key_nothere")
    assert json.loads(error.err)
