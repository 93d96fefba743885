"""A whole byokeep in one container, by testcontainers.

    from byokeep.testing.containers import ByokeepContainer

    with ByokeepContainer() as stack, stack.connect() as connection:
        stack.emulator.fault("rate_limited", provider="openai")
        connection.keys.ListKeys(...)

`pip install "byokeep[containers]"`. Image `byokeep/all-in-one` has the services, a PostgreSQL and
the emulator; it is for tests and holds no key that matters.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
from testcontainers.core.container import DockerContainer

from byokeep.testing.api import StackApi
from byokeep.testing.emulator import Emulator
from byokeep.testing.remote import (
    PORTS,
    SETTINGS,
    Control,
    RemoteAuthority,
    RemoteProcess,
    write_private,
)

IMAGE = "byokeep/all-in-one:dev"
"""The image that `make images` builds in a checkout."""
_START_SECONDS = 90.0
# PostgreSQL's files are in memory: a limit, taken as it is used.
_SHARED_MEMORY = "2g"
_LOG_LINES = 30


class ByokeepContainer(DockerContainer, StackApi):
    """A throwaway stack with tenant `demo`; a context manager.

    It is a container of testcontainers', so `with_network`, `with_env` and the like are there;
    other containers of its network find the services at the ports of
    `byokeep.testing.remote.PORTS`.
    """

    def __init__(
        self,
        image: str = IMAGE,
        *,
        live: bool = False,
        environment: Mapping[str, Mapping[str, str]] | None = None,
        in_memory: bool = True,
        ports: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        """See `byokeep.testing.Stack` for ``live``, ``environment``, ``in_memory`` and ``ports``,
        which are the host's here; ``kwargs`` are testcontainers' and Docker's. Raises ValueError
        for a port that there is not."""
        memory = {"shm_size": _SHARED_MEMORY} if in_memory else {}
        super().__init__(image, **(memory | kwargs))
        fixed = dict(ports or {})
        if unknown := fixed.keys() - PORTS.keys():
            raise ValueError(f"no port {min(unknown)}; there are: {', '.join(PORTS)}")
        for name, number in PORTS.items():
            if name in fixed:
                self.with_bind_ports(number, fixed[name])
            else:
                self.with_exposed_ports(number)
        self._token = secrets.token_urlsafe(24)
        settings = {
            "live": live,
            "environment": {name: dict(more) for name, more in (environment or {}).items()},
            "in_memory": in_memory,
            "token": self._token,
        }
        self.with_env(SETTINGS, json.dumps(settings))
        self._live = live
        self._resources = ExitStack()
        self._control: Control | None = None
        self._emulator: Emulator | None = None
        self._root = Path()

    def start(self) -> Self:
        """Start it; returns once all of it serves. Raises RuntimeError with the end of its log."""
        try:
            super().start()
            control = Control(f"http://{self._at('control')}", self._token)
            self._resources.callback(control.close)
            self._await(control)
            self._control = control
            folder = tempfile.TemporaryDirectory(prefix="byokeep-container-")
            self._root = Path(self._resources.enter_context(folder))
            self._write_client_files()
            if not self._live:
                url = f"http://{self._at('emulator-control')}"
                self._emulator = self._resources.enter_context(Emulator(url))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, *arguments: Any, **more: Any) -> None:
        """Stop it and erase it; see testcontainers for the arguments."""
        self._resources.close()
        self._control = self._emulator = None
        super().stop(*arguments, **more)

    @property
    def config(self) -> Path:
        """See StackApi."""
        self._running()
        return self._root / "client" / "config.toml"

    @property
    def trust(self) -> Path:
        """See StackApi."""
        self._running()
        return self._root / "client" / "trust.json"

    @property
    def emulator(self) -> Emulator:
        """See StackApi."""
        if self._emulator is None:
            raise RuntimeError("this stack has no emulator")
        return self._emulator

    @property
    def authority(self) -> RemoteAuthority:
        """See StackApi."""
        return RemoteAuthority(self._running())

    def address(self, service: str) -> str:
        """See StackApi."""
        self._running()
        return self._at(service)

    def process(self, name: str) -> RemoteProcess:
        """See StackApi."""
        return RemoteProcess(self._running(), name)

    def wait_ready(self, name: str) -> None:
        """See StackApi."""
        self._running().ask("wait_ready", name=name)

    def database_url(self, zone: str) -> str:
        """See StackApi."""
        url = str(self._running().ask("database_url", zone=zone))
        credentials, _, rest = url.partition("@")
        return f"{credentials}@{self._at('postgres')}{rest.partition('?')[0]}"

    def log(self, name: str) -> str:
        """See StackApi."""
        return str(self._running().ask("log", name=name))

    def _running(self) -> Control:
        if self._control is None:
            raise RuntimeError("the stack is not started")
        return self._control

    def _at(self, name: str) -> str:
        return f"{self.get_container_host_ip()}:{self.get_exposed_port(PORTS[name])}"

    def _await(self, control: Control) -> None:
        """Wait until the control answers: it listens once all else serves."""
        end = time.monotonic() + _START_SECONDS
        container = self.get_wrapped_container()
        while True:
            try:
                control.ask("health")
                return
            except (httpx.TransportError, RuntimeError):  # not there, or not SERVING yet
                container.reload()
            if container.status == "exited" or time.monotonic() > end:
                lines = container.logs().decode(errors="replace").splitlines()[-_LOG_LINES:]
                raise RuntimeError("\n".join(["the container does not serve:", *lines]))
            time.sleep(0.05)

    def _write_client_files(self) -> None:
        files: dict[str, str] = self._running().ask(
            "client_files",
            root=str(self._root),
            orchestrator=self._at("orchestrator"),
            keyvault=self._at("keyvault"),
        )
        folder = self._root / "client"
        folder.mkdir(mode=0o700)
        for name, text in files.items():
            write_private(folder / name, text)
