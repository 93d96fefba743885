"""Tries to read another process's memory as the same user without root's rights.

    python -I -S peek.py PID

Prints `refused` or `read`. As root it gives up CAP_SYS_PTRACE first (capabilities(7)):
what root may do with it is another attack.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_CAPBSET_DROP = 24
_CAP_SYS_PTRACE = 19


def main() -> None:
    """Drop the right, which takes an exec to be gone, then try."""
    pid = sys.argv[1]
    if sys.argv[2:] != ["again"]:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_SYS_PTRACE, 0, 0, 0)
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, pid, "again"])  # noqa: S606 - itself
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    except PermissionError:
        print("refused")
    else:
        print("read")


if __name__ == "__main__":
    main()
