"""The log of chain heads, and its anchor outside the database.

Every second the heads of chains that grew become leaves of one append-only Merkle
log, and the log's size and root are written where the database can't reach. A
database that does not contain what its anchor says was rolled back: no lease is
given until an operator says so. A tick costs the same however long the log is.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
from dataclasses import dataclass

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2

from services.common import logs
from services.common.config import ConfigError
from services.common.errors import ByokeepError
from services.keyvault import chain, merkle
from services.keyvault.anchor_store import AnchorStore, Stored
from services.keyvault.database import Connection, Database
from services.keyvault.store import log as store

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
#: A check that has not succeeded for so long is no check: leases stop.
STALE_SECONDS = 60.0


def stale(what: str) -> ByokeepError:
    """Return the error for a check of the audit log that has not succeeded for a minute."""
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        "AUDIT_UNAVAILABLE",
        f"keyvault's audit log could not be {what} for {STALE_SECONDS:.0f} s; no lease is given",
        retry_after_seconds=5.0,
    )


@dataclass(frozen=True, slots=True)
class Position:
    """A position of the log: how many leaves, and the root over them."""

    size: int = 0
    root: bytes = merkle.EMPTY
    #: Leaves before this one were accepted by an operator and are not held against chains.
    accepted: int = 0
    #: How often an operator has resumed leases: replicas and snapshots follow it.
    resumed: int = 0


class Anchor:
    """Extends the log, anchors it, and notices when the database went back."""

    def __init__(self, database: Database, anchored: AnchorStore, deployment: str) -> None:
        """Anchor a database's log in a store outside of it."""
        self._database = database
        self._store = anchored
        self._deployment = deployment
        self._frontier = merkle.Frontier()
        self._ticking = asyncio.Lock()
        self._held = 0.0
        self.rolled_back = False
        #: What is anchored, as this process knows it: the log's leaves are held against it.
        self.position = Position()

    def refusal(self) -> ByokeepError | None:
        """Return why no lease may be given now."""
        if self.rolled_back:
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "DATABASE_ROLLED_BACK",
                "keyvault's database is not what its anchor says it was; no lease is given until"
                " an operator has looked and says so: byokeep admin resume-leases",
            )
        if time.monotonic() - self._held > STALE_SECONDS:
            return stale("anchored")
        return None

    async def distrust(self) -> None:
        """Give no lease: the log's own leaves contradict the chains."""
        if not self.rolled_back:
            self.rolled_back = True
            logs.event(log, "log_contradicts_chains", level=logging.CRITICAL)
            await self._note(audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED, "", "")

    async def tick(self) -> None:
        """Compare the database with the anchor; where it holds, extend both."""
        noticed = False
        async with self._ticking:
            async with self._database.transaction() as connection:
                await store.lock(connection)
                before = await self._store.read()
                anchored = self._read(before)
                resumed = self.rolled_back
                if resumed and not self._resumed_elsewhere(anchored):
                    return
                holds = await self._holds(connection, anchored)
                if holds:
                    extended = await self._extend(connection)
            # After the commit: an anchor must never be ahead of its database.
            noticed = not holds
            # What `distrust` said meanwhile stays said.
            if noticed or resumed:
                self.rolled_back = noticed
            if holds:
                self._frontier = extended
                if await self._write(before, anchored or Position()):
                    self._held = time.monotonic()
        if noticed:
            logs.event(log, "database_rolled_back", level=logging.CRITICAL)
            await self._note(audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED, "", "")

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
                await store.reset(connection)
                rebuilt = await _rebuild(connection)
            self._frontier = rebuilt
            accepted = Position(
                accepted=self._frontier.size,
                resumed=max(anchored.resumed, self.position.resumed) + 1,
            )
            if not await self._write(before, accepted):
                raise _moved()
            self.rolled_back = False
            self._held = time.monotonic()

    def _resumed_elsewhere(self, anchored: Position | None) -> bool:
        return anchored is not None and anchored.resumed != self.position.resumed

    async def _holds(self, connection: Connection, anchored: Position | None) -> bool:
        size = await store.size(connection)
        if anchored is None:
            # A first start has neither; a database with a log must have had an anchor.
            return size == 0
        if anchored.resumed != self.position.resumed or not self._frontier.size:
            # A start, or another replica's operator: what this process knew of the log is past.
            loaded = await load(connection, anchored.size)
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
        past = await load(connection, anchored.size)
        return past is not None and hmac.compare_digest(past.root(), anchored.root)

    async def _follow(self, connection: Connection, end: int) -> None:
        while self._frontier.size < end:
            leaves = await store.leaves(connection, self._frontier.size, end)
            if not leaves:
                return
            for leaf in leaves:
                self._frontier.append(leaf)

    async def _extend(self, connection: Connection) -> merkle.Frontier:
        await self._follow(connection, await store.size(connection))
        # A copy: where the transaction fails, no leaf stays that the log never had.
        frontier = merkle.Frontier(self._frontier.size, self._frontier.roots())
        new = []
        for name, sequence, digest in await store.unlogged(connection):
            # Blinded: who holds a checkpoint and one tenant's record learns nothing of others.
            blind = os.urandom(32)
            leaf = merkle.leaf_hash(fields(blind, name, sequence, digest))
            index = frontier.size
            nodes = frontier.append(leaf)
            new.append(store.Leaf(index, name, sequence, blind, digest, leaf, nodes))
        if new:
            await store.add(connection, new)
        return frontier

    async def _note(
        self, kind: audit_pb2.AuditEventType.ValueType, caller: str, detail: str
    ) -> None:
        event = audit_pb2.AuditEvent(type=kind, caller=caller, detail=detail)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            await chain.append(connection, head, self._deployment, [event])

    def _read(self, stored: Stored) -> Position | None:
        if stored.text is None:
            return None
        try:
            data = json.loads(stored.text)
            if data["deployment"] != self._deployment:
                raise ValueError
            return Position(
                int(data["size"]),
                bytes.fromhex(data["root"]),
                int(data["accepted"]),
                int(data.get("resumed", 0)),
            )
        except (ValueError, KeyError, TypeError):
            raise ConfigError("the anchor's text is not an anchor of this deployment") from None

    async def _write(self, before: Stored, anchored: Position) -> bool:
        """Anchor the log as it is committed; False where another replica was faster."""
        position = Position(
            self._frontier.size, self._frontier.root(), anchored.accepted, anchored.resumed
        )
        text = json.dumps(
            {
                "deployment": self._deployment,
                "size": position.size,
                "root": position.root.hex(),
                "accepted": position.accepted,
                "resumed": position.resumed,
            }
        )
        if text != before.text and not await self._store.write(text, before):
            return False
        self.position = position
        return True


async def load(connection: Connection, size: int) -> merkle.Frontier | None:
    """Return the frontier of the log at a size, from O(log n) nodes; None where one is missing."""
    wanted = merkle.nodes_of((0, size))
    found = await store.nodes(connection, wanted)
    if any(node not in found for node in wanted):
        return None
    return merkle.Frontier(size, [found[node] for node in wanted])


async def _rebuild(connection: Connection) -> merkle.Frontier:
    frontier = merkle.Frontier()
    while leaves := await store.leaves(connection, frontier.size, 1 << 62):
        nodes = [node for leaf in leaves for node in frontier.append(leaf)]
        await store.add_nodes(connection, nodes)
    return frontier


def _moved() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
        "another keyvault wrote the anchor at the same time; try again",
        field="anchor",
    )
