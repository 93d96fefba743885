"""Starts, watches and stops a whole stack on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import material
from .pki import CertificateAuthority
from .ports import Ports
from .postgres import ROLES, EmbeddedPostgres, new_password
from .processes import Process, StackError, launched, wait_for
from .state import CHECKOUT, State
from .topology import SERVICES, Topology

_READY_SECONDS = 60.0
_MIGRATE_SECONDS = 60.0
_STOP_SECONDS = 12.0  # a service drains for up to 10 s
_RENEW_SECONDS = 3600.0
# Who calls ends before who is called.
_STOP_ORDER = ("orchestrator", "runner", "keyvault", "emulator")
_ZONES = {stem: role for role, stem in ROLES.items()}

_SERVED = tuple(
    f"{service}{which}" for service in SERVICES for which in ("", "-health", "-metrics")
)
_EMULATED = ("emulator", "emulator-control")
PORTS = (*_SERVED, *_EMULATED)
"""Names of the ports that a stack listens on: its services, the emulator and its control."""

# (what, state or address, seconds since the start)
Report = Callable[[str, str, float], None]


def _silent(name: str, what: str, seconds: float) -> None:
    del name, what, seconds


class LocalStack:
    """PostgreSQL, emulator and the three services, with tenant `demo`.

    Start it from a thread that lives as long as the stack: the kernel ends the
    processes when that thread is gone (see `processes.launched`).
    """

    def __init__(
        self,
        state: State,
        *,
        live: bool = False,
        report: Report = _silent,
        extra: Mapping[str, Mapping[str, str]] | None = None,
        ports: Mapping[str, int] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """``live``: real provider hosts instead of the emulator. ``extra``: variables by
        process name that are added to its environment. ``ports``: numbers by a name of PORTS;
        the others are free ones. ``host``: the address that all listen on; PostgreSQL too, on
        its usual port, where it is not this machine's own. Raises StackError for a port that
        can't be had.
        """
        fixed = dict(ports or {})
        if unknown := fixed.keys() - set(PORTS):
            raise StackError(f"no port {min(unknown)}; there are: {', '.join(PORTS)}")
        self.state = state
        self.live = live
        self.postgres = EmbeddedPostgres(
            state.postgres,
            log=state.logs / "postgres.log",
            host="" if host == "127.0.0.1" else host,
        )
        self._report = report
        self._ports = Ports()
        try:
            numbers = {name: self._ports.reserve(fixed.get(name, 0)) for name in _SERVED}
            # The emulator binds its own, and says which; what is fixed is looked at now.
            for name in _EMULATED:
                if fixed.get(name):
                    Ports.probe(fixed[name])
        except StackError:
            self._ports.close()
            raise
        numbers |= {name: fixed.get(name, 0) for name in _EMULATED}
        self.topology = Topology(state, numbers, live, extra or {}, host)
        self._processes: dict[str, Process] = {}
        self._migration: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._authorities: tuple[CertificateAuthority, CertificateAuthority] | None = None

    @property
    def authority(self) -> CertificateAuthority:
        """The stack's CA. Raises StackError before the start."""
        return self._both_authorities()[0]

    def process(self, name: str) -> Process:
        """Return `keyvault`, `orchestrator`, `runner`, `emulator` or `postgres`.

        Raises StackError for another name, or one that isn't started.
        """
        if name == "postgres":
            return self.postgres.process
        try:
            return self._processes[name]
        except KeyError:
            raise StackError(f"no process {name} in this stack") from None

    @property
    def emulator_ports(self) -> tuple[int, int] | None:
        """HTTPS and control port of the emulator; None with ``live``."""
        if self.live:
            return None
        ready = json.loads(self.topology.ready_file("emulator").read_text())
        return int(ready["https_port"]), int(ready["control_port"])

    def database_url(self, zone: str) -> str:
        """URL of `keyvault`'s or `orchestrator`'s database, with its role's password."""
        return material.database_url_file(self.state, zone).read_text()

    def start(self) -> None:
        """Bring everything up; on a failure stop it all again.

        Raises StackError: which process, and the last lines of its log.
        """
        self._started = time.monotonic()
        try:
            self._bring_up()
        except BaseException:
            self.stop()
            raise

    def stop(self, *, discard: bool = False) -> None:
        """Stop all, clients before servers. With ``discard`` the data is not flushed."""
        order = [name for name in _STOP_ORDER if name in self._processes]
        if self._migration is not None and self._migration.poll() is None:
            self._migration.kill()
            self._migration.communicate()
        for name in order:
            self._processes[name].signal(signal.SIGTERM)
        for name in order:
            self._processes[name].stop(_STOP_SECONDS)
        self.postgres.stop(discard=discard)
        self.state.description.unlink(missing_ok=True)
        self._ports.close()

    def wait_ready(self, name: str) -> None:
        """Wait until a process serves. Raises StackError with the end of its log."""
        if name == "postgres":
            self.postgres.wait_ready()
            return
        process = self.process(name)
        ready = wait_for(
            lambda: _announced(self.topology.ready_file(name), process.pid) or not process.running,
            _READY_SECONDS,
        )
        if not ready or not process.running:
            raise StackError(_failure(name, process.exit_status, process.log))

    def watch(self) -> None:
        """Stay until interrupted: start again what ends, renew certificates in time.

        Returns by an exception only, such as KeyboardInterrupt.
        """
        renew = time.monotonic() + _RENEW_SECONDS
        while True:
            time.sleep(1.0)
            for name in [*self._processes, "postgres"]:
                process = self.process(name)
                if not process.running:
                    self._report(name, f"ended with {process.exit_status}; starting it again", 0.0)
                    process.start()
                    self._describe()
            if time.monotonic() > renew:
                renew += _RENEW_SECONDS
                material.make_certificates(self.state, *self._both_authorities())

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def _bring_up(self) -> None:
        self._authorities = material.make_authorities(self.state)
        material.make_certificates(self.state, *self._authorities)
        material.make_keyring(self.state)
        material.make_grant_key(self.state)
        if not self.live:
            self._launch(self.topology.emulator())
        # Who has to wait loads its libraries meanwhile.
        self._migration = migration = self._migrate_keyvault()
        self._launch(self.topology.service("orchestrator"), held=True)
        self._start_postgres()
        _release(migration)
        self._processes["orchestrator"].release()
        self._launch(self.topology.service("keyvault"), held=True)
        self._launch(self.topology.service("runner", self._emulator_port()))
        material.write_trust(self.state, self._trust(migration))
        self._processes["keyvault"].release()
        for name in SERVICES:
            self.wait_ready(name)
            self._say(name, self.topology.address(name))
        self._create_tenant()
        self._describe()

    def _start_postgres(self) -> None:
        self.postgres.start()
        for zone, role in _ZONES.items():
            url = self.postgres.create_database(zone, role, new_password())
            material.write_database_url(self.state, zone, url)
        self._say("postgres", "two databases, two roles")

    def _launch(self, process: Process, *, held: bool = False) -> None:
        self.topology.ready_file(process.name).unlink(missing_ok=True)
        self._processes[process.name] = process
        process.start(held=held)

    def _emulator_port(self) -> int | None:
        if self.live:
            return None
        self.wait_ready("emulator")
        self._say("emulator", "plays the three providers")
        ports = self.emulator_ports
        assert ports is not None  # noqa: S101 - not live
        return ports[0]

    def _migrate_keyvault(self) -> subprocess.Popen[bytes]:
        with _migration_log(self.state).open("ab") as log:
            return subprocess.Popen(
                launched(self.topology.keyvault_migration(), signal.SIGKILL),
                env=self.topology.environment("keyvault"),
                cwd=CHECKOUT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def _trust(self, migration: subprocess.Popen[bytes]) -> Any:
        try:
            output, _ = migration.communicate(timeout=_MIGRATE_SECONDS)
        except subprocess.TimeoutExpired:
            migration.kill()
            output, _ = migration.communicate()
        status = migration.returncode
        if status != 0:
            raise StackError(_failure("keyvault migrate", status, _migration_log(self.state)))
        return _json_of(output)

    def _create_tenant(self) -> None:
        # Imported here: it loads grpc while the processes start.
        from . import seed

        addresses = {zone: self.topology.address(zone) for zone in _ZONES}
        seed.create_tenant(self.state, material.TENANT, **addresses)
        material.write_profiles(self.state.config, self.state, **addresses)
        self._say("tenant", material.TENANT)

    def _describe(self) -> None:
        description = {
            "pid": os.getpid(),
            "live": self.live,
            "ports": {name: self.topology.ports[name] for name in _SERVED},
            "processes": {name: self.process(name).pid for name in [*self._processes, "postgres"]},
            "emulator": self.emulator_ports,
        }
        self.state.description.write_text(json.dumps(description, indent=2) + "\n")

    def _both_authorities(self) -> tuple[CertificateAuthority, CertificateAuthority]:
        if self._authorities is None:
            raise StackError("the stack was not started")
        return self._authorities

    def _say(self, name: str, what: str) -> None:
        self._report(name, what, time.monotonic() - self._started)


def _migration_log(state: State) -> Path:
    return state.logs / "keyvault-migrate.log"


def _release(migration: subprocess.Popen[bytes]) -> None:
    if migration.stdin is not None:
        migration.stdin.close()
        migration.stdin = None  # for communicate(), which would flush it


def _announced(path: Path, pid: int) -> bool:
    try:
        return bool(json.loads(path.read_text())["pid"] == pid)
    except (FileNotFoundError, ValueError):
        return False  # not there, or half written


def _json_of(output: bytes) -> Any:
    try:
        return json.loads(output)
    except ValueError:
        raise StackError("keyvault migrate did not print its trust material as JSON") from None


def _failure(name: str, status: int | None, log: Path) -> str:
    how = f"did not become ready in {_READY_SECONDS:.0f} s"
    if status is not None:
        how = f"ended with status {status}"
    lines = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
    return "\n".join([f"{name} {how}. The end of {log}:", *(f"  {line}" for line in lines)])
