"""Ties a process to its supervisor, then becomes the command it is given.

    python -I -S launch.py PARENT SIGNAL USER COMMAND [ARGUMENT ...]

The kernel sends SIGNAL when the thread that started us is gone (prctl(2),
PR_SET_PDEATHSIG; Linux only), also after SIGKILL. A `preexec_fn` could do the same,
but it makes Python fork instead of vfork, and gRPC's fork handlers then break the
channels of the process that starts us.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Drop root for USER (empty: don't), arm the signal, exec."""
    parent, number, user, *command = sys.argv[1:]
    # Looked up while we may still read our own library; USER may not.
    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
    if user:
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    if prctl is not None:
        # After the change of user, which would clear it.
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("the supervisor is gone")
    os.execvp(command[0], command)  # noqa: S606 - the caller's own command


if __name__ == "__main__":
    main()
