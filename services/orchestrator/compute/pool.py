"""What grows with its input is computed in processes beside the event loop: threads share one
interpreter, and a loop that has to wait for it keeps every tenant waiting.

A process is started when it is needed and stays. Each tenant has one job at a time, so that the
others wait for no more than one job of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from services.common.diff import DiffError
from services.common.errors import internal
from services.common.turns import Turns
from services.orchestrator.compute.child import READY, Job, Status, read_frame, write_frame

PROCESSES: Final = 2
# A diff of 2 MiB takes a fifth of a second; what takes this long has a defect.
_JOB_SECONDS: Final = 30.0


class Compute:
    """The processes (see the module)."""

    def __init__(self, processes: int = PROCESSES) -> None:
        """Start nothing yet."""
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="compute")
        self._idle: list[_Process] = []
        self._turns = Turns(at_once=1)

    async def run(self, tenant: str, job: Job, payload: bytes) -> bytes:
        """Have a tenant's job done; return the serialized message that answers it.

        Raises DiffError; ByokeepError, INTERNAL, where the process failed.
        """
        give_back = await self._turns.take(tenant)
        done = asyncio.get_running_loop().run_in_executor(self._threads, self._do, job, payload)
        # A caller that goes away does not end its job: its tenant's turn lasts as long as that.
        done.add_done_callback(lambda _: give_back())
        status, answer = await asyncio.shield(done)
        if status == Status.DONE:
            return answer
        if status == Status.REFUSED:
            raise _refused(json.loads(answer))
        raise internal()

    async def close(self) -> None:
        """End the processes, after the jobs that run."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        for process in self._idle:
            process.end()

    def _do(self, job: Job, payload: bytes) -> tuple[int, bytes]:
        process = None
        with contextlib.suppress(IndexError):  # another thread may have been quicker
            process = self._idle.pop()
        with contextlib.suppress(OSError, EOFError):
            process = process or _Process()
            answer = process.ask(job, payload)
            self._idle.append(process)
            return answer
        if process is not None:
            process.end()
        return Status.FAILED, b""


class _Process:
    """One process and its pipes; what it fails of is OSError or EOFError."""

    def __init__(self) -> None:
        # Not asyncio's subprocess: uvloop forks, and gRPC's fork handlers can't run while its
        # threads are busy. The subprocess module uses vfork, which runs none. The child gets
        # none of the orchestrator's environment.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "services.orchestrator.compute.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C.UTF-8"},
        )
        assert self._process.stdin is not None  # noqa: S101 for the type checker
        assert self._process.stdout is not None  # noqa: S101
        self._in, self._out = self._process.stdin, self._process.stdout
        # Its door is closed (not dumpable) before anybody's diff is in its pipe.
        if self._out.read(len(READY)) != READY:
            self.end()
            raise EOFError

    def ask(self, job: Job, payload: bytes) -> tuple[int, bytes]:
        watchdog = threading.Timer(_JOB_SECONDS, self._process.kill)
        watchdog.start()
        try:
            write_frame(self._in, job, payload)
            return read_frame(self._out)
        finally:
            watchdog.cancel()

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._in.close()
        self._out.close()
        self._process.wait()


def _refused(told: dict[str, Any]) -> DiffError:
    return DiffError(told["reason"], told["message"], **told["figures"])
