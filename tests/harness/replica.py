"""keyvaults in processes of their own, on one database: replicas that can be killed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from services.keyvault import migrate
from services.keyvault.config import Settings
from tests.harness import keyvault as kv

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 90


def environment(settings: Settings) -> dict[str, str]:
    """The environment that says the same as some settings."""
    said = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None:
            said[f"BYOKEEP_{field.name.upper()}"] = str(value)
    return said


class Process:
    """A keyvault process; it can be killed and started again."""

    def __init__(
        self, environ: Mapping[str, str], folder: Path, name: str, role: str = "all"
    ) -> None:
        self._role = role
        self._ready = folder / f"{name}.ready"
        self._address = folder / f"{name}.sock"
        self._log = folder / f"{name}.log"
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        self._environ = {
            **environ,
            **kept,
            "BYOKEEP_LISTEN": self.address,
            "BYOKEEP_HEALTH_LISTEN": f"unix:{folder}/{name}.health",
            "BYOKEEP_READY_FILE": str(self._ready),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:{self._address}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.keyvault", "serve", "--role", self._role],
                cwd=ROOT,
                env=self._environ,
                stderr=log,
            )

    def wait(self, seconds: float = _SECONDS) -> None:
        """Wait until it serves."""
        assert self._process is not None
        end = time.monotonic() + seconds
        while not _written(self._ready):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, "keyvault does not start"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)


def _written(ready: Path) -> bool:
    try:
        return bool(json.loads(ready.read_text())["pid"])
    except (OSError, ValueError):
        return False


class Replica(kv.Keyvault):
    """Channels to a keyvault that is a process."""

    def __init__(self, deployment: kv.Deployment, process: Process, trust: dict) -> None:
        super().__init__(deployment, None, 0, trust)
        self.process = process

    def target(self) -> str:
        return self.process.address


@asynccontextmanager
async def replicas(deployment: kv.Deployment, number: int, **changes):
    """So many keyvaults on one database, killed when the block ends."""
    async with in_roles(deployment, *["all"] * number, **changes) as started:
        yield started


@asynccontextmanager
async def in_roles(
    deployment: kv.Deployment, *roles: str, only: Mapping[str, dict] | None = None, **changes
):
    """A keyvault for each role on one database, killed when the block ends.

    `only` has settings of a role's own. The first role's are those that the database is
    migrated with.
    """
    settings = [deployment.settings(**{**changes, **(only or {}).get(role, {})}) for role in roles]
    trust = await migrate.bootstrap(settings[0])
    started = []
    try:
        for index, role in enumerate(roles):
            environ = environment(settings[index])
            process = Process(environ, deployment.folder, f"replica{index}", role)
            started.append(Replica(deployment, process, trust))
            process.start()
        for one in started:
            await asyncio.to_thread(one.process.wait)
        yield started
    finally:
        for one in started:
            await one.close_channels()
            one.process.kill()
