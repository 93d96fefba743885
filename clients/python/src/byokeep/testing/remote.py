"""Commands a stack that runs elsewhere: in a container whose control listens on a port."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import httpx

SETTINGS: Final = "BYOKEEP_STACK"
"""Environment variable of the container: JSON of what a stack is made with, and `token`."""
PORTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "orchestrator": 8443,
        "keyvault": 8444,
        "runner": 8445,
        "emulator": 8446,
        "orchestrator-health": 8543,
        "keyvault-health": 8544,
        "runner-health": 8545,
        "orchestrator-metrics": 9464,
        "keyvault-metrics": 9465,
        "runner-metrics": 9466,
        "emulator-control": 8081,
        "control": 8080,
        "postgres": 5432,
    }
)
"""What listens inside the container, and where."""
# A process that is started again has a minute to serve.
_SECONDS = 90.0


class Control:
    """A client of the control. Raises RuntimeError with the stack's own words where it refuses,
    and httpx.TransportError where nobody listens."""

    def __init__(self, url: str, token: str) -> None:
        """``token`` is the one of SETTINGS."""
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_SECONDS,
            trust_env=False,
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command of `deploy/local/control.py` and return its result."""
        response = self._client.post(f"/{command}", json=arguments)
        document = response.json()
        if response.is_error:
            raise RuntimeError(document["error"])
        return document["result"]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class RemoteProcess:
    """A process of the stack; see `byokeep.testing.api.ProcessHandle`."""

    def __init__(self, control: Control, name: str) -> None:
        """``name`` is one of the stack's."""
        self._control = control
        self._name = name

    @property
    def pid(self) -> int:
        """Id of the process, inside the container."""
        return int(self._ask()["pid"])

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return bool(self._ask()["running"])

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        status: int | None = self._ask()["exit_status"]
        return status

    def signal(self, number: int) -> None:
        """Send a signal."""
        # By its name: numbers differ between systems.
        self._ask("signal", number=signal.Signals(number).name)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._ask("kill")

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""
        self._ask("stop", seconds=seconds)

    def start(self) -> None:
        """Start it again; returns before it serves."""
        self._ask("start")

    def _ask(self, do: str = "look", **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._control.ask("process", name=self._name, do=do, **more)
        return answer


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """Files that were written here; see `byokeep.testing.api.IdentityFiles`."""

    certificate: Path
    key: Path


class RemoteAuthority:
    """The stack's CA; see `byokeep.testing.api.Authority`."""

    def __init__(self, control: Control) -> None:
        """Its key stays where the stack is."""
        self._control = control

    @property
    def pem(self) -> str:
        """Its certificate, PEM."""
        return str(self._control.ask("authority"))

    def issue(
        self,
        path_prefix: Path,
        *,
        spiffe_id: str | None = None,
        dns: Sequence[str] = (),
        uris: Sequence[str] | None = None,
    ) -> RemoteFiles:
        """Issue a leaf with a fresh key to `PREFIX.pem` and `PREFIX.key`."""
        made = self._control.ask(
            "issue",
            name=path_prefix.name,
            spiffe_id=spiffe_id,
            dns=list(dns),
            uris=None if uris is None else list(uris),
        )
        files = RemoteFiles(Path(f"{path_prefix}.pem"), Path(f"{path_prefix}.key"))
        write_private(files.certificate, made["certificate"])
        write_private(files.key, made["key"])
        return files


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else may read."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
