"""PostgreSQL, for the services that have a database: no wait for it is without an end.

A connection whose server neither answers nor closes it (a stopped process, a machine that is
gone) looks like a slow one for ever, and TCP's keepalives see nothing: the kernel of a stopped
server answers them. So each round trip has a deadline. A statement that passes it is cancelled;
where that is not answered either, the connection is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.waiting import wait_async
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from services.common import deadline, logs
from services.common.config import ConfigError, read_secret_file
from services.common.waiting import NotYetError

log = logging.getLogger(__name__)
RV = TypeVar("RV")

#: The longest that one round trip may take, where no call's deadline is sooner.
ROUND_TRIP_SECONDS: Final = 10.0
#: A connection that listens is pinged so often.
PING_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 5  # libpq takes whole ones
# How long a server has to end a statement: one that is late for its caller, one that is not wanted.
_LATE_SECONDS: Final = 0.25
_CANCEL_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.1
# After it a pool gives up, and begins anew with short pauses when it is asked for a connection.
_RECONNECT_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0

#: What psycopg raises where there is no database, or none any more.
LOST: Final = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
_SILENT = "the database neither answers nor closes the connection"

# libpq has no code for why a connection failed. The server's words are known where it speaks
# English; where not, that it asked for a password and then refused says the same.
_CAUSES: Final = (
    ("password authentication failed", "the database refuses the role's password"),
    ("no pg_hba.conf entry", "the database's pg_hba.conf does not let us in"),
    ("does not exist", "the server has no such database or role"),
    ("starting up", "the database server is starting"),
    ("shutting down", "the database server is shutting down"),
    ("too many", "the database server takes no more connections"),
    ("remaining connection slots", "the database server takes no more connections"),
    ("SSL", "the database server does not do TLS as the URL asks for"),
    ("certificate", "the database server's certificate is not the expected one"),
    ("Connection refused", "no database server answers at the URL's address"),
    ("No such file or directory", "no database server answers at the URL's address"),
    ("resolve", "the host name of the database's URL is not known"),
    ("Name or service not known", "the host name of the database's URL is not known"),
)


def database_url(file: Path) -> str:
    """Return the database's URL from its 0600 file.

    Raises:
        ConfigError: unreadable, readable by others, or no such URL; it is not shown.
    """
    name = "BYOKEEP_DATABASE_URL_FILE"
    url = read_secret_file(name, file)
    parsed = None
    with suppress(psycopg.ProgrammingError):  # its text has the URL, and so the password
        parsed = conninfo_to_dict(url)
    if parsed is None or not url.startswith("postgresql://"):
        raise ConfigError(
            f"{name}: {file} must hold a URL of the form"
            " postgresql://role:password@host:port/database"
        )
    return url


def cause(error: BaseException) -> str:
    """Say why a database could not be used: a sentence of ours, nothing of the server's text."""
    if isinstance(error, errors.ConnectionTimeout):
        return "the database server does not answer in time"
    if isinstance(error, PoolTimeout):
        return "no connection to the database is free in time, or can be made"
    if isinstance(error, SilentError):
        return _SILENT
    text = str(error)
    for fragment, sentence in _CAUSES:
        if fragment in text:
            return sentence
    if error.__class__ is psycopg.OperationalError:
        refused = getattr(getattr(error, "pgconn", None), "used_password", False)
        return _CAUSES[0][1] if refused else "the connection to the database is lost"
    return f"the database refuses: {type(error).__name__}"


class SilentError(psycopg.OperationalError):
    """The server neither answered in time, nor closed the connection."""


class Connection(psycopg.AsyncConnection[Any]):
    """A connection, in autocommit, whose every round trip has a deadline."""

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        """See psycopg."""
        chosen = {"autocommit": True, "connect_timeout": _CONNECT_SECONDS, **options}
        return await super().connect(conninfo, **chosen)

    async def wait(
        self, gen: PQGen[RV], interval: float = _POLL_SECONDS, timeout: float | None = None
    ) -> RV:
        """See psycopg; without a timeout the call's deadline is that. Raises SilentError."""
        if timeout is not None:
            return await super().wait(gen, interval, timeout)
        interrupted: asyncio.CancelledError | None = None
        try:
            seconds = deadline.left(ROUND_TRIP_SECONDS)
            return await wait_async(gen, self.pgconn.socket, interval, seconds)
        except errors._WaitTimeout:
            grace = _LATE_SECONDS
        except asyncio.CancelledError as error:
            interrupted, grace = error, _CANCEL_SECONDS
        answer = await self._stopped(gen, interval, grace)
        if interrupted is not None:
            raise interrupted
        if isinstance(answer, psycopg.Error):
            raise answer
        return answer

    async def _stopped(self, gen: PQGen[RV], interval: float, seconds: float) -> RV | psycopg.Error:
        """Have the server end a statement, whose connection lives then; give the connection up
        where it does not. Returns what came of the statement."""
        try:
            await self.cancel_safe(timeout=seconds)
            return await wait_async(gen, self.pgconn.socket, interval, seconds)
        except errors.QueryCanceled as error:
            return error
        except psycopg.Error:
            self.pgconn.finish()
        except BaseException:
            self.pgconn.finish()
            raise
        logs.event(log, "database_silent", level=logging.ERROR)
        return SilentError(_SILENT)


class Pool(AsyncConnectionPool[Connection]):
    """A pool of such connections in autocommit, for one event loop."""

    def __init__(
        self,
        url: str,
        connections: int,
        *,
        wait_seconds: float,
        **options: Any,
    ) -> None:
        """Prepare for a URL; `open` connects. `wait_seconds` is how long a connection is waited
        for, `options` are psycopg's own."""
        super().__init__(
            url,
            connection_class=Connection,
            min_size=1,
            max_size=connections,
            open=False,
            timeout=wait_seconds,
            reconnect_timeout=_RECONNECT_SECONDS,
            kwargs=options,
        )

    async def getconn(self, timeout: float | None = None) -> Connection:
        """See psycopg; a call's deadline counts."""
        return await super().getconn(deadline.left(self.timeout if timeout is None else timeout))

    async def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Close every connection; one that hangs is left to the process's end."""
        await super().close(timeout)

    async def answers(self, seconds: float) -> bool:
        """Say whether the database answers within so many seconds."""
        silent = False
        try:
            with deadline.within(seconds):
                async with self.connection() as connection:
                    await connection.execute("SELECT")
            return True
        except LOST as error:
            silent = isinstance(error, SilentError)
        if silent:
            # The others are of the same server: each would keep some call waiting.
            await self.drain()
        return False


def newest(migrations: Path) -> str:
    """Return the newest revision of a zone's migrations: each file's name begins with its own."""
    files = (migrations / "versions").glob("[0-9]*_*.py")
    return max(file.name for file in files).partition("_")[0]


async def probe(url: str, revision: str = "", migrate: str = "") -> None:
    """Connect once. With a revision, look whether the schema is there, and at it or past it;
    `migrate` is the command that brings it there.

    Raises:
        NotYetError: "database" with the cause, or "schema".
    """
    failed: psycopg.Error | None = None
    found = ""
    try:
        async with await Connection.connect(url) as connection:
            with deadline.within(_CONNECT_SECONDS):
                if revision:
                    found = await _revision(connection)
    except psycopg.Error as error:
        failed = error
    if failed is not None:
        raise NotYetError("database", cause(failed))
    if found < revision:
        there = f"it is at revision {found}, not {revision}" if found else "it is not there"
        raise NotYetError("schema", f"{there}; it comes with '{migrate}'")


async def _revision(connection: Connection) -> str:
    """Return the revision that Alembic noted, or an empty text."""
    there = await connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL")
    if await there.fetchone() != (True,):
        return ""
    noted = await connection.execute("SELECT coalesce(max(version_num), '') FROM alembic_version")
    row = await noted.fetchone()
    return str(row[0]) if row else ""


async def notices(connection: Connection) -> AsyncIterator[psycopg.Notify]:
    """Yield what a listening connection hears. Raises psycopg.Error where it hears no more: it
    is pinged, for a server that is gone is as silent as one that has nothing to tell."""
    while True:
        async for notice in connection.notifies(timeout=PING_SECONDS):
            yield notice
        with deadline.within(PING_SECONDS):
            await connection.execute("SELECT")


class _Cause(logging.Filter):
    """Makes psycopg's own log lines say why, and a lasting cause but once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._told = logs.Repeated(log)

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        found = [cause(one) for one in arguments if isinstance(one, BaseException)]
        if not self._told.is_news(str(record.msg), str(found)):
            return False
        # Its arguments are connections and exceptions: names of roles, databases and hosts.
        event = str(record.msg).split(":")[0].replace(" in %r", "").replace(" %s", "")
        record.msg, record.args = event.strip().replace(" ", "_"), ()
        record.byokeep_fields = {"logger": record.name, "cause": ", ".join(found)}
        return True


# A logger's filters see only its own records: both names, once a process.
for _name in ("psycopg", "psycopg.pool"):
    logging.getLogger(_name).addFilter(_Cause())
