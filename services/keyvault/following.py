"""Following the chains, and the log that says which of them grew.

What a process has followed it holds in memory; a snapshot in the database, under a
MAC of keyvault's own, spares the next start from following everything again. An older
snapshot put back by SQL only makes that start follow more.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf.message import DecodeError

from services.keyvault import chain, merkle
from services.keyvault.anchor import Position, load
from services.keyvault.database import Database, Row
from services.keyvault.domain import HELD_AFTER, STATE_AFTER
from services.keyvault.states import States
from services.keyvault.store import audit as audit_store
from services.keyvault.store import log as log_store
from services.keyvault.store import reconcile as store

MISMATCH = "RECONCILE_MISMATCH"
_CARRIED = b"byokeep/carried/v1\n"
_PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED
_STATE_PARTS = 16
_CHAINS_IN_PART = 10_000


class ContradictionError(Exception):
    """The database is not what the anchored log says it was."""


@dataclass(slots=True)
class Followed:
    """How far a chain was followed."""

    sequence: int = 0
    hash: bytes = chain.GENESIS
    #: Events up to this one were dropped by retention before it was followed.
    start: int = 0


class Following:
    """What was followed: positions of chains and of the log, and the states that they give."""

    def __init__(
        self, database: Database, key: bytes, changed: Callable[[store.Bound], None]
    ) -> None:
        """Start with nothing followed. The key is keyvault's own; `changed` is told of every
        version that an event gives another state."""
        self._database = database
        self._key = hmac.digest(key, b"byokeep/reconcile/v1", hashlib.sha256)
        self._changed = changed
        self.forget(Position())

    def forget(self, position: Position) -> None:
        """Follow everything again, from the leaves that an operator accepted."""
        self.states = States(self._key)
        self.chains: dict[str, Followed] = {}
        #: Broken, or said to be so by another replica: nothing of these tenants is leased.
        self.broken: set[str] = set()
        #: Tenants that were ever held: whether they are, and by which event.
        self.holds: dict[str, tuple[bool, int]] = {}
        self.resumed = position.resumed
        self._log: merkle.Frontier | None = None

    async def log(self, position: Position) -> list[str]:
        """Follow every chain of which the log has a new leaf; return those found broken.

        Raises:
            ContradictionError: a leaf is missing, or is not what its chain has.
        """
        frontier = self._log or await self._start(position)
        self._log = frontier
        broken = []
        while frontier.size < position.size:
            rows = await log_store.leaf_heads(self._database, frontier.size, position.size)
            # A copy: where a read fails, the leaves whose chains were not followed come again.
            taken = merkle.Frontier(frontier.size, frontier.roots())
            for name in self._heads(taken, rows):
                broken += [name] * await self.follow(name)
                await self._check_dropped(name, rows)
                self._check_reached(name, rows)
            self._log = frontier = taken
        if frontier.size == position.size and frontier.root() != position.root:
            raise ContradictionError("the leaves are not those that were anchored")
        return broken

    async def follow(self, name: str) -> bool:
        """Follow a chain to its end; True where that shows that it is broken."""
        if name in self.broken:
            return False
        followed = self.chains.get(name)
        if followed is None:
            return await self._from_start(name)
        async for row in audit_store.links(self._database, name, followed.sequence):
            if self._take(name, followed, row) is None:
                # Retention may have dropped, just now, what was to be read.
                if (await audit_store.pruned(self._database, name))[0] > followed.sequence:
                    return await self._from_start(name)
                self.broken.add(name)
                return True
        return False

    def behind(self, name: str, sequence: int) -> bool:
        """Say whether a chain's head is before what was followed of it: its end was cut off."""
        followed = self.chains.get(name)
        return followed is not None and sequence < followed.sequence

    def snapshot(self) -> list[bytes]:
        """Return what was followed, in parts; the first authenticates the others."""
        log = self._log or merkle.Frontier()
        parts = [*self.states.dump(), *self._dump_chains()]
        head = {
            "resumed": self.resumed,
            "leaves": log.size,
            "roots": [root.hex() for root in log.roots()],
            "states": _STATE_PARTS,
            "order": sys.byteorder,
            "holds": self.holds,
            "digest": _digest(parts),
        }
        text = json.dumps(head).encode()
        return [hmac.digest(self._key, text, hashlib.sha256) + text, *parts]

    async def _start(self, position: Position) -> merkle.Frontier:
        restored = self._restore(await store.parts(self._database), position)
        if restored is not None:
            return restored
        async with self._database.transaction() as connection:
            found = await load(connection, position.accepted)
        if found is None:
            raise ContradictionError("nodes of the log are missing")
        return found

    def _restore(self, parts: list[bytes], position: Position) -> merkle.Frontier | None:
        if not parts:
            return None
        mac, text = parts[0][:32], parts[0][32:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, text, hashlib.sha256)):
            return None
        head, parts = json.loads(text), parts[1:]
        expected = (_digest(parts), position.resumed, sys.byteorder, _STATE_PARTS)
        if (head["digest"], head["resumed"], head["order"], head["states"]) != expected:
            return None
        if head["leaves"] > position.size:
            raise ContradictionError("the log is shorter than what was verified of it")
        self.holds = {tenant: (held, at) for tenant, (held, at) in head["holds"].items()}
        self.states.restore(iter(parts[:_STATE_PARTS]))
        for part in parts[_STATE_PARTS:]:
            for name, *numbers, digest in json.loads(part):
                self.chains[name] = Followed(numbers[0], bytes.fromhex(digest), numbers[1])
                self.broken.update([name] * numbers[2])
        return merkle.Frontier(head["leaves"], [bytes.fromhex(root) for root in head["roots"]])

    def _dump_chains(self) -> Iterator[bytes]:
        every = iter(self.chains.items())
        while part := list(islice(every, _CHAINS_IN_PART)):
            yield json.dumps(
                [
                    (name, one.sequence, one.start, int(name in self.broken), one.hash.hex())
                    for name, one in part
                ]
            ).encode()

    def _heads(self, frontier: merkle.Frontier, rows: list[Row]) -> list[str]:
        """Hold leaves against the events that they name; return the chains that they are of."""
        for index, name, sequence, blind, head, leaf, digest in rows:
            expected = merkle.leaf_hash(fields(blind, name, sequence, head))
            if index != frontier.size:
                raise ContradictionError("a leaf is missing")
            # The leaf itself says of which chain it is, also where its event was dropped.
            if not hmac.compare_digest(leaf, expected) or digest not in (None, head):
                raise ContradictionError(f"the log has another head of {name}")
            frontier.append(leaf)
        if not rows:
            raise ContradictionError("leaves are missing")
        return list(dict.fromkeys(row[1] for row in rows))

    async def _check_dropped(self, name: str, rows: list[Row]) -> None:
        # A head whose event is gone is right only where the chain itself says that it was dropped.
        gone = max((row[2] for row in rows if row[1] == name and row[6] is None), default=0)
        if gone <= self.chains[name].start:
            return
        if await self._from_start(name) or gone > self.chains[name].start:
            raise ContradictionError(f"an event of {name} that the log names is missing")

    def _check_reached(self, name: str, rows: list[Row]) -> None:
        # The leaf was held against a row; what was followed is what was read after it.
        last = max(row[2] for row in rows if row[1] == name)
        if name not in self.broken and self.chains[name].sequence < last:
            raise ContradictionError(f"the end of {name} was cut off")

    async def _from_start(self, name: str) -> bool:
        """Follow a chain from where its retention ends."""
        start, digest = await audit_store.pruned(self._database, name)
        followed = Followed(start, digest or chain.GENESIS, start)
        kept = new_carried_digest()
        if start:
            async for sequence, body in store.carried(self._database, name):
                carried_digest(kept, sequence, body)
                self._state(name, sequence, audit_pb2.AuditEvent.FromString(body))
        explained = not start
        async for row in audit_store.links(self._database, name, start):
            event = self._take(name, followed, row)
            if event is None:
                explained = False
                break
            explained = explained or (
                (event.type, event.pruned_sequence, event.pruned_hash, event.carried_hash)
                == (_PRUNED, start, digest, kept.digest())
            )
        self.chains[name] = followed
        if not explained:
            self.broken.add(name)
        return not explained

    def _take(self, name: str, followed: Followed, row: Row) -> audit_pb2.AuditEvent | None:
        """Take in the next link; None where it does not continue the chain."""
        if not chain.continues(followed.sequence, followed.hash, row):
            return None
        sequence, body, _, digest = row
        try:
            event = audit_pb2.AuditEvent.FromString(body)
        except DecodeError:
            return None
        self._state(name, sequence, event)
        followed.sequence, followed.hash = sequence, digest
        return event

    def _state(self, name: str, sequence: int, event: audit_pb2.AuditEvent) -> None:
        """Take in what an event says of a version's state, or of the whole tenant's."""
        if event.type in HELD_AFTER:
            self.holds[name.removeprefix("tenants/")] = (HELD_AFTER[event.type], sequence)
        frozen = event.reason == MISMATCH
        if not frozen and event.type not in STATE_AFTER:
            return
        if frozen and not event.key_id:
            self.broken.add(name)
            return
        bound = (name.removeprefix("tenants/"), event.key_id, event.key_version)
        version = self.states.fingerprint(*bound)
        if frozen:
            # What was frozen stays so in the chain: no column that SQL could clear.
            self.states.freeze(version)
        else:
            self.states.set(version, STATE_AFTER[event.type], sequence)
            self._changed(bound)


def _digest(parts: list[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def carried_digest(digest: hashlib._Hash, sequence: int, body: bytes) -> None:
    """Take an event that retention keeps into the digest that RETENTION_PRUNED states."""
    digest.update(sequence.to_bytes(8, "big") + hashlib.sha256(body).digest())


def new_carried_digest() -> hashlib._Hash:
    """Return the digest of no event."""
    return hashlib.sha256(_CARRIED)
