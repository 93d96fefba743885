"""Connections to the orchestrator's database, and the one seam for its errors.

SQL is written out and run through psycopg; SQLAlchemy owns the schema and its migrations
(docs/decisions/0003-sql.md has the measurements).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, LiteralString, TypeAlias

import grpc
import psycopg
from psycopg.rows import namedtuple_row

from services.common import logs, postgres
from services.common.errors import ByokeepError
from services.common.turns import Turns

log = logging.getLogger(__name__)
_WAIT_SECONDS: Final = 5.0
_HEALTH_SECONDS: Final = 3.0
#: A row: a named tuple of the statement's columns.
Row: TypeAlias = Any
Parameters: TypeAlias = Mapping[str, Any]


class Session:
    """Runs statements, with named parameters, on one connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Use a connection; `connection` is also the queue's way into the transaction."""
        self.connection = connection

    async def all(
        self, statement: LiteralString, parameters: Parameters | None = None
    ) -> list[Row]:
        """Return every row."""
        return await (await self.connection.execute(statement, parameters)).fetchall()

    async def one(self, statement: LiteralString, parameters: Parameters | None = None) -> Row:
        """Return the first row; None where there is none."""
        return await (await self.connection.execute(statement, parameters)).fetchone()

    async def run(self, statement: LiteralString, parameters: Parameters | None = None) -> int:
        """Return how many rows were written."""
        return (await self.connection.execute(statement, parameters)).rowcount


class Database:
    """A pool of connections in autocommit: a single statement is one round trip."""

    def __init__(self, url: str, connections: int) -> None:
        """Prepare for a `postgresql://` URL; `open` connects."""
        self._told = logs.Repeated(log)
        self._turns = Turns(at_once=1)
        self._pool = postgres.Pool(
            url,
            connections,
            wait_seconds=_WAIT_SECONDS,
            row_factory=namedtuple_row,
            application_name="byokeep-orchestrator",
        )

    def stats(self) -> dict[str, int]:
        """Return the pool's figures, by psycopg_pool's names for them."""
        return self._pool.get_stats()

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Session]:
        """Give a session on which each statement is a transaction of its own.

        Raises ByokeepError: DEPENDENCY_UNAVAILABLE.
        """
        connection, failed = None, None
        try:
            # The pool's own context manager costs a quarter of what a statement does.
            connection = await self._pool.getconn()
            yield Session(connection)
        except postgres.LOST as error:
            failed = error
        finally:
            if connection is not None:
                await self._pool.putconn(connection)
        if failed is not None:
            self._told.failure("database_unavailable", failed, cause=postgres.cause(failed))
            raise ByokeepError(
                grpc.StatusCode.UNAVAILABLE,
                "DEPENDENCY_UNAVAILABLE",
                "the database does not answer; try again",
                dependency="database",
            )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Session]:
        """Give a session in a transaction: committed at the end, rolled back on error."""
        async with self.statement() as session, session.connection.transaction():
            yield session

    @asynccontextmanager
    async def of_tenant(self, tenant: str) -> AsyncIterator[Session]:
        """Give a session in a transaction that locks a tenant's row, or changes it.

        The row lets one in at a time, here and at other replicas. The others of this one wait
        before they have a connection: one tenant's would keep all of them from every other.
        """
        give_back = await self._turns.take(tenant)
        try:
            async with self.transaction() as session:
                yield session
        finally:
            give_back()

    async def batch(self, *statements: tuple[LiteralString, Parameters]) -> list[Row]:
        """Run statements as one transaction, all sent before the first answer is waited for: no
        client that stands still holds what they lock. Return the rows of the last."""
        async with self.statement() as session:
            connection = session.connection
            async with connection.pipeline(), connection.transaction():
                for statement, parameters in statements:
                    cursor = await connection.execute(statement, parameters)
            return await cursor.fetchall()

    async def open(self) -> None:
        """Begin to connect."""
        await self._pool.open()

    async def answers(self) -> bool:
        """Say whether the database answers."""
        return await self._pool.answers(_HEALTH_SECONDS)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()
