"""What a process does before it holds anything worth stealing."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def close_the_door() -> None:
    """Turn core dumps off and refuse /proc/PID/mem and ptrace to the same user (Linux).

    Source: prctl(2), PR_SET_DUMPABLE. Root is out of scope, and SECURITY.md says so.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
