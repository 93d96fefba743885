"""`one_shot_child` (18, the process part): one attempt per child; the child is gone when the
attempt is, and when its parent is. Also the runner's part of 27 and 45.

Shown to fail: see each test's docstring.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id
from byokeep.keyvault.v1 import grant_pb2, lease_pb2
from byokeep.orchestrator.v1 import review_pb2

from deploy.local.processes import alive, wait_for
from tests.component.runner.harness import ROOT, running_bench


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    with running_bench(tmp_path_factory.mktemp("runner")) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench):
    return shared_bench.as_new()


_LOADED = """
import sys, services.llm_runner.zygote
print([name for name in sys.modules if name.partition(".")[0] in ("grpc", "grpc_health")])
"""


def held_review(bench):
    """A review whose provider call is in flight: its child holds the key."""
    bench.emulator.control.fault("hold")
    attempt = bench.review()
    attempt.ack(attempt.until("call_started").sequence)
    assert wait_for(bench.emulator.control.held)
    return attempt


def test_each_attempt_has_a_child_of_its_own_and_none_is_left(bench):
    attempts = [bench.review(), bench.review()]
    for attempt in attempts:
        attempt.finish()
    attempts.append(bench.validation())
    attempts[-1].finish()

    assert len({attempt.pid for attempt in attempts}) == 3
    assert not any(alive(attempt.pid) for attempt in attempts)
    assert not bench.children


def test_the_child_is_gone_before_its_outcome_is_told(bench):
    attempt = bench.review()

    attempt.until("outcome")

    assert not alive(attempt.pid)


@pytest.mark.parametrize("victim", ["parent", "zygote", "both", "parent of a stuck zygote"])
def test_the_child_dies_with_its_parent(tmp_path, victim):
    """Fails for `zygote` without PR_SET_PDEATHSIG, for the last without the child's watch of its
    channel, and for `parent` without both and without the zygote's kill at hang-up."""
    with running_bench(tmp_path) as bench:
        attempt = held_review(bench)
        zygote = bench.zygote
        assert bench.children == {attempt.pid}

        if victim == "parent of a stuck zygote":
            os.kill(zygote, signal.SIGSTOP)
        if victim in ("zygote", "both"):
            os.kill(zygote, signal.SIGKILL)
        if victim != "zygote":
            os.kill(bench.process.pid, signal.SIGKILL)

        assert wait_for(lambda: not alive(attempt.pid))
        if victim == "parent of a stuck zygote":
            os.kill(zygote, signal.SIGCONT)
        assert wait_for(lambda: not alive(zygote))
        attempt.call.cancel()


def test_neither_zygote_nor_child_has_grpc(bench):
    """Fails when the zygote imports services.common.hardening, whose module loads grpc."""
    attempt = held_review(bench)

    for pid in (bench.zygote, attempt.pid):
        maps = Path(f"/proc/{pid}/maps")
        if os.access(maps, os.R_OK):  # non-dumpable processes are root's alone
            assert "_ssl" in maps.read_text()
            assert "cygrpc" not in maps.read_text()
    done = subprocess.run(
        [sys.executable, "-c", _LOADED], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "[]", done.stderr
    bench.emulator.control.release()
    attempt.finish()


def test_the_child_has_its_channel_and_one_provider_connection_alone(bench):
    """Fails without the closing of inherited descriptors."""
    attempt = held_review(bench)

    fds = {fd.name: os.readlink(fd) for fd in Path(f"/proc/{attempt.pid}/fd").iterdir()}

    assert set(fds) == {"0", "1", "2", "3", "4"}, fds
    assert fds["0"] == fds["1"] == "/dev/null"
    assert fds["3"].startswith("socket:")
    assert fds["4"].startswith("socket:")
    bench.emulator.control.release()
    attempt.finish()


_TRIES = """
import ctypes, os, socket
from services.llm_runner import process

libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

DUMPABLE, SEIZE, IO_URING_SETUP = 4, 0x4206, 425
tries = {
    "socket": lambda: socket.socket(),
    "socketpair": lambda: socket.socketpair(),
    "file": lambda: open("/dev/null"),
    "listing": lambda: os.listdir("/"),
    "memory file": lambda: os.memfd_create("one"),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/bin/echo", ["echo", "exec: done"]),
    "ptrace": lambda: raw("ptrace", SEIZE, parent, None, None),
    "process_vm_readv": lambda: raw("process_vm_readv", parent, None, 0, None, 0, 0),
    "pidfd": lambda: os.pidfd_open(parent),
    "kill": lambda: os.kill(parent, 0),
    "open door": lambda: raw("prctl", DUMPABLE, 1, 0, 0, 0),
    "io_uring": lambda: raw("syscall", IO_URING_SETUP, 1, ctypes.create_string_buffer(120)),
}
parent, (_, channel) = os.getpid(), socket.socketpair()
for name, attempt in tries.items():
    if os.fork() == 0:
        process.become_child(parent, channel.fileno())
        try:
            attempt()
        except PermissionError:
            os._exit(0)
        except OSError as error:
            os.write(1, f"{name}: {error}\\n".encode())
            os._exit(0)
        os.write(1, f"{name}: done\\n".encode())
        os._exit(0)
    os.wait()
"""


def test_a_caged_child_opens_nothing_starts_nothing_and_looks_into_nobody():
    """Fails for each without cage.shut in become_child."""
    done = subprocess.run(
        [sys.executable, "-c", _TRIES], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_the_child_of_an_attempt_is_caged(bench):
    attempt = held_review(bench)

    status = Path(f"/proc/{attempt.pid}/status").read_text()

    assert "Seccomp:\t2" in status
    bench.emulator.control.release()
    attempt.finish()


def test_the_child_has_no_new_privileges_no_core_and_no_identity(bench):
    """Fails without process.harden, and when the zygote gets the parent's environment."""
    attempt = held_review(bench)
    proc = Path(f"/proc/{attempt.pid}")

    assert "NoNewPrivs:\t1" in (proc / "status").read_text()
    assert "Max core file size        0" in (proc / "limits").read_text()
    environ = (proc / "environ").read_bytes()
    assert b"BYOKEEP_TLS" not in environ
    assert b"KEYVAULT" not in environ
    assert b"sk-" not in environ + (proc / "cmdline").read_bytes()
    bench.emulator.control.release()
    attempt.finish()


@pytest.mark.parametrize(
    "changed",
    [
        {"provider": options_pb2.PROVIDER_ANTHROPIC},
        {"attempt_id": new_id("att")},
        {"fence": 2},
        {"purpose": grant_pb2.LEASE_PURPOSE_VALIDATION},
        {"recipient_key_sha256": b"\0" * 32},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_grant_for_anything_else_is_refused_unopened(bench, changed):
    """`confused_deputy`: fails without child._check."""
    attempt = bench.review()
    attempt.next("accepted")
    attempt.proceed(**changed)

    outcome = attempt.finish()

    assert outcome.failure == review_pb2.FAILURE_REASON_LEASE_REFUSED
    assert not outcome.report.HasField("open_time")
    assert bench.emulator.control.calls() == []
    assert wait_for(lambda: bench.keyvault.releases)
    assert bench.keyvault.releases[0].outcome == lease_pb2.LEASE_OUTCOME_FAILED


def test_a_seal_for_another_child_does_not_open(bench):
    """`confused_deputy`: a lease that was sealed to somebody else is of no use here."""
    bench.keyvault.wrong_recipient = True
    attempt = bench.review()

    outcome = attempt.finish()

    assert outcome.failure == review_pb2.FAILURE_REASON_LEASE_REFUSED
    assert not outcome.report.HasField("open_time")
    assert bench.emulator.control.calls() == []


@pytest.mark.parametrize("state", ["announced", "in flight", "before the lease is answered"])
def test_a_revoked_lease_kills_its_child_at_once(bench, state):
    """Not when its call is over; `revocation_bound` measures how soon. Shown to fail without
    RevocationWatch._end, and the last case without its memory of revoked leases."""
    times = []

    def revoke(lease_id):
        times.append(time.monotonic())
        bench.keyvault.revoke(lease_id)

    def revoke_first(lease_id):
        revoke(lease_id)
        time.sleep(0.5)

    if state == "before the lease is answered":
        bench.keyvault.before_answer = revoke_first
        attempt = bench.review()
        attempt.next("accepted")
        attempt.proceed()
    else:
        attempt = held_review(bench) if state == "in flight" else bench.review()
        if state == "announced":
            attempt.until("call_started")
        revoke(attempt.of("leased")[0].lease_id)

    assert wait_for(lambda: times and not alive(attempt.pid))
    gone = time.monotonic()
    outcome = attempt.finish()

    assert gone - times[0] < 10
    assert outcome.failure == review_pb2.FAILURE_REASON_KEY_REVOKED
    assert outcome.ambiguous_call is (state == "in flight")
    assert bench.keyvault.releases[0].outcome == lease_pb2.LEASE_OUTCOME_CANCELLED


def test_another_lease_survives_a_revocation(bench):
    first, second = bench.review(), bench.review()
    for attempt in (first, second):
        attempt.until("call_started")

    bench.keyvault.revoke(first.of("leased")[0].lease_id)

    assert first.finish().failure == review_pb2.FAILURE_REASON_KEY_REVOKED
    assert alive(second.pid)
    second.ack(second.seen[-1].sequence)
    assert second.finish().failure == review_pb2.FAILURE_REASON_UNSPECIFIED
