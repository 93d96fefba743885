"""The log of chain heads, and its anchor outside the database.

Every second the heads of chains that grew become leaves of one append-only Merkle
log, and the log's size and root are written where the database can't reach. A
database that does not contain what its anchor says was rolled back: no lease is
given until an operator says so. That verdict stands beside the position, so that no
restart forgets it. A tick costs the same however long the log is.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import os
import time
from dataclasses import replace

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain, merkle, position
from services.keyvault.anchor_store import AnchorStore, Stored
from services.keyvault.database import Connection, Database
from services.keyvault.position import Position
from services.keyvault.store import log as store

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
#: A check that has not succeeded for so long is no check: leases stop.
STALE_SECONDS = 60.0


def stale(what: str) -> ByokeepError:
    """Return the error for a check of the audit log that does not succeed, or not for a minute."""
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        "AUDIT_UNAVAILABLE",
        f"keyvault's audit log could not be {what}; no lease is given",
        retry_after_seconds=5.0,
    )


class Anchor:
    """Extends the log, anchors it, and notices when the database went back."""

    def __init__(self, database: Database, anchored: AnchorStore, deployment: str) -> None:
        """Anchor a database's log in a store outside of it."""
        self._database = database
        self._store = anchored
        self._deployment = deployment
        self._frontier = merkle.Frontier()
        self._ticking = asyncio.Lock()
        self._held = -math.inf
        self._owed: set[str] = set()
        self.rolled_back = False
        #: What is anchored, as this process knows it: the log's leaves are held against it.
        self.position = Position()
        #: When the last tick began that took in every head and is anchored.
        self.taken = -math.inf

    @property
    def age(self) -> float:
        """Seconds since the database and its anchor were found to agree; infinite before."""
        return time.monotonic() - self._held

    def refusal(self) -> ByokeepError | None:
        """Return why no lease may be given now."""
        if self.rolled_back:
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "DATABASE_ROLLED_BACK",
                "keyvault's database is not what its anchor says it was; no lease is given until"
                " an operator has looked and says so",
            )
        if self.age > STALE_SECONDS:
            return stale("anchored")
        return None

    def owe(self, name: str) -> None:
        """Take a chain's head into the log at the next tick, whatever its row says of the log."""
        self._owed.add(name)

    async def distrust(self) -> None:
        """Give no lease: the log's own leaves contradict the chains."""
        if not self.rolled_back:
            self.rolled_back = True
            logs.event(log, "log_contradicts_chains", level=logging.CRITICAL)
            await self._tell()

    async def tick(self) -> None:
        """Compare the database with the anchor; where it holds, extend both."""
        async with self._ticking:
            if self.rolled_back and await self._verdict_stands():
                return
            noticed = await self._tick()
        if noticed:
            logs.event(log, "database_rolled_back", level=logging.CRITICAL)
            await self._tell()

    async def resume(self, caller: str, reason: str) -> None:
        """Take the database as it is for the truth again, on an operator's word.

        Other replicas follow at their next tick.

        Raises:
            ByokeepError: ETAG_MISMATCH where another replica wrote the anchor meanwhile.
        """
        await self._note(audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED, caller, reason)
        async with self._ticking:
            async with self._database.transaction() as connection:
                await store.lock(connection)
                before = await self._store.read()
                anchored = self._read(before) or Position()
                self._frontier = await store.reset(connection)
            accepted = Position(
                accepted=self._frontier.size,
                resumed=max(anchored.resumed, self.position.resumed) + 1,
            )
            if not await self._write(before, accepted):
                raise _moved()
            self.rolled_back = False
            self._held = time.monotonic()

    async def _tick(self) -> bool:
        """Extend database and anchor; True where the one was just found to contradict the other."""
        owed, began = set(self._owed), time.monotonic()
        async with self._database.transaction() as connection:
            await store.lock(connection)
            before = await self._store.read()
            anchored = self._read(before)
            if anchored is not None and anchored.distrusted:
                # Said before this process started, or by another replica.
                self.position, self.rolled_back = anchored, True
                return False
            resumed = self.rolled_back
            holds = await self._holds(connection, anchored)
            if holds:
                extended, everything = await self._extend(connection, owed)
        # After the commit: an anchor must never be ahead of its database.
        if not holds:
            self.position = anchored or Position(resumed=self.position.resumed)
            self.rolled_back = True
            return True
        if resumed:  # what `distrust` said meanwhile stays said
            self.rolled_back = False
        self._frontier = extended
        self._owed -= owed
        self.position = anchored or self.position  # also where another replica is faster now
        if await self._write(before, anchored or Position()):
            self._held = time.monotonic()
            if everything:
                self.taken = began
        return False

    async def _tell(self) -> None:
        """Put the verdict on the record: beside the anchor, and in the system chain."""

        async def keep() -> None:
            async with self._ticking:
                await self._verdict_stands()

        async def note() -> None:
            await self._note(audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED, "", "")

        # One place that does not answer must not keep it from the other.
        await each("verdict", (keep, note), lambda step: step())

    async def _verdict_stands(self) -> bool:
        """Keep the verdict beside the anchor; False where an operator resumed leases elsewhere."""
        before = await self._store.read()
        anchored = self._read(before) or replace(self.position, distrusted=False)
        if not anchored.distrusted:
            if anchored.resumed != self.position.resumed:
                return False
            anchored = replace(anchored, distrusted=True)
            await self._store.write(anchored.text(self._deployment), before)
        self.position = anchored
        return True

    async def _holds(self, connection: Connection, anchored: Position | None) -> bool:
        size = await store.size(connection)
        if anchored is None:
            # A first start has neither; a database with a log must have had an anchor.
            return size == 0
        if anchored.resumed != self.position.resumed or not self._frontier.size:
            # A start, or another replica's operator: what this process knew of the log is past.
            loaded = await store.frontier(connection, anchored.size)
            if loaded is None:
                return False
            self._frontier = loaded
            self.position = anchored
        if size < anchored.size or size < self._frontier.size:
            return False
        await self._follow(connection, anchored.size)
        if self._frontier.size == anchored.size:
            return hmac.compare_digest(self._frontier.root(), anchored.root)
        # Another replica, or a crash before the anchor was written: the log went on.
        past = await store.frontier(connection, anchored.size)
        return past is not None and hmac.compare_digest(past.root(), anchored.root)

    async def _follow(self, connection: Connection, end: int) -> None:
        while self._frontier.size < end:
            leaves = await store.leaves(connection, self._frontier.size, end)
            if not leaves:
                return
            for leaf in leaves:
                self._frontier.append(leaf)

    async def _extend(self, connection: Connection, owed: set[str]) -> tuple[merkle.Frontier, bool]:
        await self._follow(connection, await store.size(connection))
        # A copy: where the transaction fails, no leaf stays that the log never had.
        frontier = merkle.Frontier(self._frontier.size, self._frontier.roots())
        new = []
        heads = await store.unlogged(connection, owed)
        for name, sequence, digest in heads:
            # Blinded: who holds a checkpoint and one tenant's record learns nothing of others.
            blind = os.urandom(32)
            leaf = merkle.leaf_hash(fields(blind, name, sequence, digest))
            index = frontier.size
            nodes = frontier.append(leaf)
            new.append(store.Leaf(index, name, sequence, blind, digest, leaf, nodes))
        if new:
            await store.add(connection, new)
        return frontier, len(heads) < store.HEADS

    async def _note(
        self, kind: audit_pb2.AuditEventType.ValueType, caller: str, detail: str
    ) -> None:
        event = audit_pb2.AuditEvent(type=kind, caller=caller, detail=detail)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            await chain.append(connection, head, self._deployment, [event])

    def _read(self, stored: Stored) -> Position | None:
        return position.read(stored.text, self._deployment)

    async def _write(self, before: Stored, anchored: Position) -> bool:
        """Anchor the log as it is committed; False where another replica was faster."""
        new = replace(anchored, size=self._frontier.size, root=self._frontier.root())
        text = new.text(self._deployment)
        if text != before.text and not await self._store.write(text, before):
            return False
        self.position = new
        return True


def _moved() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
        "another keyvault wrote the anchor at the same time; try again",
        field="anchor",
    )
