"""What a child may still ask of the kernel: to use what it holds, and to end.

A seccomp filter, which only the end of its process lifts. It lists what is allowed, so that what a
later kernel brings is refused too: whoever gets code to run in a child gets no socket, no file and
no other process. Sources: seccomp(2), bpf_common.h, asm-generic/unistd.h, unistd_64.h of x86.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Final

from services.common import hardening

_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = 0x80000000
_REFUSE: Final = 0x00050000 | errno.EPERM
_ALLOW: Final = 0x7FFF0000

# struct seccomp_data
_NUMBER_AT, _MACHINE_AT = 0, 4
# struct sock_filter, and the three instructions that are used.
_INSTRUCTION: Final = struct.Struct("=HBBI")
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06

# By machine: AUDIT_ARCH_*, and which of a call's two numbers is its.
_MACHINES: Final = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# 1 << 20: the machine has no such call.
_NONE: Final = 1 << 20
_ALLOWED: Final[Mapping[str, tuple[int, int]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "close": (3, 57),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "poll": (7, _NONE),
    "ppoll": (271, 73),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "setsockopt": (54, 208),
    "getsockopt": (55, 209),
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "getpid": (39, 172),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _instructions(machine: int, allowed: list[int]) -> Iterator[bytes]:
    pack = _INSTRUCTION.pack
    yield pack(_LOAD, 0, 0, _MACHINE_AT)
    yield pack(_EQUALS, 1, 0, machine)
    yield pack(_RETURN, 0, 0, _KILL_PROCESS)  # its numbers mean other calls
    yield pack(_LOAD, 0, 0, _NUMBER_AT)
    for left, number in zip(range(len(allowed), 0, -1), allowed, strict=True):
        yield pack(_EQUALS, left, 0, number)
    yield pack(_RETURN, 0, 0, _REFUSE)
    yield pack(_RETURN, 0, 0, _ALLOW)


def _program() -> _Program | None:
    machine, column = _MACHINES.get(os.uname().machine, (0, 0))
    if not machine:
        return None
    instructions = list(_instructions(machine, [pair[column] for pair in _ALLOWED.values()]))
    return _Program(len(instructions), b"".join(instructions))


# Made before any fork.
_PROGRAM = _program()


def shut() -> None:
    """Refuse this process what is not listed, for good. It has to have no new privileges before.

    Nothing happens where the machine or its kernel knows no such filter. Raises OSError.
    """
    if _PROGRAM is None:
        return
    try:
        hardening.control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_PROGRAM))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
