"""What a process does before it holds anything worth stealing."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Mapping

from services.common.config import ConfigError

_PR_SET_DUMPABLE = 4


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse to start where gRPC would print payloads before TLS, or under a tracer.

    Raises:
        ConfigError: names what to unset.
    """
    if environ.get("GRPC_TRACE"):
        raise ConfigError("GRPC_TRACE is set: gRPC would print payloads; unset it")
    if environ.get("GRPC_VERBOSITY", "").upper() == "DEBUG":
        raise ConfigError("GRPC_VERBOSITY is DEBUG: gRPC would print payloads; unset it")
    if sys.gettrace() is not None:
        raise ConfigError("a debugger or tracer is attached; start without it")


def close_the_door() -> None:
    """Turn core dumps off and refuse /proc/PID/mem and ptrace to the same user (Linux).

    Source: prctl(2), PR_SET_DUMPABLE. Root is out of scope, and SECURITY.md says so.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
