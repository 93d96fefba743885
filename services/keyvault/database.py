"""keyvault's database: a pool, transactions, and driver errors turned at one seam.

SQL is written out where it is used in `store`: in this zone a reader should see
the very statement. SQLAlchemy owns the schema and its migrations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, LiteralString

import grpc
import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from services.common.errors import ByokeepError

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Row = tuple[Any, ...]
Cursor = psycopg.AsyncCursor[Row]
Parameters = Sequence[Any] | Mapping[str, Any]
_WAIT_SECONDS = 5.0


class Database:
    """A pool of connections in autocommit; `transaction` opens one."""

    def __init__(self, url: str, connections: int) -> None:
        """Keep the URL; `open` connects."""
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            min_size=1,
            max_size=connections,
            open=False,
            timeout=_WAIT_SECONDS,
            kwargs={"autocommit": True, "application_name": "byokeep-keyvault"},
        )

    async def open(self) -> None:
        """Connect. Raises ByokeepError where the database does not answer."""
        with _seam():
            await self._pool.open(wait=True, timeout=15)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Run statements as one transaction; an exception rolls it back."""
        with _seam():
            async with self._pool.connection() as connection, connection.transaction():
                yield connection

    @asynccontextmanager
    async def pipelined(self) -> AsyncIterator[Connection]:
        """As `transaction`, with the statements sent without waiting for each other: BEGIN goes
        with the first, COMMIT with the last. Only what is fetched inside is waited for; what the
        last one returns is fetched after the block, when it is committed."""
        with _seam():
            async with (
                self._pool.connection() as connection,
                connection.pipeline(),
                connection.transaction(),
            ):
                yield connection

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

    async def healthy(self) -> bool:
        """Say whether the database answers."""
        try:
            return await self.one("SELECT 1") is not None
        except ByokeepError:
            return False


@contextmanager
def _seam() -> Iterator[None]:
    # The driver's text may hold parameters: the caller is told only that it failed.
    failed = ""
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout):
        failed = "DEPENDENCY_UNAVAILABLE"
    except psycopg.Error:
        failed = "AUDIT_UNAVAILABLE"
    if failed:
        raise ByokeepError(
            grpc.StatusCode.UNAVAILABLE,
            failed,
            "keyvault's database does not answer, or does not take what must be written;"
            " nothing was released; try again",
            dependency="database",
        )
