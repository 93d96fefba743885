"""The zygote by itself: it forks for whoever holds its socket, and for nobody else."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys

import pytest
from byokeep.runner.v1 import runner_pb2

from deploy.local.processes import alive, wait_for
from services.llm_runner.channel import ChildEnd, Kind
from services.llm_runner.zygote import REPLY
from tests.component.runner.harness import ROOT, child_pids

ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


@pytest.fixture
def zygote():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    process = subprocess.Popen(
        [sys.executable, "-m", "services.llm_runner.zygote", str(theirs.fileno())],
        cwd=ROOT,
        env=ENVIRONMENT,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    assert REPLY.unpack(ours.recv(16)) == (0,)
    try:
        yield process, ours
    finally:
        ours.close()
        assert process.wait(10) == 0


def spawn(control):
    """Ask for a child; its process id, its pidfd and our end of its channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(control, [b"x"], [theirs.fileno()])
    reply, fds, _, _ = socket.recv_fds(control, 16, 1)
    return REPLY.unpack(reply)[0], fds[0], ours


def readable(fd, seconds):
    return bool(select.select([fd], [], [], seconds)[0])


def test_a_child_is_forked_and_ends_with_its_channel(zygote):
    process, control = zygote
    pid, pidfd, channel = spawn(control)
    assert child_pids(process.pid) == {pid}
    assert not readable(pidfd, 0.2)

    channel.close()

    assert readable(pidfd, 2)
    os.close(pidfd)
    assert wait_for(lambda: not os.path.exists(f"/proc/{pid}"))  # reaped


def test_bad_requests_are_answered_and_survived(zygote):
    _, control = zygote
    with open(os.devnull, "rb") as one, open(os.devnull, "rb") as two:
        control.send(b"no descriptor")
        assert REPLY.unpack(control.recv(16)) == (-errno.EINVAL,)
        socket.send_fds(control, [b"two"], [one.fileno(), two.fileno()])
        assert REPLY.unpack(control.recv(16)) == (-errno.EINVAL,)
        socket.send_fds(control, [b"no socket"], [one.fileno()])
        reply, (pidfd,), _, _ = socket.recv_fds(control, 16, 1)
        assert REPLY.unpack(reply)[0] > 0
        assert readable(pidfd, 5)
        os.close(pidfd)

    pid, pidfd, channel = spawn(control)

    assert alive(pid)
    channel.close()
    assert readable(pidfd, 2)
    os.close(pidfd)


def test_a_child_that_is_told_nonsense_ends_and_others_live(zygote):
    _, control = zygote
    first, second = spawn(control), spawn(control)
    first[2].sendall(b"\0\0\0\4\1\xff\xff\xff\xff")

    assert readable(first[1], 5)
    assert alive(second[0])
    speaking = ChildEnd(second[2])
    speaking.send(Kind.ASSIGN, runner_pb2.Assign(purpose=1, provider=1, timeout_seconds=9))
    assert runner_pb2.Accepted.FromString(speaking.receive(Kind.ACCEPTED)).public_key
    for _, pidfd, channel in (first, second):
        channel.close()
        os.close(pidfd)


def test_the_zygote_ends_with_its_parent_and_takes_every_child_along(zygote):
    process, control = zygote
    children = [spawn(control) for _ in range(3)]

    control.close()

    assert process.wait(5) == 0
    for pid, pidfd, channel in children:
        assert readable(pidfd, 2)
        assert not alive(pid)
        os.close(pidfd)
        channel.close()
