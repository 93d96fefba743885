"""Child processes of the local stack: started, watched, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_LAUNCH = Path(__file__).with_name("launch.py")
_POLL_SECONDS = 0.01


def launched(command: Sequence[str], death_signal: int, user: str = "") -> list[str]:
    """Return the command so that the kernel signals it when this thread is gone.

    ``user`` needs root. Linux only (see `launch`); elsewhere the next start clears what
    was left. Start it from a thread that lives as long as the stack does.
    """
    launch = [sys.executable, "-I", "-S", str(_LAUNCH)]
    return [*launch, str(os.getpid()), str(int(death_signal)), user, *command]


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


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Poll until the condition holds; False if it doesn't within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _open_private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    # One that is there already may have been made wider.
    os.fchmod(descriptor, 0o600)
    return descriptor


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
        user: str = "",
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

    def start(self, *, held: bool = False) -> None:
        """Start the process in a session of its own. Nothing changes if it runs.

        With ``held`` its standard input stays open until `release` (see `warm`).
        """
        if self.running:
            return
        with open(self.log, "ab", opener=_open_private) as output:
            self._process = subprocess.Popen(
                launched(self._command, self._death_signal, self._user),
                env=self._environment,
                cwd=self._cwd,
                stdin=subprocess.PIPE if held else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def release(self) -> None:
        """Let a process go on that was started ``held``."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def signal(self, number: int) -> None:
        """Send a signal to the process; nothing if it is gone."""
        if self.running:
            assert self._process is not None  # noqa: S101 - running says so
            self._process.send_signal(number)

    def stop(self, seconds: float = 10.0) -> None:
        """Ask for an orderly end, then kill what is left of its group."""
        if self._process is None:
            return
        self.release()
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
