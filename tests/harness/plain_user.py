"""Runs a command as an ordinary process of its user: without root's capabilities.

    python -m tests.harness.plain_user COMMAND [ARGUMENT ...]

Root may read every process whatever it does; byokeep claims nothing against it. Where the tests
run as root, this leaves the user id and takes the rest: capabilities(7). One is kept, to open
files whatever their mode (the database's socket is another user's there); it opens no memory.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    """Drop every capability, then become the command."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        # What is in neither the bounding nor the inheritable set does not come back with exec.
        for capability in set(range(64)) - {_CAP_DAC_OVERRIDE}:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those that aren't
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        # Exactly what exec gives back: a process that gained something would not be dumpable.
        kept = 1 << _CAP_DAC_OVERRIDE
        if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0)) != 0:
            sys.exit("capset failed")
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 the test's own command


if __name__ == "__main__":
    main()
