"""Checkpoints of the log of heads, and the proofs that lead to them.

Only a position that is anchored is signed: a checkpoint that somebody holds is one
that the database has to answer to.
"""

from __future__ import annotations

import time

from byokeep import checkpoint
from byokeep.keyvault.v1 import audit_pb2

from services.keyvault import merkle
from services.keyvault.anchor import Position
from services.keyvault.database import Connection, Database
from services.keyvault.lifecycle import not_found
from services.keyvault.log import Log
from services.keyvault.signer import Signer
from services.keyvault.sql import log as sql

TICK_SECONDS = 5.0
#: A log that grows all the time gets a checkpoint a minute.
INTERVAL_SECONDS = 60.0


class Checkpoints:
    """Signs positions of the log, and proves what they contain."""

    def __init__(self, database: Database, log: Log, signer: Signer, deployment: str) -> None:
        """Sign positions of an anchored log."""
        self._database = database
        self._log = log
        self._signer = signer
        self._origin = checkpoint.origin_of(deployment)
        self._signed = 0
        self._time = -INTERVAL_SECONDS

    async def tick(self) -> None:
        """Sign the anchored position, if the log grew and the last checkpoint is a minute old."""
        due = time.monotonic() - self._time >= INTERVAL_SECONDS
        if due and self._log.position.size > self._signed and not self._log.rolled_back:
            await self.now()

    async def now(self) -> tuple[Position, str] | None:
        """Take every head into the log and return its position, signed; None while the database
        contradicts its anchor."""
        await self._log.tick()
        if self._log.rolled_back:
            return None
        position = self._log.position
        note = await sql.checkpoint(self._database, position.size)
        if note is None:
            note = await self._sign(position)
            await sql.add_checkpoint(self._database, position.size, note)
        self._signed, self._time = position.size, time.monotonic()
        return position, note

    async def prove(
        self, position: Position, note: str, leaf_index: int, blind: bytes, since_size: int
    ) -> audit_pb2.LogProof:
        """Return the proof that ties a leaf to a checkpoint, and that to an older size.

        Raises:
            ByokeepError: NOT_FOUND where the log was never of the older size.
        """
        if since_size > position.size:
            raise not_found("checkpoint: the log is shorter than that; was it restored?")
        async with self._database.transaction() as connection:
            proof = audit_pb2.LogProof(
                leaf_index=leaf_index,
                leaf_blind=blind,
                checkpoint=note,
                since_size=since_size,
                inclusion=await _hashes(connection, merkle.inclusion(leaf_index, position.size)),
                consistency=await _hashes(
                    connection, merkle.consistency(since_size, position.size)
                ),
            )
            if since_size:
                older = await sql.frontier(connection, since_size)
                proof.since_root = older.root() if older else b""
        return proof

    async def _sign(self, position: Position) -> str:
        text = checkpoint.Checkpoint(self._origin, position.size, position.root).text()
        signature = await self._signer.sign(text.encode())
        return checkpoint.signed(text, self._origin, self._signer.public_key, signature)


async def _hashes(connection: Connection, ranges: list[merkle.Range]) -> list[bytes]:
    found = await sql.nodes(connection, merkle.needed(ranges))
    return [merkle.root_of(covered, found) for covered in ranges]
