"""AuditService."""

from __future__ import annotations

import datetime
import hmac
from collections.abc import AsyncIterator
from typing import Any

import grpc
from byokeep import dsse
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import audit_pb2 as pb
from byokeep.keyvault.v1 import audit_pb2_grpc

from services.common.errors import ByokeepError
from services.keyvault import chain
from services.keyvault.checkpoints import Checkpoints
from services.keyvault.database import Database
from services.keyvault.domain import not_found
from services.keyvault.position import Position
from services.keyvault.reconcile import Reconcile
from services.keyvault.signer import Signer, sign_statement
from services.keyvault.store import audit as store
from services.keyvault.store import log as log_store

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
        reconcile: Reconcile,
        deployment: str,
    ) -> None:
        """Serve the chains of a database; heads and checkpoints are signed."""
        self._database = database
        self._reconcile = reconcile
        self._signer = signer
        self._checkpoints = checkpoints
        self._deployment = deployment

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Any
    ) -> pb.ListEventsResponse:
        """List events."""
        size = request.page_size or _DEFAULT_PAGE
        rows = await store.page(
            self._database, request.parent, request.key_id, int(request.page_token or 0), size + 1
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
        start, _ = await store.pruned(self._database, request.parent)
        async for sequence, body, previous, digest in store.links(
            self._database, request.parent, start
        ):
            if sequence > head.sequence:
                break
            event = pb.ChainedEvent(body=body, previous_hash=previous, hash=digest)
            yield pb.ExportEventsResponse(event=event)
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
        rows = await log_store.checkpoints(self._database, below, size + 1)
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
        stated = await store.head(self._database, parent)
        if stated is None:
            raise not_found("audit chain")
        if self._reconcile.rolled_back:
            # A log that contradicts its anchor proves nothing; its events may still be read.
            return pb.ExportEventsResponse(head=await self._sign(parent, *stated, 0))
        # What this process followed, link by link: the database alone can't have a head signed.
        head = await self._reconcile.head(parent)
        signed = await self._checkpoints.now()
        if signed is None or not head.sequence:
            return pb.ExportEventsResponse(
                head=await self._sign(parent, head.sequence, head.hash, 0)
            )
        position, note = signed
        async with self._database.transaction() as connection:
            leaf = await log_store.newest_leaf(connection, parent, position.size)
        if leaf is None or not await self._leads_to(parent, head, leaf[1], leaf[3]):
            raise _not_logged()
        index, sequence, blind, digest = leaf
        proof = await self._checkpoints.prove(position, note, index, blind, since_size)
        statement = await self._sign(parent, sequence, digest, position.size)
        return pb.ExportEventsResponse(head=statement, proof=proof)

    async def _leads_to(self, parent: str, head: chain.Head, sequence: int, digest: bytes) -> bool:
        """Say whether a chain's links lead from a head that was followed to a newer one."""
        at, previous = head.sequence, head.hash
        async for row in store.links(self._database, parent, at):
            if at == sequence:
                break
            if not chain.continues(at, previous, row):
                return False
            at, _, _, previous = row
        return at == sequence and hmac.compare_digest(previous, digest)

    async def _sign(
        self, parent: str, sequence: int, digest: bytes, log_size: int
    ) -> options_pb2.SignedEnvelope:
        statement = pb.ChainHead(
            deployment=self._deployment,
            chain=parent,
            sequence=sequence,
            hash=digest,
            log_size=log_size,
        )
        statement.sign_time.FromDatetime(datetime.datetime.now(datetime.UTC))
        return await sign_statement(
            self._signer, dsse.CHAIN_HEAD, statement.SerializeToString(deterministic=True)
        )


def _not_logged() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        "AUDIT_UNAVAILABLE",
        "the log of chain heads does not have this chain's newest one, so that no head is signed;"
        " try again, and if it stays so, treat the database's password as stolen",
        retry_after_seconds=2.0,
    )
