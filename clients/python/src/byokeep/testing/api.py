"""What a test can do with a whole byokeep, however it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from byokeep.client import Connection
    from byokeep.testing.emulator import Emulator


class ProcessHandle(Protocol):
    """One process of the stack."""

    @property
    def pid(self) -> int:
        """Id of the process that runs now."""

    @property
    def running(self) -> bool:
        """Whether it lives."""

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""

    def signal(self, number: int) -> None:
        """Send a signal."""

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""

    def stop(self, seconds: float = ...) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""

    def start(self) -> None:
        """Start it again; returns before it serves (see `StackApi.wait_ready`)."""


class IdentityFiles(Protocol):
    """PEM files of one identity; the key's has mode 0600."""

    @property
    def certificate(self) -> Path:
        """The certificate."""

    @property
    def key(self) -> Path:
        """Its private key."""


class Authority(Protocol):
    """The CA of a stack."""

    @property
    def pem(self) -> str:
        """Its certificate, PEM."""

    def issue(
        self,
        path_prefix: Path,
        *,
        spiffe_id: str | None = None,
        dns: Sequence[str] = (),
        uris: Sequence[str] | None = None,
    ) -> IdentityFiles:
        """Issue a leaf with a fresh key to `PREFIX.pem` and `PREFIX.key`, for 24 hours.

        ``spiffe_id`` is a full ID, or a path that the CA's trust domain is put before. ``uris``
        replaces the URI names: none, two, or another trust domain's, for what should be refused.
        """


class StackApi(ABC):
    """A started stack with tenant `demo`."""

    @property
    @abstractmethod
    def config(self) -> Path:
        """The config.toml with a profile for each role, for `BYOKEEP_CONFIG`."""

    @property
    @abstractmethod
    def trust(self) -> Path:
        """The trust.json of the stack."""

    @property
    @abstractmethod
    def emulator(self) -> Emulator:
        """What plays the providers: makes them fail, and tells which calls came.

        Raises RuntimeError with ``live``.
        """

    @property
    @abstractmethod
    def authority(self) -> Authority:
        """The stack's CA: makes certificates that its services trust, or should refuse."""

    @abstractmethod
    def address(self, service: str) -> str:
        """`host:port` of `keyvault`, `orchestrator` or `runner`."""

    @abstractmethod
    def process(self, name: str) -> ProcessHandle:
        """`keyvault`, `orchestrator`, `runner`, `emulator` or `postgres`."""

    @abstractmethod
    def wait_ready(self, name: str) -> None:
        """Wait until a process that was started again serves. Raises RuntimeError."""

    @abstractmethod
    def database_url(self, zone: str) -> str:
        """URL of the database of `keyvault` or `orchestrator`, with its role's password."""

    @abstractmethod
    def log(self, name: str) -> str:
        """All that a process has written so far."""

    def connect(self, role: str = "developer", *, tenant: str | None = None) -> Connection:
        """Connect as `developer`, `submitter`, `key-admin`, `auditor` or `operator`."""
        from byokeep.client import connect

        profile = "demo" if role == "developer" else role
        return connect(profile, config=self.config, tenant=tenant)

    def restart(self, name: str) -> None:
        """Stop a process if it runs, start it again, and wait until it serves."""
        process = self.process(name)
        process.stop()
        process.start()
        self.wait_ready(name)
