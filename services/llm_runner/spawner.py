"""The parent's side of the zygote: starts it, asks it for children, holds them by pidfd."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from services.llm_runner.channel import ParentEnd

_REPLY_BYTES: Final = 4
_START_SECONDS: Final = 30.0
# The zygote is told nothing else: least of all where this service's identity lies.
_ENVIRONMENT: Final = (
    "PATH",
    "PYTHONPATH",
    "LANG",
    "LC_ALL",
    "BYOKEEP_MODE",
    "BYOKEEP_LOG_LEVEL",
    "BYOKEEP_PROVIDER_CA",
    "BYOKEEP_MODELS_FILE",
)


class SpawnError(Exception):
    """There is no child: the zygote is gone, or the system is out of something."""


class Child:
    """One child process; `close_time` (Unix time in ns) is set once it is gone."""

    def __init__(self, pid: int, pidfd: int, channel: ParentEnd) -> None:
        """Take over the pidfd and the channel."""
        self.pid = pid
        self.channel = channel
        self.gone = asyncio.Event()
        self.close_time = 0
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._ended)

    def kill(self) -> None:
        """Kill it at once; nothing if it is gone."""
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ended(self) -> None:
        # A pidfd is readable once every thread of the process has ended (pidfd_open(2)).
        self.close_time = time.time_ns()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.gone.set()


class Spawner:
    """A zygote, started before this process loads grpc.

    A lost zygote takes its children with it and is not replaced: `lost` is called, and the
    service ends, to be started afresh.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Start the zygote; it loads while the parent does."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.llm_runner.zygote", str(theirs.fileno())],
                env={name: environ[name] for name in _ENVIRONMENT if name in environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._control.setblocking(False)
        self._waiting: collections.deque[asyncio.Future[tuple[int, int]]] = collections.deque()
        self._lost = False
        self.lost: Callable[[], None] = lambda: None

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    async def start(self) -> None:
        """Wait until the zygote can fork. Raises SpawnError."""
        asyncio.get_running_loop().add_reader(self._control, self._reply)
        async with asyncio.timeout(_START_SECONDS):
            await self._answer()

    async def spawn(self) -> Child:
        """Return a fresh child. Raises SpawnError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                if self._lost:
                    raise SpawnError("the zygote is gone")
                socket.send_fds(self._control, [b"\x01"], [theirs.fileno()])
            pid, pidfd = await self._answer()
        except OSError:
            ours.close()
            raise SpawnError("the zygote takes no request") from None
        except BaseException:
            ours.close()  # a child that was forked nevertheless sees that and ends
            raise
        return Child(pid, pidfd, ParentEnd(ours))

    async def close(self) -> None:
        """End the zygote, and with it every child that is left."""
        self.lost = lambda: None
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait, 5)

    async def _answer(self) -> tuple[int, int]:
        future: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Answers come in the order of the requests, so this one is still to be taken.
            future.add_done_callback(_discard)
            raise

    def _reply(self) -> None:
        data, fds = b"", list[int]()
        with contextlib.suppress(ConnectionResetError):
            data, fds, _, _ = socket.recv_fds(
                self._control, _REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        if not data:
            self._end()
            return
        pid = int.from_bytes(data, "big", signed=True)
        future = self._waiting.popleft()
        if pid < 0:
            future.set_exception(SpawnError(os.strerror(-pid)))
        else:
            future.set_result((pid, fds[0] if fds else -1))

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control)
        self._lost = True
        while self._waiting:
            self._waiting.popleft().set_exception(SpawnError("the zygote is gone"))
        self.lost()


def _discard(answer: asyncio.Future[tuple[int, int]]) -> None:
    if answer.exception() is None:
        os.close(answer.result()[1])
