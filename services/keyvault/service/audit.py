"""AuditService."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from typing import Any

import grpc
from byokeep import dsse
from byokeep.keyvault.v1 import audit_pb2 as pb
from byokeep.keyvault.v1 import audit_pb2_grpc

from services.common.errors import ByokeepError
from services.keyvault.database import Database
from services.keyvault.domain import not_found
from services.keyvault.signer import Signer, sign_statement
from services.keyvault.store import audit as store

_DEFAULT_PAGE = 200


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """Serves auditors."""

    def __init__(self, database: Database, signer: Signer, deployment: str) -> None:
        """Serve the chains of a database; heads are signed."""
        self._database = database
        self._signer = signer
        self._deployment = deployment

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Any
    ) -> pb.ListEventsResponse:
        """List events."""
        size = request.page_size or _DEFAULT_PAGE
        rows = await store.page(
            self._database, request.parent, request.key_id, _after(request.page_token), size + 1
        )
        more = str(rows[size - 1][0]) if len(rows) > size else ""
        return pb.ListEventsResponse(
            events=[pb.AuditEvent.FromString(body) for _, body in rows[:size]],
            next_page_token=more,
        )

    async def ExportEvents(
        self, request: pb.ExportEventsRequest, context: Any
    ) -> AsyncIterator[pb.ExportEventsResponse]:
        """Stream a chain up to the head that it had when asked, then that head, signed."""
        head = await store.head(self._database, request.parent)
        if head is None:
            raise not_found("audit chain")
        async for sequence, body, previous, digest in store.links(self._database, request.parent):
            if sequence > head[0]:
                break
            event = pb.ChainedEvent(body=body, previous_hash=previous, hash=digest)
            yield pb.ExportEventsResponse(event=event)
        statement = pb.ChainHead(
            deployment=self._deployment, chain=request.parent, sequence=head[0], hash=head[1]
        )
        statement.sign_time.FromDatetime(datetime.datetime.now(datetime.UTC))
        yield pb.ExportEventsResponse(
            head=await sign_statement(
                self._signer,
                dsse.CHAIN_HEAD,
                statement.SerializeToString(deterministic=True),
            )
        )

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        """Answer UNIMPLEMENTED: signed notes of the log come with a later release."""
        raise not_built("GetCheckpoint", "export a chain: its head is signed")

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        """Answer UNIMPLEMENTED, as GetCheckpoint."""
        raise not_built("ListCheckpoints", "export a chain: its head is signed")


def not_built(method: str, instead: str) -> ByokeepError:
    """Return the error for a method that is in the contract and not built yet."""
    return ByokeepError(
        grpc.StatusCode.UNIMPLEMENTED,
        "NOT_BUILT_YET",
        f"{method} is not built yet; {instead}",
        method=method,
    )


def _after(token: str) -> int:
    if not token:
        return 0
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "page_token: not one that this service gave",
            field="page_token",
        )
    return int(token)
