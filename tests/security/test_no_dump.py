"""17. `no_dump`: no core, and no look into the memory by another process of the same user."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from byokeep.testing import Stack

from deploy.local.processes import wait_for
from services.common import hardening
from tests.security.test_canary import add_key, fresh_key, review

PLAIN = [sys.executable, "-m", "tests.harness.plain_user"]
SERVICES = ("keyvault", "orchestrator", "runner")
_LOOK = """
import ctypes, json, sys
pid, found = sys.argv[1], {}
for name in ("environ", "maps", "mem"):
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            found[name] = "open"
    except PermissionError:
        found[name] = "refused"
ctypes.CDLL(None).ptrace.argtypes = [ctypes.c_long] * 4
attached = ctypes.CDLL(None).ptrace(16, int(pid), 0, 0)  # PTRACE_ATTACH
found["ptrace"] = "refused" if attached < 0 else "open"
print(json.dumps(found))
"""
REFUSED = dict.fromkeys(("environ", "maps", "mem", "ptrace"), "refused")


def look(pid: int) -> dict[str, str]:
    """What another process of the same user, without capabilities, may open."""
    done = subprocess.run(
        [*PLAIN, sys.executable, "-c", _LOOK, str(pid)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def no_core(pid: int) -> bool:
    limits = Path(f"/proc/{pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    return line.split()[4:6] == ["0", "0"]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(one) for task in tasks for one in (task / "children").read_text().split()]


@pytest.fixture(scope="module")
def plain() -> Iterator[Stack]:
    """A stack whose services are ordinary processes."""
    with Stack() as stack:
        for name in SERVICES:
            process = stack.process(name)
            process.stop()
            command = process._command
            if "deploy.local.warm" in command:  # it waits for its standard input's end
                command = [sys.executable, "-m", command[4], "serve"]
            process._command = [*PLAIN, *command]
            process.start()
        for name in SERVICES:
            stack.wait_ready(name)
        yield stack


@pytest.fixture
def open_process() -> Iterator[int]:
    process = subprocess.Popen(
        [*PLAIN, sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def test_no_dump_control(open_process):
    """A process that does nothing about it is open, so that the refusals below mean something."""
    found = look(open_process)
    assert found["environ"] == found["maps"] == "open"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not scope.exists() or scope.read_text().strip() == "0":
        assert found["mem"] == found["ptrace"] == "open"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SERVICES)
def test_no_dump(plain, name):
    """Shown to fail: without PR_SET_DUMPABLE, and without RLIMIT_CORE, in close_the_door."""
    pid = plain.process(name).pid
    assert look(pid) == REFUSED
    assert no_core(pid)
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.timeout(300)
def test_no_dump_of_the_runners_children(plain):
    """The zygote, and a child in the middle of its attempt with a key.

    Shown to fail: without process.harden in the zygote and close_the_door in become_child.
    """
    (zygote,) = children(plain.process("runner").pid)
    assert look(zygote) == REFUSED
    assert no_core(zygote)
    with plain.connect() as connection:
        add_key(connection, "openai", fresh_key("openai"), "no-dump")
        plain.emulator.fault("hold", provider="openai", path="chat", times=1)
        reviewing = threading.Thread(target=review, args=(connection, "openai"))
        reviewing.start()
        try:
            assert wait_for(lambda: plain.emulator.held() == 1, 60)
            (child,) = children(zygote)
            assert look(child) == REFUSED
            assert no_core(child)
        finally:
            plain.emulator.release()
            reviewing.join()


def test_no_dump_of_the_one_shot_process_of_intake():
    """Its door is closed when it says that it is ready, which is before it has anything.

    Shown to fail: with READY written before close_the_door.
    """
    process = subprocess.Popen(
        [*PLAIN, sys.executable, "-m", "services.keyvault.intake_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout.read(1) == b"\n"
            assert look(process.pid) == REFUSED
            assert no_core(process.pid)
        finally:
            process.kill()


def test_no_start_where_the_kernel_leaves_the_door_open(monkeypatch):
    """Shown to fail: without the look at PR_GET_DUMPABLE, and with prctl's result ignored."""
    monkeypatch.setattr(hardening.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(hardening, "_prctl", lambda option, *_: 1 if option == 3 else 0)
    with pytest.raises(OSError, match="open to others"):
        hardening.close_the_door()
    monkeypatch.setattr(hardening, "_prctl", lambda *_: -1)
    with pytest.raises(OSError):  # noqa: PT011 the text is the kernel's
        hardening.close_the_door()
