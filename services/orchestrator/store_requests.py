"""Request ids: the same request twice changes nothing more, another one under its id is refused."""

from __future__ import annotations

import hashlib

import grpc
from google.protobuf.message import Message
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.common.errors import ByokeepError
from services.orchestrator.schema import request as table


class Repeated(Exception):
    """The request id came before."""


def digest_of(message: Message) -> bytes:
    """Return a request's digest. Never stored beside anything that could be guessed from it."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def conflict() -> ByokeepError:
    """Return the refusal of a request id that came before with other content."""
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_CONFLICT",
        "this request id came before with other content; use a new one",
        field="request_id",
    )


async def seen(
    connection: AsyncConnection, tenant: str, method: str, scope: str, digest: bytes
) -> str | None:
    """Return the resource of an earlier request, or None. Raises REQUEST_ID_CONFLICT."""
    found = await connection.execute(
        select(table.c.digest, table.c.resource).where(
            table.c.tenant == tenant, table.c.method == method, table.c.scope == scope
        )
    )
    row = found.one_or_none()
    if row is None:
        return None
    if bytes(row.digest) != digest:
        raise conflict()
    return str(row.resource)


async def first_time(
    connection: AsyncConnection, tenant: str, message: Message, *, resource: str = ""
) -> bool:
    """Note a request in the transaction that carries it out; False if it was before.

    Raises ByokeepError: REQUEST_ID_CONFLICT.
    """
    method = message.DESCRIPTOR.name.removesuffix("Request")
    request_id: str = getattr(message, "request_id")  # noqa: B009 - of any mutation's message
    digest = digest_of(message)
    done = await connection.execute(
        insert(table)
        .values(tenant=tenant, method=method, scope=request_id, digest=digest, resource=resource)
        .on_conflict_do_nothing()
        .returning(table.c.scope)
    )
    if done.one_or_none() is not None:
        return True
    await seen(connection, tenant, method, request_id, digest)
    return False
