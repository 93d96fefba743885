"""The process that every child is forked from: loaded once, single-threaded, without grpc.

The parent sends one end of a socket pair; the zygote forks a child that owns it, and answers
with the child's process id and a pidfd, which stays right when the id is used again. It ends,
with all of its children, when the parent does.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import select
import signal
import socket
import struct
import sys
from typing import Final

from services.common import logs
from services.llm_runner import child, process
from services.llm_runner.channel import ChildEnd
from services.llm_runner.rehearsal import rehearse

log = logging.getLogger(__name__)

# A process id; 0: ready; below 0: the fork failed, with this error number.
REPLY: Final = struct.Struct(">i")
EXIT_CONFIG = 78
_REQUEST_BYTES: Final = 16
_MAX_REQUEST_FDS: Final = 4


class Zygote:
    """Forks, reports and reaps."""

    def __init__(self, control: socket.socket, tools: child.Tools) -> None:
        """`control` is a SEQPACKET socket to the parent; `tools` are inherited by children."""
        self._control = control
        self._tools = tools
        self._pid = os.getpid()
        self._children: set[int] = set()

    def serve(self) -> None:
        """Serve until the parent is gone, then kill what is left."""
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        self._control.send(REPLY.pack(0))
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._request():
                break
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still the child's

    def _request(self) -> bool:
        """Serve one request; False at the parent's end."""
        try:
            request, fds, _, _ = socket.recv_fds(self._control, _REQUEST_BYTES, _MAX_REQUEST_FDS)
        except ConnectionResetError:
            return False
        if not request and not fds:
            return False
        try:
            if len(fds) == 1:
                self._fork(fds[0])
            else:
                self._control.send(REPLY.pack(-errno.EINVAL))
        except BrokenPipeError:
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, channel: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._control.send(REPLY.pack(-(error.errno or errno.EAGAIN)))
            return
        if pid == 0:
            self._child(channel)
        self._children.add(pid)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            self._control.send(REPLY.pack(-(error.errno or errno.EMFILE)))
            return
        try:
            socket.send_fds(self._control, [REPLY.pack(pid)], [pidfd])
        finally:
            os.close(pidfd)

    def _child(self, channel: int) -> None:
        status = 1
        try:
            process.become_child(self._pid, channel)
            child.main(ChildEnd(socket.socket(fileno=process.CHANNEL_FD)), self._tools)
            status = 0
        except BaseException as error:
            logs.failure(log, "child_failed", error, pid=os.getpid())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, -signal.SIGKILL):
                logs.event(log, "child_died", level=logging.WARNING, pid=pid, status=code)


def main() -> int:
    """Serve on the socket whose number is the first argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # A terminal or a service manager signals the whole group: the parent decides, then hangs up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    process.harden()
    try:
        logs.setup("llm_runner.child", os.environ.get("BYOKEEP_LOG_LEVEL", "info"))
        logs.catch_all()
        tools = child.prepare(os.environ)
        rehearse(tools)
    except (OSError, ValueError) as error:
        print(f"llm_runner does not start:\n{error}", file=sys.stderr)  # noqa: T201 for a person
        return EXIT_CONFIG
    # Children don't live long enough for cycles to matter, and a collection would write to,
    # and so copy, every page that they share.
    gc.collect()
    gc.disable()
    gc.freeze()
    with contextlib.suppress(BrokenPipeError):  # the parent ended before we were ready
        Zygote(control, tools).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
