"""The log of all tenants' heads, and its anchor outside the database.

Every second the heads that grew become leaves of one append-only Merkle log, whose size and root
are written where the database can't reach. What the anchor bears out this process knows from then
on (`heads`); a database that does not contain what its anchor says was rolled back, and no lease is
given until an operator says so. Each leaf has a blind that only keyvault can make, so that SQL can
plant none.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import grpc
from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2, state_pb2
from byokeep.merkle import leaf_hash

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import anchor, merkle, snapshot
from services.keyvault.anchor import AnchorStore, Position, Stored
from services.keyvault.database import Connection, Database
from services.keyvault.event import SYSTEM, Head, chain_of
from services.keyvault.heads import Commit, Heads, leads
from services.keyvault.ledger import Ledger, Macs
from services.keyvault.lifecycle import stale
from services.keyvault.sql import ledger as ledger_sql
from services.keyvault.sql import log as sql
from services.keyvault.sql.log import Leaf

log = logging.getLogger(__name__)
TICK_SECONDS: Final = 1.0
SAVE_SECONDS: Final = 600.0
#: What this process knows is too old after so long: leases stop.
STALE_SECONDS: Final = 10.0
#: After an operator's word nothing irreversible is done for so long.
QUIET_SECONDS: Final = 86_400
_ANSWER_SECONDS: Final = 8.0
_NO_END: Final = 2**63 - 1
#: How often an operator's word is written over what other replicas anchor at the same time.
_TRIES: Final = 5


class Log:
    """Extends the log, anchors it, and learns from it (see the module)."""

    def __init__(
        self,
        database: Database,
        store: AnchorStore,
        heads: Heads,
        ledger: Ledger,
        macs: Macs,
        deployment: str,
    ) -> None:
        """Anchor a database's log in a store outside of it."""
        self._database = database
        self._store = store
        self._heads = heads
        self._ledger = ledger
        self._macs = macs
        self._deployment = deployment
        self._ticking = asyncio.Lock()
        self._wake = asyncio.Event()
        self._ticked = asyncio.Condition()
        #: Over the leaves that were learned from.
        self._frontier: merkle.Frontier | None = None
        #: What this process committed and what is anchored was not found to cover, until it is
        #: looked at once more, and told.
        self._lost: dict[str, list[Commit]] = {}
        self._saved = time.monotonic()
        #: When the last tick began that succeeded, by this process's own steady clock.
        self.fresh = -math.inf
        self.rolled_back = False
        #: This process found the database to contradict its anchor; only an operator ends that.
        self._verdict = False
        #: What is anchored, as this process knows it.
        self.position = Position()
        #: The deployment's own state, of the last tick.
        self.system = state_pb2.SystemState()

    @property
    def age(self) -> float:
        """Seconds since the database and its anchor were found to agree; infinite before."""
        return time.monotonic() - self.fresh

    @property
    def quiet(self) -> bool:
        """Whether an operator's word is so new that nothing irreversible is to be done."""
        since = self._ledger.now().timestamp() - self.position.resume_time
        return self.rolled_back or since < QUIET_SECONDS

    def refusal(self) -> ByokeepError | None:
        """Return why no lease may be given now."""
        if self.rolled_back:
            return ByokeepError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "DATABASE_ROLLED_BACK",
                "keyvault's database is not what its anchor says it was; no lease is given until"
                " an operator has looked and says so",
            )
        return stale("anchored") if self.age > STALE_SECONDS else None

    def held(self, tenant: str) -> bool:
        """Say whether the deployment's own row holds a tenant, by name or by what it is owed."""
        return (
            tenant in self.system.held
            or tenant in self.system.shredded
            or any(one.tenant == tenant for one in self.system.owed)
        )

    async def run(self) -> None:
        """Tick every second, and at once where somebody waits for it; never ends."""
        while True:
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await each("log", (self.tick, self._save_if_due), lambda step: step())

    async def anchored(self, name: str, head: Head) -> None:
        """Wait until the anchor covers a head: from then on it is never forgotten.

        Raises:
            ByokeepError: AUDIT_UNAVAILABLE where that is not known to be so.
        """
        generation = self._heads.generation
        if not self._heads.logged(name).covers(head):
            if not self._heads.get(name).covers(head):
                # Read, not written, by this process: it is owed to the log all the same.
                self._heads.remember(name, head)
            # Once: where a tick fails, the next one comes at its time.
            self._wake.set()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS), self._ticked:
                while not self._heads.logged(name).covers(head):
                    lost = not self._heads.get(name).covers(head)
                    # Where the database was rolled back nothing is anchored before an operator.
                    if lost or self.rolled_back or self._heads.generation != generation:
                        raise stale("extended")
                    await self._ticked.wait()
        except TimeoutError:
            raise stale("anchored") from None
        # By its number alone it might be of a branch that lost.
        if self._heads.generation != generation or not await self._has(name, head):
            raise stale("extended")

    async def _has(self, name: str, head: Head) -> bool:
        """Say whether what is known of the log goes through a head."""
        logged = self._heads.logged(name)
        if (logged.sequence, logged.hash) == (head.sequence, head.hash):
            return True
        async with self._database.transaction() as connection:
            return await leads(connection, name, head, logged)

    async def tick(self) -> None:
        """Hold the database against the anchor, learn what is new, add what is owed, anchor."""
        began = time.monotonic()
        try:
            async with self._ticking:
                if await self._tick():
                    self.fresh = began
                    await each("event_lost", list(self._lost), self._tell_lost)
        finally:
            async with self._ticked:
                self._ticked.notify_all()

    async def resume(self, caller: str, reason: str) -> None:
        """Take the database as it is for the truth, on an operator's word: every row that is
        authentic is sealed by a leaf of a new generation. Other replicas follow at their next tick.

        Raises:
            ByokeepError: ETAG_MISMATCH where another replica wrote the anchor meanwhile.
        """
        async with self._ticking:
            for _ in range(_TRIES):
                if await self._seal():
                    break
            else:
                raise ByokeepError(
                    grpc.StatusCode.ABORTED,
                    "ETAG_MISMATCH",
                    "another keyvault wrote the anchor at the same time; try again",
                    field="anchor",
                )
            self.rolled_back = False
        await self.tick()
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_LEASES_RESUMED, caller=caller, detail=reason
        )
        _, head = await self._ledger.change(SYSTEM, lambda system: system.events.append(event))
        await self.anchored(SYSTEM, head)

    async def _seal(self) -> bool:
        """Seal every authentic row by a leaf of a new generation, then anchor that; False where
        another replica wrote the anchor meanwhile. Until it is anchored nobody can read a row."""
        async with self._database.transaction() as connection:
            await sql.lock(connection)
            before = await self._store.read()
            anchored = anchor.position(before.text, self._deployment)
            frontier, completed = merkle.Frontier(), list[tuple[int, int, bytes]]()
            # An anchor that was lost does not say how many words there were.
            generation = max(anchored.generation, self._heads.generation) + 1
            async for leaf in self._written(connection, 0):
                completed += frontier.append(leaf.leaf_hash)
                generation = max(generation, leaf.generation + 1)
            start, new = frontier.size, list[Leaf]()
            async for name, head in self._ledger.reseal(connection, generation):
                new.append(self._leaf(self._macs.current, frontier.size, name, head))
                completed += frontier.append(new[-1].leaf_hash)
            await sql.reset(connection, start)
            await sql.add(connection, start, new, completed)
        said = int(self._ledger.now().timestamp())
        position = Position(frontier.size, frontier.root(), generation, said)
        return await self._store.write(position.text(self._deployment), before)

    async def start(self) -> None:
        """Look at the anchor for the first time, again where another replica was faster to write
        it; then owe to the log what no leaf names."""
        self._wake.set()
        while self._wake.is_set():
            self._wake.clear()
            await self.tick()
        if not self.rolled_back:
            await self.scan()

    async def scan(self) -> None:
        """Owe heads to the log that no leaf names, as a process that died may have left them."""
        async for found in ledger_sql.every_name(self._database):
            unnamed = [name for name, at in found.items() if at > self._heads.get(name).sequence]
            await each("unlogged_head", unnamed, self._owe)

    async def save(self) -> None:
        """Keep what is known, so that the next start need not read the whole log."""
        async with self._ticking:
            if self.rolled_back or self._frontier is None:
                return
            head = {
                "generation": self._heads.generation,
                "leaves": self._frontier.size,
                "roots": [root.hex() for root in self._frontier.roots()],
            }
            parts = snapshot.seal(
                self._macs.current, self._macs.keys[self._macs.current], head, [*self._heads.dump()]
            )
            async with self._database.transaction() as connection:
                await sql.lock(connection)
                await sql.save(connection, parts)
            self._saved = time.monotonic()

    async def _save_if_due(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            await self.save()

    async def _owe(self, name: str) -> None:
        tenant = await self._ledger.read(name)
        if not self._heads.get(name).covers(tenant.head):
            self._heads.remember(name, tenant.head)

    async def _tick(self) -> bool:
        """Do one tick; True where it succeeded."""
        async with self._database.transaction() as connection:
            await sql.lock(connection)
            before = await self._store.read()
            anchored = anchor.position(before.text, self._deployment)
            if before.text is None and await sql.size(connection):
                self._doubt("there is a log, and no anchor")
                return False
            if anchored.generation != self._heads.generation:
                for name in list(self._heads.owed):
                    self._lose(name, self._heads.lose(name))
                self._heads.forget(anchored.generation)
                self._frontier, self._verdict = None, False
            if anchored.distrusted or self._verdict:
                return await self._stop(anchored, before)
            if self._frontier is None:
                self._frontier = await self._restored(connection, anchored)
            frontier = self._frontier.copy()
            learned = dict[str, Leaf]()
            async for leaf in self._written(connection, frontier.size, anchored.size):
                frontier.append(leaf.leaf_hash)
                if leaf.generation == anchored.generation:
                    learned[leaf.tenant] = leaf
            if frontier.root() != anchored.root:
                self._doubt("the leaves are not those that were anchored")
                self._verdict = True
                return await self._stop(anchored, before)
            self.rolled_back = False
            await self._learn(connection, learned.values())
            # Only now: what fails before this is read, and learned, again.
            self._frontier = frontier.copy()
            added = await self._extend(connection, frontier)
        # Another replica's leaves, or an operator's word, may have changed what is known of it.
        self.system = (await self._ledger.read(SYSTEM)).state
        self.position = anchored
        new = replace(anchored, size=frontier.size, root=frontier.root())
        # After the commit: an anchor must never be ahead of its database.
        if new != anchored and not await self._store.write(new.text(self._deployment), before):
            self._wake.set()
            return False
        async with self._database.transaction() as connection:
            await self._learn(connection, added)
        self.position, self._frontier = new, frontier
        return True

    def _doubt(self, why: str) -> None:
        self.rolled_back = True
        logs.event(log, "database_rolled_back", level=logging.CRITICAL, what=why)

    async def _stop(self, anchored: Position, before: Stored) -> bool:
        """Give no lease, and say so beside the anchor: no restart forgets it there, and every
        replica reads it."""
        self.position, self.rolled_back = anchored, True
        if not anchored.distrusted:
            said = replace(anchored, distrusted=True)
            if not await self._store.write(said.text(self._deployment), before):
                self._wake.set()
        return False

    async def _restored(self, connection: Connection, anchored: Position) -> merkle.Frontier:
        """Return the frontier of the snapshot, with whose heads this process begins; an empty one
        where there is none that keyvault wrote."""
        opened = snapshot.opened(self._macs.keys, await sql.snapshot(connection))
        if opened is not None:
            head, parts = opened
            if head["generation"] == anchored.generation and head["leaves"] <= anchored.size:
                self._heads.load(parts)
                roots = [bytes.fromhex(root) for root in head["roots"]]
                return merkle.Frontier(head["leaves"], roots)
        return merkle.Frontier()

    async def _written(
        self, connection: Connection, start: int, end: int = _NO_END
    ) -> AsyncIterator[Leaf]:
        """Yield leaves in order, up to the first that is missing or that keyvault did not write."""
        while start < end and (leaves := await sql.leaves(connection, start, end)):
            for leaf in leaves:
                if leaf.index != start or not self.wrote(leaf):
                    return
                yield leaf
                start += 1

    async def _learn(self, connection: Connection, leaves: Iterable[Leaf]) -> None:
        for leaf in leaves:
            lost = await self._heads.learn(connection, leaf.tenant, leaf.head)
            self._lose(leaf.tenant, lost)

    def _lose(self, name: str, commits: Sequence[Commit]) -> None:
        if commits:
            self._lost.setdefault(name, []).extend(commits)

    async def _extend(self, connection: Connection, frontier: merkle.Frontier) -> list[Leaf]:
        """Append what another keyvault added beyond the anchor, and the heads that are owed."""
        start, newest = frontier.size, dict[str, Leaf]()
        completed = list[tuple[int, int, bytes]]()
        async for leaf in self._written(connection, start):
            if not await self._follows(connection, leaf, newest):
                break
            completed += frontier.append(leaf.leaf_hash)
            if leaf.generation == self._heads.generation:
                newest[leaf.tenant] = leaf
        end, new = frontier.size, list[Leaf]()
        for name, owed in list(self._heads.owed.items()):
            head, there = owed.head, newest.get(name)
            # What does not lead on from a leaf that is taken is lost once that is anchored.
            if there is None or (
                there.sequence < head.sequence and await leads(connection, name, there.head, head)
            ):
                new.append(self._leaf(self._macs.current, frontier.size, name, head))
                completed += frontier.append(new[-1].leaf_hash)
        if frontier.size > start:
            await sql.add(connection, end, new, completed)
        return [*newest.values(), *new]

    async def _follows(
        self, connection: Connection, leaf: Leaf, newest: Mapping[str, Leaf]
    ) -> bool:
        """Say whether the head of a leaf beyond the anchor goes on from the one before: a leaf of a
        branch that lost may have been kept, to be put there later."""
        taken = newest.get(leaf.tenant)
        before = taken.head if taken is not None else self._heads.logged(leaf.tenant)
        return leaf.generation != before.generation or await leads(
            connection, leaf.tenant, before, leaf.head
        )

    def _leaf(self, key_id: str, index: int, name: str, head: Head) -> Leaf:
        """Return a head's leaf, with the blind that a key of keyvault's makes."""
        place = ("byokeep/log/v1", self._deployment, index, head.generation, name)
        blind = hmac.digest(
            self._macs.keys[key_id], fields(*place, head.sequence, head.hash), "sha256"
        )
        named = fields(blind, chain_of(name), head.sequence, head.hash)
        return Leaf(index, head.generation, name, head.sequence, head.hash, blind, leaf_hash(named))

    def wrote(self, leaf: Leaf) -> bool:
        """Say whether keyvault wrote a leaf, with any of its keys. Raises ByokeepError:
        AUDIT_UNAVAILABLE where it may be with one that this process could not open yet."""
        for key_id in self._macs.keys:
            own = self._leaf(key_id, leaf.index, leaf.tenant, leaf.head)
            blind = hmac.compare_digest(leaf.blind, own.blind)
            if blind and hmac.compare_digest(leaf.leaf_hash, own.leaf_hash):
                return True
        if not self._macs.complete:
            raise stale("authenticated")
        return False

    async def _tell_lost(self, name: str) -> None:
        """Put events on the record that this process wrote, and that the branch that is anchored is
        without. What an operator's word took in, of whatever generation, is not lost."""
        anchored, lost = self._heads.logged(name), list[bytes]()
        async with self._database.transaction() as connection:
            for head, bodies in self._lost[name]:
                if not await leads(connection, name, head, anchored):
                    lost += bodies
        if lost:
            logs.event(log, "tenant_forked", level=logging.CRITICAL, tenant=name)
            kind = audit_pb2.AUDIT_EVENT_TYPE_EVENT_LOST
            told = [audit_pb2.AuditEvent(type=kind, detail=name, lost=body) for body in lost]
            await self._ledger.change(SYSTEM, lambda system: system.events.extend(told))
        del self._lost[name]
