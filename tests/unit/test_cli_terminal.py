"""The command as a process: a real terminal, no traceback, a closed pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time

import pytest
from byokeep.cli.base import output

from tests.unit.test_cli_trail import Life

pytest_plugins = ["tests.harness.cli_fixtures"]

KEY = "sk-proj-" + "aB3x" * 8
COMMAND = [sys.executable, "-m", "byokeep.cli"]


# Makes its standard input the terminal that Ctrl-C and /dev/tty mean, then is the command.
LAUNCH = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, sys.argv[1:])
"""


def on_a_terminal(arguments, answers, **environment):
    """Run the command on a pseudo-terminal; answer what matches; return (code, screen)."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *COMMAND, *arguments],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(end)
    try:
        screen = converse(terminal, list(answers))
        return process.wait(30), screen.decode()
    finally:
        process.kill()
        os.close(terminal)


def converse(terminal, answers):
    screen, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            screen += os.read(terminal, 65536)
        except OSError:
            break
        if answers and re.search(answers[0][0], screen):
            time.sleep(0.2)
            os.write(terminal, answers.pop(0)[1])
    return screen


def test_hidden_prompt(edge):
    code, screen = on_a_terminal(["key", "add", "openai"], [(rb"not shown", KEY.encode() + b"\n")])
    assert code == 0, screen
    assert edge.opened == [KEY.encode()]
    assert "aB3x" not in screen
    assert "VALID" in screen


def test_destroy_asks_on_a_terminal(edge):
    edge.add_key()
    code, screen = on_a_terminal(["key", "destroy", "openai"], [(rb"y/N", b"n\n")])
    assert code == 2
    assert "nothing was done" in screen


def test_tenant_is_deleted_after_its_name_is_typed(edge):
    code, screen = on_a_terminal(["tenant", "delete", "demo"], [(rb"type its name", b"demo\n")])
    assert code == 0, screen
    assert "is deleted" in screen


def test_colour_on_a_terminal_and_none_with_no_color(edge):
    edge.add_key()
    lines = ("key trail openai", "key show gemini", "status", "--help")
    plain = "".join(on_a_terminal(line.split(), [], NO_COLOR="1")[1] for line in lines)
    _, coloured = on_a_terminal(["key", "list"], [], TERM="xterm")
    assert "\x1b[32m" in coloured
    assert "Usage" in plain
    assert not re.search(r"\x1b\[[0-9;]*m", plain)


def test_a_trail_wraps_under_where_its_lines_begin(edge):
    key_id = edge.add_key()
    life = Life(edge.chain, key_id).lease(100, 300, released=320)
    edge.uses = life.uses
    _, screen = on_a_terminal(["key", "trail", "openai"], [], COLUMNS="60", NO_COLOR="1")
    lines = screen.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 60
    lease = edge.chain.events[-1].lease_id
    assert f"{'│':<26}{lease}" in lines


def test_a_table_that_is_too_wide_is_shown_row_by_row(edge):
    key_id = edge.add_key()
    _, screen = on_a_terminal(["key", "list"], [], COLUMNS="60", NO_COLOR="1")
    first, *rest = screen.replace("\r", "").splitlines()
    assert first == key_id
    assert rest[0].startswith("  provider openai  name default  state ACTIVE")


def test_a_table_that_is_too_wide_for_columns_is_no_other_in_a_pipe(edge):
    key_id = edge.add_key()
    environment = os.environ | {"COLUMNS": "60"}
    done = subprocess.run(
        [*COMMAND, "key", "list"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[0] == key_id


def test_ctrl_c_says_how_to_go_on(edge):
    edge.states = [{"state": 2}, "wait"]
    code, screen = on_a_terminal(
        ["review", "--diff", str(edge.directory / "config.toml")], [(rb"running", b"\x03")]
    )
    assert code == 130
    assert re.search(r"byokeep review show rev_\w{26} --watch", screen)
    assert re.search(r"byokeep review cancel rev_\w{26}", screen)


@pytest.mark.parametrize("debug", ["", "1"])
def test_traceback_only_when_asked_for(edge, tmp_path, debug):
    (edge.directory / "developer.pem").write_text("no certificate")
    done = subprocess.run(
        [*COMMAND, "status"],
        capture_output=True,
        text=True,
        env=os.environ | {"BYOKEEP_DEBUG": debug},
        timeout=60,
    )
    assert done.returncode != 0
    assert ("Traceback" in done.stderr) is bool(debug)


def test_a_reader_that_goes_away_is_no_error(edge):
    for _ in range(40):
        edge.chain.add("STAGED", key_id="key_" + "0" * 26, actor="x" * 4000)
    process = subprocess.Popen(
        [*COMMAND, "audit", "export"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_a_reader_that_goes_away_from_a_table_is_no_error_either(monkeypatch):
    """rich would exit 1, which means that --fail-on matched. Shown to fail with its own Console."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        output._console(False, stderr=False).print("x")


@pytest.mark.parametrize("arguments", ["key list", "--help", "review --diff x --fail-on low"])
def test_a_closed_standard_output_is_told_before_anything_is_done(edge, arguments):
    """Shown to fail: Python's None in its stead is an AttributeError, with a traceback for help."""
    ended = _in_a_shell(f"{arguments} >&-")
    assert ended.returncode == 2
    assert ended.stderr.decode().startswith("error: standard output is closed")
    assert edge.requests == []


@pytest.mark.parametrize("arguments", ["key list", "--help"])
def test_an_output_that_takes_no_more_is_told(edge, arguments):
    """Shown to fail where the last flush is left to the interpreter, whose exit code is 120."""
    ended = _in_a_shell(f"{arguments} >/dev/full")
    assert ended.returncode == 2
    assert ended.stderr == b"error: input or output: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("key add openai", "no terminal"),
        ("key add openai --stdin", "no key on standard input"),
        ("review --diff -", "standard input is empty"),
    ],
)
def test_a_closed_standard_input_is_an_empty_one(edge, arguments, said):
    ended = _in_a_shell(f"{arguments} <&-")
    assert ended.returncode == 2
    assert said in ended.stderr.decode()


def test_a_closed_standard_error_takes_nothing_from_the_answer(edge):
    key_id = edge.add_key()
    ended = _in_a_shell("key list 2>&-")
    assert ended.returncode == 0
    assert key_id in ended.stdout.decode()


def _in_a_shell(line):
    script = f"{shlex.join(COMMAND)} {line}"
    return subprocess.run(["/bin/sh", "-c", script], capture_output=True, timeout=60)


def test_help_whose_reader_is_gone_matched_no_finding_either():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        ended = subprocess.run([*COMMAND, "admin", "--help"], stdout=gone, check=False)
    assert ended.returncode == 141


def test_completion_works(edge):
    done = subprocess.run(
        COMMAND,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "_BYOKEEP_COMPLETE": "complete_bash",
            "COMP_WORDS": "byokeep key ro",
            "COMP_CWORD": "2",
        },
        timeout=60,
    )
    assert done.stdout.split() == ["rotate", "roll-back"]
