"""What a process does before it holds anything worth stealing.

Used by every process of every service, the runner's children included: nothing here may import
grpc. Root is out of scope, and SECURITY.md says so. Source: prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

# Looked up before any fork: between fork and a child's own code nothing may take a lock.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def close_the_door() -> None:
    """Turn off core dumps, ptrace and /proc/PID/mem by the same user, and new privileges.

    Raises:
        OSError: the kernel refused, or did not do it. Nothing secret may be loaded then.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _prctl is None:
        return
    control(_PR_SET_DUMPABLE, 0)
    control(_PR_SET_NO_NEW_PRIVS, 1)
    # A sandbox may answer "done" to whatever it does not know.
    if control(_PR_GET_DUMPABLE, 0) != 0:
        raise OSError("the kernel leaves this process open to others of its user")


def control(option: int, value: int, argument: Any = 0) -> int:
    """Call prctl(2) and return its result. Raises OSError where it fails; Linux only."""
    result: int = -1 if _prctl is None else _prctl(option, value, argument, 0, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
