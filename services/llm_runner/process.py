"""What the zygote and its children do to themselves before they hold anything.

Source: close_range(2). Nothing here may import grpc.
"""

from __future__ import annotations

import os
import resource
import signal

from services.common import hardening
from services.llm_runner import cage

CHANNEL_FD = 3

# Few are ever open, and a low limit keeps the closing of all others cheap.
_MAX_FDS = 256
# A diff or an answer that is made to grow ends its own child, and not the machine's memory.
_MAX_CHILD_BYTES = 1 << 30


def harden() -> None:
    """Close the door, and limit descriptors. Raises OSError where the kernel refused."""
    hardening.close_the_door()
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FDS, _MAX_FDS))


def become_child(parent: int, channel: int) -> None:
    """Turn a fresh fork into a child that dies with its parent and has one open descriptor.

    `parent` is the id of the process that forked; `channel` is moved to CHANNEL_FD, standard
    input, output and error stay. Its memory is limited, and so is what it may ask of the kernel.
    Raises OSError where the parent is already gone.
    """
    hardening.control(hardening.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the zygote is gone")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if channel != CHANNEL_FD:
        os.dup2(channel, CHANNEL_FD, inheritable=False)
    os.closerange(CHANNEL_FD + 1, _MAX_FDS)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_CHILD_BYTES, _MAX_CHILD_BYTES))
    hardening.close_the_door()
    cage.shut()
