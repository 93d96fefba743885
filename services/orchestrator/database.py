"""Connections to the orchestrator's database, and the one seam for its errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import grpc
import psycopg
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.common import logs
from services.common.config import ConfigError
from services.common.errors import ByokeepError

log = logging.getLogger(__name__)
_ASK_AGAIN_SECONDS: Final = 1.0


class Database:
    """Two small pools: single statements run in autocommit, one round trip each."""

    def __init__(self, url: str, connections: int) -> None:
        """Prepare for a `postgresql://` URL; nothing is opened yet."""
        for_transactions = max(1, connections // 3)
        self._transactions = _engine(url, for_transactions)
        # Switching one pool's connections back and forth costs a fifth of a statement.
        self._statements = _engine(
            url,
            max(1, connections - for_transactions),
            isolation_level="AUTOCOMMIT",
            pool_reset_on_return=None,
        )

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection on which each statement is a transaction of its own."""
        async with _domain_errors(), self._statements.connect() as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection in a transaction: committed at the end, rolled back on error."""
        async with _domain_errors(), self._transactions.begin() as connection:
            yield connection

    async def wait(self) -> None:
        """Wait until the database answers: services start in any order.

        Raises ConfigError: it has no schema yet.
        """
        while True:
            try:
                async with self.statement() as connection:
                    await connection.execute(text("SELECT FROM tenant LIMIT 1"))
                return
            except ByokeepError:
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
            except exc.ProgrammingError:
                break
        raise ConfigError(
            "the database has no schema: run 'python -m services.orchestrator migrate' first"
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._statements.dispose()
        await self._transactions.dispose()


async def raw(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """Return the psycopg connection below, for the queue to join the transaction."""
    fairy = await connection.get_raw_connection()
    return cast("psycopg.AsyncConnection[Any]", fairy.driver_connection)


def _engine(url: str, connections: int, **options: Any) -> AsyncEngine:
    return create_async_engine(
        url.replace("postgresql://", "postgresql+psycopg://", 1),
        pool_size=connections,
        max_overflow=0,
        pool_timeout=10,
        pool_recycle=1800,
        # Rows hold content of customers; an exception's text must not.
        hide_parameters=True,
        **options,
    )


@asynccontextmanager
async def _domain_errors() -> AsyncIterator[None]:
    failed: Exception | None = None
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        failed = error
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        failed = error
    if failed is not None:
        logs.failure(log, "database_unavailable", failed)
        raise ByokeepError(
            grpc.StatusCode.UNAVAILABLE,
            "DEPENDENCY_UNAVAILABLE",
            "the database does not answer; try again",
            dependency="database",
        )
