"""Following the chains, and the log that says which of them grew.

What a process has followed it holds in memory; a snapshot in the database spares the
next start from following everything again. An older snapshot put back by SQL only
makes that start follow more.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from byokeep.encoding import fields
from byokeep.keyvault.v1 import audit_pb2
from google.protobuf.message import DecodeError

from services.keyvault import chain, merkle, snapshot
from services.keyvault.carried import Carried
from services.keyvault.database import Database, Row
from services.keyvault.domain import (
    HELD_AFTER,
    STATE_AFTER,
    WHOLE_AFTER,
    WHOLE_KEY,
    State,
    may_become,
)
from services.keyvault.position import Position
from services.keyvault.states import SEQUENCES, States
from services.keyvault.store import audit as audit_store
from services.keyvault.store import log as log_store
from services.keyvault.store import reconcile as store

MISMATCH = "RECONCILE_MISMATCH"
PRUNED = audit_pb2.AUDIT_EVENT_TYPE_RETENTION_PRUNED
_TRIMMED = audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_TRIMMED
_NEW_KEK = (
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED,
    audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_ROTATED,
)
_STATE_PARTS = 16
_CHAINS_IN_PART = 10_000


class ContradictionError(Exception):
    """The database is not what the anchored log says it was."""


class BehindError(ContradictionError):
    """What was kept is of a longer log than this process knows to be anchored. Nothing of it was
    followed yet."""


@dataclass(slots=True)
class Followed:
    """How far a chain was followed."""

    sequence: int = 0
    hash: bytes = chain.GENESIS
    #: Events up to this one were dropped by retention before it was followed.
    start: int = 0
    #: The newest event of which a leaf of the log was seen.
    logged: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """What a chain tells of a version."""

    #: Its state, and the number of the event that set it; zeros where nothing tells of it.
    state: int
    sequence: int
    frozen: bool
    #: The same of all of its key: REVOKED, DESTROYED, or ACTIVE since a version of it became so.
    whole: int
    whole_sequence: int
    #: The number of the event that its tenant was shredded; 0 where it was not.
    shredded: int

    @property
    def known(self) -> bool:
        """Whether an event tells of this very version."""
        return self.sequence > 0

    def over(self, sequence: int) -> State | None:
        """Return REVOKED or DESTROYED where a version is that whose state an event set with this
        number: what a tenant has after it was shredded lives."""
        last = State(max(self.state, self.whole))  # the numbers of states rise to the last
        if sequence < self.shredded:
            return State.DESTROYED
        return last if last in WHOLE_AFTER.values() else None

    def outdated(self, state: int, sequence: int) -> bool:
        """Say whether a row's state, set by an event with a number, is older than what is told: of
        the version, or of another one that became ACTIVE in its place."""
        replaced = state == State.ACTIVE and self.whole_sequence > sequence
        return replaced or self.sequence > sequence


class Following:
    """What was followed: positions of chains and of the log, and the states that they give."""

    def __init__(
        self, database: Database, key: bytes, changed: Callable[[store.Bound], None]
    ) -> None:
        """Start with nothing followed. The key is keyvault's own; `changed` is told of every
        version that an event gives another state."""
        self._database = database
        # Of what is followed, and of its snapshot: with another number all is followed again. What
        # retention keeps is under a key of its own, for its events can't be written again.
        self._key = hmac.digest(key, b"byokeep/reconcile/v6", hashlib.sha256)
        self._carried_key = hmac.digest(key, b"byokeep/carried/v1", hashlib.sha256)
        self._changed = changed
        self.forget(Position())

    def forget(self, position: Position) -> None:
        """Follow everything again, from the leaves that an operator accepted."""
        self.states = States(self._key)
        self.chains: dict[str, Followed] = {}
        #: Chains that contradict themselves or the log, or of which the system chain says so:
        #: nothing of these tenants is leased.
        self.broken: set[str] = set()
        #: Those that this process found, which are not on the record yet.
        self.found: set[str] = set()
        #: Tenants that were ever held: whether they are, and by which event.
        self.holds: dict[str, tuple[bool, int]] = {}
        #: Versions that a chain gave another state after their last one; not on the record yet.
        self.revived: set[store.Bound] = set()
        #: Tenants whose chain tells of a destruction and of no sweep after it: when it was, and the
        #: KEK version made since, which a trim must name.
        self.unswept: dict[str, tuple[int, str]] = {}
        #: How many key versions each tenant's chain tells of.
        self.versions: Counter[str] = Counter()
        self.resumed = position.resumed
        self._log: merkle.Frontier | None = None

    async def log(self, position: Position) -> None:
        """Follow every chain of which the log has a new leaf, and hold both against each other.

        Raises:
            ContradictionError: the leaves are not the log's; or the system chain is not what they
                say.
        """
        frontier = self._log or await self._start(position)
        self._log = frontier
        while frontier.size < position.size:
            rows = await log_store.leaf_heads(self._database, frontier.size, position.size)
            # A copy: where a read fails, the leaves whose chains were not followed come again.
            taken = merkle.Frontier(frontier.size, frontier.roots())
            for name in self._heads(taken, rows):
                await self.follow(name)
                own = [row for row in rows if row[1] == name]
                await self._dropped(name, own)
                self._check_reached(name, own)
            self._log = frontier = taken
        if frontier.size == position.size and frontier.root() != position.root:
            raise ContradictionError("the leaves are not those that were anchored")

    async def follow(self, name: str) -> None:
        """Follow a chain to its end, or to where it is broken."""
        followed = self.chains.get(name)
        if followed is None:
            await self._from_start(name)
            return
        if name in self.broken:
            return
        async for row in audit_store.links(self._database, name, followed.sequence):
            if self._take(name, followed, row) is None:
                # Retention may have dropped, just now, what was to be read.
                if (await audit_store.pruned(self._database, name))[0] > followed.sequence:
                    await self._from_start(name)
                else:
                    self._contradicts(name, "its links don't lead on")
                return

    def stated(self, name: str, sequence: int) -> None:
        """Hold a chain's head, as its row states it, against what was followed of the chain.

        Raises:
            ContradictionError: the end of the system chain was cut off.
        """
        followed = self.chains.get(name)
        if followed is not None and sequence < followed.sequence:
            self._contradicts(name, "its end was cut off")

    def sequence(self, name: str) -> int:
        """Return the newest event of a chain that was followed."""
        followed = self.chains.get(name)
        return followed.sequence if followed is not None else 0

    def logged(self, name: str) -> int:
        """Return the newest event of a chain that the log was seen to have."""
        followed = self.chains.get(name)
        return followed.logged if followed is not None else 0

    def carried(self, name: str, sequence: int, digest: bytes) -> Carried:
        """Return the MAC of what retention keeps of a chain's events up to one of them."""
        return Carried(self._carried_key, name, sequence, digest)

    def snapshot(self) -> list[bytes]:
        """Return what was followed, in parts; the first authenticates the others."""
        log = self._log or merkle.Frontier()
        head = {
            "resumed": self.resumed,
            "leaves": log.size,
            "roots": [root.hex() for root in log.roots()],
            "states": _STATE_PARTS,
            "order": sys.byteorder,
            "holds": self.holds,
            "broken": sorted(self.broken),
            "unswept": self.unswept,
        }
        return snapshot.seal(self._key, head, [*self.states.dump(), *self._dump_chains()])

    async def _start(self, position: Position) -> merkle.Frontier:
        restored = self._restore(await store.parts(self._database), position)
        if restored is not None:
            return restored
        async with self._database.transaction() as connection:
            found = await log_store.frontier(connection, position.accepted)
        if found is None:
            raise ContradictionError("nodes of the log are missing")
        return found

    def _restore(self, sealed: list[bytes], position: Position) -> merkle.Frontier | None:
        opened = snapshot.opened(self._key, sealed)
        if opened is None:
            return None
        head, parts = opened
        expected = (position.resumed, sys.byteorder, _STATE_PARTS)
        if (head["resumed"], head["order"], head["states"]) != expected:
            return None
        if head["leaves"] > position.size:
            raise BehindError("the log is shorter than what was verified of it")
        # A call may have followed a chain before the first pass: what is taken in would replace
        # what it told, and not how far it was followed.
        self.forget(position)
        self.holds = {tenant: (held, at) for tenant, (held, at) in head["holds"].items()}
        self.broken.update(head["broken"])
        self.unswept = {tenant: (at, kek) for tenant, (at, kek) in head["unswept"].items()}
        self.states.restore(iter(parts[:_STATE_PARTS]))
        for part in parts[_STATE_PARTS:]:
            for name, versions, digest, sequence, start, logged in json.loads(part):
                self.chains[name] = Followed(sequence, bytes.fromhex(digest), start, logged)
                self.versions[name.removeprefix(chain.TENANTS)] = versions
        return merkle.Frontier(head["leaves"], [bytes.fromhex(root) for root in head["roots"]])

    def _dump_chains(self) -> Iterator[bytes]:
        every = iter(self.chains.items())
        while part := list(islice(every, _CHAINS_IN_PART)):
            rows = [
                (
                    name,
                    self.versions[name.removeprefix(chain.TENANTS)],
                    at.hash.hex(),
                    at.sequence,
                    at.start,
                    at.logged,
                )
                for name, at in part
            ]
            yield json.dumps(rows).encode()

    def _heads(self, frontier: merkle.Frontier, rows: list[Row]) -> list[str]:
        """Take leaves for the log's, which its root must bear out; return the chains that they are
        of."""
        for index, name, sequence, blind, head, leaf, _ in rows:
            if index != frontier.size:
                raise ContradictionError("a leaf is missing")
            # The leaf itself says of which chain it is, also where its event was dropped.
            named = merkle.leaf_hash(fields(blind, name, sequence, head))
            if sequence < 1 or not hmac.compare_digest(leaf, named):
                raise ContradictionError("a leaf is not what its row says")
            frontier.append(leaf)
        if not rows:
            raise ContradictionError("leaves are missing")
        return list(dict.fromkeys(row[1] for row in rows))

    async def _dropped(self, name: str, leaves: list[Row]) -> None:
        """Follow a chain from its start, of which a leaf's event is gone: it must say itself that
        it was dropped."""
        gone = max((row[2] for row in leaves if row[6] is None), default=0)
        if name not in self.broken and gone > self.chains[name].start:
            await self._from_start(name)

    def _check_reached(self, name: str, leaves: list[Row]) -> None:
        # The leaves were held against events; what was followed is what was read after them.
        last = max(row[2] for row in leaves)
        followed = self.chains[name]
        if followed.sequence < last:
            self._contradicts(name, "its end was cut off")
        if any(row[6] not in (None, row[4]) for row in leaves):
            self._contradicts(name, "the log has another head of it")
        followed.logged = max(followed.logged, last)

    def _contradicts(self, name: str, what: str) -> None:
        """Take a chain for broken that is not what was followed or logged of it. What is only about
        one tenant stops no other; the system chain is the deployment's own."""
        if name == chain.SYSTEM:
            raise ContradictionError(f"{name}: {what}")
        if name not in self.broken:
            self.broken.add(name)
            self.found.add(name)

    async def _from_start(self, name: str) -> None:
        """Follow a chain from where its retention ends."""
        start, digest = await audit_store.pruned(self._database, name)
        followed = Followed(start, digest or chain.GENESIS, start, self.logged(name))
        kept = self.carried(name, start, followed.hash)
        explained = not start
        if start:
            async for sequence, body in store.carried(self._database, name):
                kept.add(sequence, body)
                self._event(name, sequence, body)
            # Of those sweeps retention has dropped what told that they were over.
            self.unswept.pop(name.removeprefix(chain.TENANTS), None)
        async for row in audit_store.links(self._database, name, start):
            event = self._take(name, followed, row)
            if event is None:
                explained = False
                break
            explained = explained or (
                event.type == PRUNED
                and (event.pruned_sequence, event.pruned_hash) == (start, digest)
                and hmac.compare_digest(event.carried_hash, kept.digest())
            )
        self.chains[name] = followed
        if explained:
            return
        # Retention may have dropped, just now, what was to be read.
        if (await audit_store.pruned(self._database, name))[0] > start:
            await self._from_start(name)
        else:
            self._contradicts(name, "its links don't lead on")

    def _take(self, name: str, followed: Followed, row: Row) -> audit_pb2.AuditEvent | None:
        """Take in the next link; None where it does not continue the chain."""
        if not chain.continues(followed.sequence, followed.hash, row):
            return None
        sequence, body, _, digest = row
        event = self._event(name, sequence, body)
        if event is not None:
            followed.sequence, followed.hash = sequence, digest
        return event

    def _event(self, name: str, sequence: int, body: bytes) -> audit_pb2.AuditEvent | None:
        """Take in what an event says of a version's state, or of the whole tenant's; None where
        it is no event."""
        if sequence >= SEQUENCES:
            return None
        try:
            event = audit_pb2.AuditEvent.FromString(body)
        except DecodeError:
            return None
        # A chain of another name must not speak for a tenant, nor a tenant's for the deployment.
        if _froze(event) and not event.key_id:
            if name == chain.SYSTEM and event.detail.startswith(chain.TENANTS):
                self.broken.add(event.detail)
                self.found.discard(event.detail)
        elif name.startswith(chain.TENANTS):
            self._state(name.removeprefix(chain.TENANTS), sequence, event)
            self._swept(name.removeprefix(chain.TENANTS), event)
        return event

    def told(self, tenant: str, key_id: str, version: int) -> Told:
        """Return what the tenant's chain tells of a version, by itself, with its key and with its
        tenant."""
        states = self.states
        own = states.get(states.fingerprint(tenant, key_id, version))
        whole, shredded = (
            states.get(states.fingerprint(tenant, one, WHOLE_KEY)) for one in (key_id, "")
        )
        if version == WHOLE_KEY:
            own = (0, 0, own[2])
        return Told(*own, *whole[:2], shredded[1])

    def _swept(self, tenant: str, event: audit_pb2.AuditEvent) -> None:
        if event.type == audit_pb2.AUDIT_EVENT_TYPE_DESTROYED:
            # A time to come would keep a sweep from ever being overdue.
            self.unswept[tenant] = (min(event.event_time.seconds, int(time.time())), "")
        elif event.type == audit_pb2.AUDIT_EVENT_TYPE_TENANT_SHREDDED:
            self.unswept.pop(tenant, None)
        elif tenant in self.unswept:
            at, version = self.unswept[tenant]
            if event.type in _NEW_KEK:
                self.unswept[tenant] = (at, event.detail)
            elif event.type == _TRIMMED and event.detail == version:
                del self.unswept[tenant]

    def _state(self, tenant: str, sequence: int, event: audit_pb2.AuditEvent) -> None:
        if event.type in HELD_AFTER:
            self.holds[tenant] = (HELD_AFTER[event.type], sequence)
        bound = (tenant, event.key_id, event.key_version)
        version = self.states.fingerprint(*bound)
        if _froze(event):
            # What was frozen stays so in the chain: no column that SQL could clear.
            self.states.freeze(version)
            self.revived.discard(bound)
        elif event.key_version == WHOLE_KEY:
            after = WHOLE_AFTER.get(event.type)
            # Nothing takes it back.
            if after is not None and may_become(self.states.get(version)[0], after):
                self.states.set(version, after, sequence)
                self._changed(bound)
        elif event.type in STATE_AFTER:
            self._version(bound, sequence, STATE_AFTER[event.type])

    def _version(self, bound: store.Bound, sequence: int, after: State) -> None:
        tenant, key_id, _ = bound
        version = self.states.fingerprint(*bound)
        told = self.told(*bound)
        self._changed(bound)
        again = after is State.PENDING and told.known
        # What was there when its tenant was shredded is destroyed, whatever the rows said.
        shredded = told.known and told.sequence < told.shredded < sequence
        before = State.DESTROYED if shredded else told.state
        if (sequence > told.sequence and (again or not may_become(before, after))) or (
            sequence > told.whole_sequence and not may_become(told.whole, after)
        ):
            # keyvault wrote it, misled by a row that was put back or hidden, or somebody else did:
            # what is over stays over, and no number is given twice.
            self.states.freeze(version)
            if not told.frozen:
                self.revived.add(bound)
            return
        self.states.set(version, after, sequence)
        self.versions[tenant] += not told.known
        if after is State.ACTIVE:
            whole_key = (tenant, key_id, WHOLE_KEY)
            self.states.set(self.states.fingerprint(*whole_key), after, sequence)
            self._changed(whole_key)


def _froze(event: audit_pb2.AuditEvent) -> bool:
    return event.type == audit_pb2.AUDIT_EVENT_TYPE_INTEGRITY_FAILED and event.reason == MISMATCH
