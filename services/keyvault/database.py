"""keyvault's database: a pool, transactions, and driver errors turned at one seam.

SQL is written out in `sql`: in this zone a reader should see the very statement. SQLAlchemy owns
the schema and its migrations.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, LiteralString

import grpc
import psycopg
import psycopg.errors

from services.common import logs, postgres
from services.common.errors import ByokeepError

log = logging.getLogger(__name__)
Connection = postgres.Connection
Row = tuple[Any, ...]
Parameters = Sequence[Any] | Mapping[str, Any]
_WAIT_SECONDS = 5.0
_HEALTH_SECONDS = 3.0
# What keyvault rests on is not left to a server's or a role's defaults: a commit is on the
# disk when it is answered, and each statement sees what was committed before it.
# Names mean PostgreSQL's own things first, whatever a role's search_path says: `now()` too.
# And a statement is planned once a connection: to plan a lease costs more than to run it. So no
# plan may read a table whole because it was empty when the plan was made (leases are soon many).
_OPTIONS = (
    r"-c synchronous_commit=on -c default_transaction_isolation=read\ committed"
    " -c search_path=public,pg_temp"
    " -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
)
_LOST = "DEPENDENCY_UNAVAILABLE"


class DuplicateError(Exception):
    """A row with the same unique value is there."""


class Database:
    """A pool of connections in autocommit; `transaction` opens one."""

    def __init__(self, url: str, connections: int) -> None:
        """Keep the URL; `open` connects."""
        self._pool = postgres.Pool(
            url,
            connections,
            wait_seconds=_WAIT_SECONDS,
            application_name="byokeep-keyvault",
            options=_OPTIONS,
        )

    async def open(self) -> None:
        """Begin to connect."""
        await self._pool.open()

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    def stats(self) -> dict[str, int]:
        """Return the pool's figures, by psycopg_pool's names for them."""
        return self._pool.get_stats()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Run statements as one transaction; an exception rolls it back."""
        with _seam():
            async with self._pool.connection() as connection, connection.transaction():
                yield connection

    @asynccontextmanager
    async def pipelined(self) -> AsyncIterator[Connection]:
        """As `transaction`, with the statements sent without waiting for each other: BEGIN goes
        with the first, COMMIT with the last. Only what is fetched inside is waited for."""
        # psycopg's own transaction block would cost as much as two statements more.
        with _seam():
            async with self._pool.connection() as connection:
                try:
                    async with connection.pipeline():
                        await connection.execute("BEGIN")
                        yield connection
                        commit = await connection.execute("COMMIT")
                except BaseException:
                    # What was sent before is answered by now; a lost connection rolls back alone.
                    with suppress(psycopg.Error):
                        await connection.rollback()
                    raise
            # PostgreSQL answers ROLLBACK to the COMMIT of a transaction that failed.
            if commit.statusmessage != "COMMIT":
                raise psycopg.OperationalError

    async def one(self, sql: LiteralString, parameters: Parameters = ()) -> Row | None:
        """Return the first row of a statement."""
        with _seam():
            async with self._pool.connection() as connection:
                return await (await connection.execute(sql, parameters)).fetchone()

    async def all(self, sql: LiteralString, parameters: Parameters = ()) -> list[Row]:
        """Return every row of a statement."""
        with _seam():
            async with self._pool.connection() as connection:
                return await (await connection.execute(sql, parameters)).fetchall()

    async def answers(self) -> bool:
        """Say whether the database answers."""
        return await self._pool.answers(_HEALTH_SECONDS)


def whole(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that have no NULL: keyvault writes none there, so somebody else did."""
    return [row for row in rows if None not in row]


def columns(rows: Collection[Row], width: int) -> list[list[Any]]:
    """Return rows of a width as columns, for `unnest`."""
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


@asynccontextmanager
async def aside(connection: Connection, event: str) -> AsyncIterator[None]:
    """Run statements that the transaction can do without: data that makes them fail undoes them
    alone, and is told in the log. Whatever else fails is raised."""
    failed = False
    try:
        async with connection.transaction():
            yield
    except (psycopg.DataError, psycopg.IntegrityError):
        failed = True
    if failed:
        logs.event(log, event, level=logging.CRITICAL)


@contextmanager
def _seam() -> Iterator[None]:
    # The driver's text may hold parameters: the caller is told only that it failed.
    failed = ""
    try:
        yield
    except postgres.LOST:
        failed = _LOST
    except psycopg.errors.UniqueViolation:
        failed = "DUPLICATE"
    except psycopg.Error:
        failed = "AUDIT_UNAVAILABLE"
    if failed == "DUPLICATE":
        raise DuplicateError
    if failed:
        raise unreachable(failed)


def is_lost(error: Exception) -> bool:
    """Say whether an error is that of a database that does not answer."""
    return isinstance(error, ByokeepError) and error.reason == _LOST


def unreachable(reason: str = _LOST) -> ByokeepError:
    """Return the error for a database that does not answer, or does not take what is written."""
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        reason,
        "keyvault's database does not answer, or does not take what must be written;"
        " nothing was released; try again",
        dependency="database",
    )
