"""Connections to the orchestrator's database, and the one seam for its errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import psycopg
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from services.common import logs
from services.common.errors import ByokeepError

log = logging.getLogger(__name__)


class Database:
    """A small pool. Reads and single statements run in autocommit: one round trip each."""

    def __init__(self, url: str, connections: int) -> None:
        """Prepare a pool for a `postgresql://` URL; nothing is opened yet."""
        self._engine = create_async_engine(
            url.replace("postgresql://", "postgresql+psycopg://", 1),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=10,
            pool_recycle=1800,
            # Rows hold content of customers; an exception's text must not.
            hide_parameters=True,
        )
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection on which each statement is a transaction of its own."""
        async with _domain_errors(), self._autocommit.connect() as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection in a transaction: committed at the end, rolled back on error."""
        async with _domain_errors(), self._engine.begin() as connection:
            yield connection

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


async def raw(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """Return the psycopg connection below, for the queue to join the transaction."""
    fairy = await connection.get_raw_connection()
    return cast("psycopg.AsyncConnection[Any]", fairy.driver_connection)


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
