"""The processes of a stack: command, environment and identity of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import material
from .material import SERVER_NAMES, TRUST_DOMAIN
from .processes import Process
from .state import CHECKOUT, State

# Name in a stack → Python package.
SERVICES: Mapping[str, str] = {
    "keyvault": "services.keyvault",
    "orchestrator": "services.orchestrator",
    "runner": "services.llm_runner",
}
_ID = f"spiffe://{TRUST_DOMAIN}"
# What takes long to load (see `warm`), and what runs. A serving keyvault never loads what
# migrates its database; the runner forks its zygote before it loads anything.
_COMMANDS = {
    "keyvault": ("services.keyvault.server", ("serve",)),
    "orchestrator": ("services.orchestrator.server", ("migrate", "serve")),
    "runner": (None, ("serve",)),
}
_CALLERS = {
    "keyvault": (
        f"orchestrator={_ID}/orchestrator runner={_ID}/runner/*"
        f" auditor={_ID}/client/auditor auditor={_ID}/client/developer"
        f" operator={_ID}/client/operator operator={_ID}/client/developer"
    ),
    "orchestrator": (
        f"client={_ID}/client/* operator={_ID}/client/operator operator={_ID}/client/developer"
    ),
    "runner": f"orchestrator={_ID}/orchestrator",
}
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class Topology:
    """What the environments of the processes are made from.

    ``ports`` is by service name, `<service>-health` and `<service>-metrics`; those of
    `emulator` and `emulator-control` are free ones where they are not given. ``extra`` adds to
    or replaces variables by process name, as a test needs. With ``live`` the runner dials the
    real providers. ``host`` is the address that all of them listen on.
    """

    state: State
    ports: Mapping[str, int]
    live: bool = False
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    host: str = "127.0.0.1"

    def address(self, service: str) -> str:
        """Return `host:port` of a service, as this machine reaches it."""
        return f"127.0.0.1:{self.ports[service]}"

    def _listen(self, name: str) -> str:
        return f"{self.host}:{self.ports[name]}"

    def keyvault_migration(self) -> list[str]:
        """Return the command that brings keyvault's database up to date and prints its
        public keys; the orchestrator does the like when it starts."""
        return _python("services.keyvault.migrate", SERVICES["keyvault"], ("migrate",))

    def service(self, name: str, emulator_port: int | None = None) -> Process:
        """Return a service's process, not yet started."""
        library, commands = _COMMANDS[name]
        return self._process(
            name,
            _python(library, SERVICES[name], commands),
            self.environment(name, emulator_port),
        )

    def emulator(self) -> Process:
        """Return the provider emulator's process, not yet started."""
        files = material.tls(self.state, "emulator")
        command = [
            sys.executable,
            "-m",
            "deploy.local.emulator",
            "--accept-any",
            f"--cert={files.certificate}",
            f"--key={files.key}",
            f"--ready-file={self.ready_file('emulator')}",
            f"--https-port={self.ports.get('emulator', 0)}",
            f"--control-port={self.ports.get('emulator-control', 0)}",
            f"--host={self.host}",
            f"--control-host={self.host}",
        ]
        return self._process("emulator", command, self._base("emulator"))

    def ready_file(self, name: str) -> Path:
        """The file that a process writes once it serves."""
        return self.state.run / f"{name}.ready"

    def environment(self, name: str, emulator_port: int | None = None) -> dict[str, str]:
        """Return the whole environment of a service."""
        state = self.state
        files = material.tls(state, name)
        environment = {
            "BYOKEEP_MODE": "development",
            "BYOKEEP_DEPLOYMENT": material.DEPLOYMENT,
            "BYOKEEP_TRUST_DOMAIN": TRUST_DOMAIN,
            "BYOKEEP_LISTEN": self._listen(name),
            "BYOKEEP_HEALTH_LISTEN": self._listen(f"{name}-health"),
            "BYOKEEP_METRICS_LISTEN": self._listen(f"{name}-metrics"),
            "BYOKEEP_READY_FILE": str(self.ready_file(name)),
            "BYOKEEP_TLS_CERT": str(files.certificate),
            "BYOKEEP_TLS_KEY": str(files.key),
            "BYOKEEP_TLS_CA": str(state.pki / "ca.pem"),
            "BYOKEEP_CALLERS": _CALLERS[name],
        }
        return environment | self._own(name, emulator_port) | self._base(name)

    def _own(self, name: str, emulator_port: int | None) -> dict[str, str]:
        if name == "keyvault":
            return self._keyvault()
        if name == "orchestrator":
            return self._orchestrator()
        return self._runner(emulator_port)

    def _base(self, name: str) -> dict[str, str]:
        # Nothing else of the user's environment: a provider key in it is not ours to spread.
        passed = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        return passed | {"PYTHONUNBUFFERED": "1"} | dict(self.extra.get(name, {}))

    def _keyvault(self) -> dict[str, str]:
        state = self.state
        return {
            "BYOKEEP_DATABASE_URL_FILE": str(material.database_url_file(state, "keyvault")),
            "BYOKEEP_KEK_BACKEND": "local",
            "BYOKEEP_KEYRING_FILE": str(material.make_keyring(state)),
            "BYOKEEP_ANCHOR_FILE": str(state.secrets / "anchor"),
            "BYOKEEP_GRANT_KEYS_DIR": str(state.grant_keys),
        }

    def _orchestrator(self) -> dict[str, str]:
        state = self.state
        return {
            "BYOKEEP_DATABASE_URL_FILE": str(material.database_url_file(state, "orchestrator")),
            "BYOKEEP_GRANT_SIGNING_KEY": str(material.make_grant_key(state)),
            "BYOKEEP_RUNNER_ADDRESS": self.address("runner"),
            "BYOKEEP_RUNNER_NAME": SERVER_NAMES["runner"],
            "BYOKEEP_RUNNER_CLASS": "default",
            **self._keyvault_edge(),
        }

    def _runner(self, emulator_port: int | None) -> dict[str, str]:
        if self.live:
            return self._keyvault_edge()
        dial = " ".join(f"{host}=127.0.0.1:{emulator_port}" for host in material.PROVIDER_HOSTS)
        return {
            "BYOKEEP_PROVIDER_DIAL": dial,
            "BYOKEEP_PROVIDER_CA": str(self.state.pki / "provider-ca.pem"),
            **self._keyvault_edge(),
        }

    def _keyvault_edge(self) -> dict[str, str]:
        return {
            "BYOKEEP_KEYVAULT_ADDRESS": self.address("keyvault"),
            "BYOKEEP_KEYVAULT_NAME": SERVER_NAMES["keyvault"],
        }

    def _process(self, name: str, command: list[str], environment: dict[str, str]) -> Process:
        return Process(
            name,
            command,
            environment=environment,
            log=self.state.logs / f"{name}.log",
            cwd=CHECKOUT,
        )


def _python(library: str | None, module: str, commands: Sequence[str]) -> list[str]:
    warm = ["-m", "deploy.local.warm", library] if library else ["-m"]
    return [sys.executable, *warm, module, *commands]
