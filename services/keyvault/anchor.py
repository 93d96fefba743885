"""The log of chain heads, and its anchor outside the database.

Every second the heads of chains that grew become leaves of one append-only Merkle
log, and the log's size and root are written to a file that is not in the database.
A database that does not contain what its anchor says was rolled back: no lease is
given until an operator says so.
"""

from __future__ import annotations

import asyncio
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
from services.keyvault.store import audit as store

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

    size: int
    root: bytes
    #: Leaves before this one were accepted by an operator and are not held against chains.
    accepted: int


class Anchor:
    """Extends the log, anchors it, and notices when the database went back."""

    def __init__(self, database: Database, anchored: AnchorStore, deployment: str) -> None:
        """Anchor a database's log in a store outside of it."""
        self._database = database
        self._store = anchored
        self._deployment = deployment
        self._frontier = merkle.Frontier()
        self._ticking = asyncio.Lock()
        self.rolled_back = False
        self._held = 0.0
        self.accepted = 0

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
        if self.rolled_back:
            return
        async with self._ticking:
            async with self._database.transaction() as connection:
                await store.lock_log(connection)
                before = await self._store.read()
                if not await self._holds(connection, before):
                    self.rolled_back = True
                else:
                    await self._extend(connection)
            # After the commit: an anchor must never be ahead of its database.
            if not self.rolled_back and await self._write(before):
                self._held = time.monotonic()
        if self.rolled_back:
            logs.event(log, "database_rolled_back", level=logging.CRITICAL)
            await self._note(audit_pb2.AUDIT_EVENT_TYPE_ROLLBACK_DETECTED, "", "")

    async def resume(self, caller: str, reason: str) -> None:
        """Take the database as it is for the truth again, on an operator's word."""
        await self._note(audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED, caller, reason)
        async with self._ticking, self._database.transaction() as connection:
            await store.lock_log(connection)
            before = await self._store.read()
            self._frontier = merkle.Frontier()
            await self._follow(connection)
            self.accepted = self._frontier.size
            if not await self._write(before):
                raise _moved()
        self.rolled_back = False
        self._held = time.monotonic()

    async def _holds(self, connection: Connection, before: Stored) -> bool:
        anchored = self._position(before)
        size = await store.log_size(connection)
        if anchored is None:
            # A first start has neither; a database with a log must have had an anchor.
            return size == 0
        self.accepted = anchored.accepted
        if size < anchored.size or size < self._frontier.size:
            return False
        await self._follow(connection, anchored.size)
        if self._frontier.size == anchored.size:
            return self._frontier.root() == anchored.root
        # Another replica, or a crash before the file was written: the log went on.
        leaves = await store.leaves(connection, 0, anchored.size)
        return merkle.root(leaves) == anchored.root

    async def _follow(self, connection: Connection, end: int | None = None) -> None:
        last = await store.log_size(connection) if end is None else end
        for leaf in await store.leaves(connection, self._frontier.size, last):
            self._frontier.append(leaf)

    async def _extend(self, connection: Connection) -> None:
        await self._follow(connection)
        for row in await store.unlogged(connection):
            # Blinded: who holds a checkpoint and one tenant's record learns nothing of others.
            blind = os.urandom(32)
            leaf = merkle.leaf_hash(fields(blind, row[0], row[1], row[2]))
            await store.add_leaf(connection, self._frontier.size, row, blind, leaf)
            self._frontier.append(leaf)

    async def _note(
        self, kind: audit_pb2.AuditEventType.ValueType, caller: str, detail: str
    ) -> None:
        event = audit_pb2.AuditEvent(type=kind, caller=caller, detail=detail)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            await chain.append(connection, head, self._deployment, [event])

    def _position(self, stored: Stored) -> Position | None:
        if stored.text is None:
            return None
        try:
            data = json.loads(stored.text)
            if data["deployment"] != self._deployment:
                raise ValueError
            return Position(int(data["size"]), bytes.fromhex(data["root"]), int(data["accepted"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError("the anchor's text is not an anchor of this deployment") from None

    async def _write(self, before: Stored) -> bool:
        """Anchor the frontier; False where another replica was faster."""
        text = json.dumps(
            {
                "deployment": self._deployment,
                "size": self._frontier.size,
                "root": self._frontier.root().hex(),
                "accepted": self.accepted,
            }
        )
        return text == before.text or await self._store.write(text, before)


def _moved() -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
        "another keyvault wrote the anchor at the same time; try again",
        field="anchor",
    )
