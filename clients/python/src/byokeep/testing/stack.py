"""`Stack`: real processes, a real PostgreSQL, and providers that do as a test says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from byokeep.testing.api import Authority, ProcessHandle, StackApi

if TYPE_CHECKING:
    from byokeep.testing.emulator import Emulator


class Stack(StackApi):
    """A throwaway stack with tenant `demo`; a context manager.

    Start it from the main thread, or another that outlives it: the kernel ends the
    processes with the thread that started them.
    """

    def __init__(
        self,
        *,
        live: bool = False,
        environment: Mapping[str, Mapping[str, str]] | None = None,
        in_memory: bool = True,
        ports: Mapping[str, int] | None = None,
    ) -> None:
        """``environment`` adds variables by process name (`keyvault`, `orchestrator`,
        `runner`); ``live`` dials the real providers, and there is no emulator then.
        ``in_memory``: no file on a disk, where memory has room; durable writes cost nothing
        then, so measurements need False. ``ports`` fixes numbers by name: `orchestrator`,
        `keyvault`, `runner`, `emulator`, `emulator-control`, and each service's `-health` and
        `-metrics`; the others are free ones."""
        self._live = live
        self._in_memory = in_memory
        self._environment = environment
        self._ports = ports
        self._resources = ExitStack()
        self._local: Any = None
        self._emulator: Emulator | None = None

    def start(self) -> Self:
        """Start all; returns once it serves. Raises RuntimeError with the log of what failed."""
        # Loaded here: it needs httpx, which the command does not.
        from byokeep.testing.emulator import Emulator

        state_module, supervisor = _deploy("state"), _deploy("supervisor")
        with ExitStack() as resources:
            state = resources.enter_context(state_module.throwaway_state(in_memory=self._in_memory))
            local = supervisor.LocalStack(
                state, live=self._live, extra=self._environment, ports=self._ports
            )
            resources.callback(local.stop, discard=True)
            local.start()
            if local.emulator_ports is not None:
                url = f"http://127.0.0.1:{local.emulator_ports[1]}"
                self._emulator = resources.enter_context(Emulator(url))
            self._local = local
            self._resources = resources.pop_all()
        return self

    def stop(self) -> None:
        """Stop all and erase it."""
        self._resources.close()
        self._local = self._emulator = None

    @property
    def config(self) -> Path:
        """See StackApi."""
        path: Path = self._running.state.config
        return path

    @property
    def trust(self) -> Path:
        """See StackApi."""
        path: Path = self._running.state.trust
        return path

    @property
    def root(self) -> Path:
        """The folder that holds everything, logs included."""
        path: Path = self._running.state.root
        return path

    @property
    def emulator(self) -> Emulator:
        """See StackApi."""
        if self._emulator is None:
            raise RuntimeError("this stack has no emulator")
        return self._emulator

    @property
    def authority(self) -> Authority:
        """See StackApi."""
        authority: Authority = self._running.authority
        return authority

    def address(self, service: str) -> str:
        """See StackApi."""
        address: str = self._running.topology.address(service)
        return address

    def process(self, name: str) -> ProcessHandle:
        """See StackApi."""
        handle: ProcessHandle = self._running.process(name)
        return handle

    def wait_ready(self, name: str) -> None:
        """See StackApi."""
        self._running.wait_ready(name)

    def database_url(self, zone: str) -> str:
        """See StackApi."""
        url: str = self._running.database_url(zone)
        return url

    def log(self, name: str) -> str:
        """See StackApi."""
        text: str = self._running.process(name).log.read_text(errors="replace")
        return text

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def _running(self) -> Any:
        if self._local is None:
            raise RuntimeError("the stack is not started")
        return self._local


def _deploy(name: str) -> Any:
    for home in ("byokeep_services.deploy.local", "deploy.local"):
        try:
            return importlib.import_module(f"{home}.{name}")
        except ModuleNotFoundError as error:
            # Another module that is missing is a fault of its own.
            if error.name is None or not f"{home}.".startswith(f"{error.name}."):
                raise
    raise RuntimeError('byokeep.testing needs its services: pip install "byokeep[testing]"')
