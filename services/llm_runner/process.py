"""What the zygote and its children do to themselves before they hold anything.

Sources: prctl(2), close_range(2). Nothing here may import grpc, so that
`services.common.hardening`, whose module does, is not used.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

CHANNEL_FD = 3

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
# Few are ever open, and a low limit keeps the closing of all others cheap.
_MAX_FDS = 256
# A diff or an answer that is made to grow ends its own child, and not the machine's memory.
_MAX_CHILD_BYTES = 1 << 30

# Looked up before any fork: between fork and the child's own code nothing may take a lock.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def harden() -> None:
    """Turn off core dumps, ptrace and /proc/PID/mem by the same user, and new privileges.

    Raises:
        OSError: the kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FDS, _MAX_FDS))
    _control(_PR_SET_DUMPABLE, 0)
    _control(_PR_SET_NO_NEW_PRIVS, 1)


def become_child(parent: int, channel: int) -> None:
    """Turn a fresh fork into a child that dies with its parent and has one open descriptor.

    `parent` is the id of the process that forked; `channel` is moved to CHANNEL_FD, standard
    input, output and error stay. Its memory is limited. Raises OSError where the parent is
    already gone.
    """
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the zygote is gone")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if channel != CHANNEL_FD:
        os.dup2(channel, CHANNEL_FD, inheritable=False)
    os.closerange(CHANNEL_FD + 1, _MAX_FDS)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_CHILD_BYTES, _MAX_CHILD_BYTES))
    _control(_PR_SET_DUMPABLE, 0)


def _control(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
