"""AuditService."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from typing import Any

import grpc
from byokeep import dsse
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import audit_pb2 as pb
from byokeep.keyvault.v1 import audit_pb2_grpc

from services.common.errors import ByokeepError
from services.keyvault import event as chain
from services.keyvault.anchor import Position
from services.keyvault.checkpoints import Checkpoints
from services.keyvault.database import Database
from services.keyvault.event import Head, name_of
from services.keyvault.ledger import Ledger
from services.keyvault.lifecycle import not_found, stale
from services.keyvault.log import Log
from services.keyvault.signer import Signer
from services.keyvault.sql import events as sql
from services.keyvault.sql import log as log_sql

_DEFAULT_PAGE = 200
_DEFAULT_CHECKPOINTS = 50
_NO_SIZE = (1 << 63) - 1


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """Serves auditors."""

    def __init__(
        self,
        database: Database,
        signer: Signer,
        checkpoints: Checkpoints,
        ledger: Ledger,
        log: Log,
        deployment: str,
    ) -> None:
        """Serve the chains of a database; heads and checkpoints are signed."""
        self._database = database
        self._ledger = ledger
        self._log = log
        self._signer = signer
        self._checkpoints = checkpoints
        self._deployment = deployment

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Any
    ) -> pb.ListEventsResponse:
        """List events."""
        size = request.page_size or _DEFAULT_PAGE
        rows = await sql.page(
            self._database,
            name_of(request.parent),
            request.key_id,
            int(request.page_token or 0),
            size + 1,
        )
        more = str(rows[size - 1][0]) if len(rows) > size else ""
        return pb.ListEventsResponse(
            events=[pb.AuditEvent.FromString(body) for _, body in rows[:size]],
            next_page_token=more,
        )

    async def ExportEvents(
        self, request: pb.ExportEventsRequest, context: Any
    ) -> AsyncIterator[pb.ExportEventsResponse]:
        """Stream a chain up to the head that the log has of it, then that head, signed and
        proven."""
        last = await self._head(request.parent, request.since_size)
        head = pb.ChainHead.FromString(last.head.payload)
        name = name_of(request.parent)
        state = (await self._ledger.read(name)).state
        previous = state.pruned_hash or chain.GENESIS
        async for sequence, body, digest in sql.links(self._database, name, state.pruned_sequence):
            if sequence > head.sequence:
                break
            event = pb.ChainedEvent(body=body, previous_hash=previous, hash=digest)
            yield pb.ExportEventsResponse(event=event)
            previous = digest
        yield last

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        """Return a checkpoint of the log as it is now, and a chain's place in it."""
        if not request.parent:
            _, note = await self._signed()
            return pb.GetCheckpointResponse(checkpoint=note)
        last = await self._head(request.parent, request.since_size)
        note = last.proof.checkpoint or (await self._signed())[1]
        return pb.GetCheckpointResponse(checkpoint=note, head=last.head, proof=last.proof)

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        """List checkpoints, newest first."""
        size = request.page_size or _DEFAULT_CHECKPOINTS
        below = int(request.page_token or 0) or _NO_SIZE
        rows = await log_sql.checkpoints(self._database, below, size + 1)
        more = str(rows[size - 1][0]) if len(rows) > size else ""
        return pb.ListCheckpointsResponse(
            checkpoints=[note for _, note in rows[:size]], next_page_token=more
        )

    async def _signed(self) -> tuple[Position, str]:
        signed = await self._checkpoints.now()
        if signed is None:
            raise ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "DATABASE_ROLLED_BACK",
                "keyvault's database is not what its anchor says it was; no checkpoint is signed"
                " until an operator has looked and says so",
            )
        return signed

    async def _head(self, parent: str, since_size: int) -> pb.ExportEventsResponse:
        """Return a chain's newest head that the log has, signed, with its proof. Only what this
        process knows is signed: the database alone can't have a head signed."""
        name = name_of(parent)
        try:
            head = (await self._ledger.read(name)).head
        except ByokeepError as error:
            if error.reason == "TENANT_KEY_MISSING":
                raise not_found("audit chain") from None
            raise
        if self._log.rolled_back:
            # A log that contradicts its anchor proves nothing; its events may still be read.
            return pb.ExportEventsResponse(head=await self._sign(parent, head, 0))
        await self._log.anchored(name, head)
        position, note = await self._signed()
        leaf = await log_sql.newest_leaf(self._database, name, position.size)
        if leaf is None or not self._log.wrote(leaf) or leaf.sequence < head.sequence:
            raise stale("read")
        proof = await self._checkpoints.prove(position, note, leaf.index, leaf.blind, since_size)
        newest = Head(leaf.generation, leaf.sequence, leaf.head_hash)
        return pb.ExportEventsResponse(
            head=await self._sign(parent, newest, position.size), proof=proof
        )

    async def _sign(self, parent: str, head: Head, log_size: int) -> options_pb2.SignedEnvelope:
        statement = pb.ChainHead(
            deployment=self._deployment,
            chain=parent,
            sequence=head.sequence,
            hash=head.hash,
            log_size=log_size,
        )
        statement.sign_time.FromDatetime(datetime.datetime.now(datetime.UTC))
        payload = statement.SerializeToString(deterministic=True)
        message = dsse.pre_authentication_encoding(dsse.CHAIN_HEAD, payload)
        return options_pb2.SignedEnvelope(
            payload_type=dsse.CHAIN_HEAD,
            payload=payload,
            key_id=self._signer.key_id,
            signature=await self._signer.sign(message),
        )
