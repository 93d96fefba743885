"""Request ids: the same request twice changes nothing more, another one under its id is refused."""

from __future__ import annotations

import hashlib

import grpc
from google.protobuf.message import Message

from services.common.errors import ByokeepError
from services.orchestrator.store.database import Session

_SEEN = """
SELECT digest, resource FROM request
WHERE tenant = %(tenant)s AND method = %(method)s AND scope = %(scope)s
"""
_FIRST = """
INSERT INTO request (tenant, method, scope, digest, resource)
VALUES (%(tenant)s, %(method)s, %(scope)s, %(digest)s, %(resource)s)
ON CONFLICT DO NOTHING RETURNING scope
"""


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


async def seen(session: Session, tenant: str, method: str, scope: str, digest: bytes) -> str | None:
    """Return the resource of an earlier request, or None. Raises REQUEST_ID_CONFLICT."""
    row = await session.one(_SEEN, {"tenant": tenant, "method": method, "scope": scope})
    if row is None:
        return None
    if bytes(row.digest) != digest:
        raise conflict()
    return str(row.resource)


async def first_time(
    session: Session, tenant: str, message: Message, *, resource: str = ""
) -> bool:
    """Note a request in the transaction that carries it out; False if it was before.

    Raises ByokeepError: REQUEST_ID_CONFLICT.
    """
    values = {
        "tenant": tenant,
        "method": _method(message),
        "scope": _request_id(message),
        "digest": digest_of(message),
        "resource": resource,
    }
    if await session.one(_FIRST, values) is not None:
        return True
    await again(session, tenant, message)
    return False


async def again(session: Session, tenant: str, message: Message) -> bool:
    """Whether a request was carried out before. Raises ByokeepError: REQUEST_ID_CONFLICT."""
    scope, digest = _request_id(message), digest_of(message)
    return await seen(session, tenant, _method(message), scope, digest) is not None


def _method(message: Message) -> str:
    return message.DESCRIPTOR.name.removesuffix("Request")


def _request_id(message: Message) -> str:
    request_id: str = getattr(message, "request_id")  # noqa: B009 - of any mutation's message
    return request_id
