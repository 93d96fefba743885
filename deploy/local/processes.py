"""Child processes of the local stack: started, watched, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.01


def die_with_parent(number: int) -> Callable[[], None] | None:
    """Return a ``preexec_fn`` that has the kernel signal the child when its parent dies.

    Linux only (prctl(2)); elsewhere None, and the next start clears what was left.
    The signal follows the thread that forks, so children are started from a thread
    that lives as long as the stack does.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork: between fork and exec nothing may take a lock.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return arm


def alive(pid: int) -> bool:
    """Whether a process of this id exists (a zombie counts as gone)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; False if it doesn't within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


class StackError(RuntimeError):
    """The local stack can't do what was asked; the message says what to do."""


class Process:
    """One child: its command, its log file, and the process that runs now, if any."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        stop_signal: int = signal.SIGTERM,
        death_signal: int = signal.SIGKILL,
        cwd: Path | None = None,
        user: str | None = None,
    ) -> None:
        """``stop_signal`` asks for an orderly end; ``death_signal`` is sent by the kernel
        when the supervisor is gone. ``user`` needs root."""
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._stop_signal = stop_signal
        self._death_signal = death_signal
        self._cwd = cwd
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Id of the running process. Raises StackError if it was never started."""
        if self._process is None:
            raise StackError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """Exit status; negative for a signal, None while running or before a start."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process in a session of its own. Nothing changes if it runs."""
        if self.running:
            return
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(self._death_signal),
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )

    def signal(self, number: int) -> None:
        """Send a signal to the process; nothing if it is gone."""
        if self.running:
            assert self._process is not None  # noqa: S101 - running says so
            self._process.send_signal(number)

    def stop(self, seconds: float = 10.0) -> None:
        """Ask for an orderly end, then kill what is left of its group."""
        if self._process is None:
            return
        self.signal(self._stop_signal)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait(seconds)
        self._kill_group()

    def kill(self) -> None:
        """Kill the process alone with SIGKILL, as the kernel's OOM killer would; wait for it."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)

    def restart(self) -> None:
        """Stop it if it runs, and start it again with the same command."""
        self.stop()
        self.start()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-count:])

    def _kill_group(self) -> None:
        # The leader is reaped, its group id lives on with its children.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
