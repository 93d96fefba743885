"""The processes of a stack as the operating system sees them."""

from __future__ import annotations

import psutil
from byokeep.testing import Stack

SERVICES = ("keyvault", "orchestrator", "runner")


def family(stack: Stack, name: str) -> list[psutil.Process]:
    """Return a service's process and those that it started."""
    process = psutil.Process(stack.process(name).pid)
    return [process, *process.children(recursive=True)]


class Processes:
    """CPU that the three services take from now on: children that ended meanwhile with it.

    PostgreSQL, emulator and client are not in it.
    """

    def __init__(self, stack: Stack) -> None:
        """Begin to count."""
        self._stack = stack
        self._start = self._seconds()

    def cpu_seconds(self) -> float:
        """Return the seconds of CPU since the beginning."""
        return self._seconds() - self._start

    def _seconds(self) -> float:
        every = [one.cpu_times() for name in SERVICES for one in family(self._stack, name)]
        # What ended is in its parent's figures once the parent has waited for it.
        return sum(one.user + one.system + one.children_user + one.children_system for one in every)
