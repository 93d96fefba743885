"""The newest heads of all tenants, as this process knows them: in its memory, where SQL can't
reach.

A head is known from a leaf of the log, which its anchor bears out, or because this process
committed it. A row that is below its tenant's known head, or beside it, was put back. One above
must be led to by the events between, hash by hash.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from services.keyvault.database import Connection
from services.keyvault.event import Head, link_hash
from services.keyvault.lifecycle import rolled_back, stale
from services.keyvault.sql import events as sql

_NAMES_IN_PART: Final = 10_000
#: A head that this process wrote, and the events that led to it.
Commit = tuple[Head, Sequence[bytes]]


@dataclass(slots=True)
class Owed:
    """What this process committed of a tenant, or relies on, and no leaf is known to cover yet:
    heads, oldest first, each with the events that led to it."""

    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Head:
        """The newest of them."""
        return self.commits[-1][0]

    async def settle(self, connection: Connection, name: str, leaf: Head) -> bool:
        """Drop what a leaf covers; False where it is of another past. What is committed meanwhile
        stays owed."""
        known, newest = len(self.commits), self.head
        if newest.generation != leaf.generation:
            return False
        for number, (head, _) in enumerate(self.commits):
            if (head.sequence, head.hash) == (leaf.sequence, leaf.hash):
                del self.commits[: number + 1]
                return True
        if newest.sequence > leaf.sequence:
            return await leads(connection, name, leaf, newest)
        if not await leads(connection, name, newest, leaf):
            return False
        del self.commits[:known]
        return True


class Heads:
    """Known heads, and those that are owed to the log (see the module)."""

    def __init__(self) -> None:
        """Know nothing."""
        self.forget(0)

    def forget(self, generation: int) -> None:
        """Drop everything: an operator accepted the database as it is."""
        self.generation = generation
        self._logged: dict[str, Head] = {}
        self.owed: dict[str, Owed] = {}

    def get(self, name: str) -> Head:
        """Return a tenant's newest known head."""
        owed = self.owed.get(name)
        return owed.head if owed is not None else self.logged(name)

    def logged(self, name: str) -> Head:
        """Return the newest head of a tenant that the log is known to have."""
        return self._logged.get(name) or Head(self.generation)

    def knows(self, name: str) -> bool:
        """Say whether a tenant of that name was ever seen."""
        return name in self._logged or name in self.owed

    def names(self) -> list[str]:
        """Return the tenants that were ever seen."""
        return [*self._logged, *(name for name in self.owed if name not in self._logged)]

    async def admit(self, connection: Connection, name: str, row: Head) -> None:
        """Refuse a row's head that is old, of another branch, or of before an operator's word.
        Raises ByokeepError: ROLLED_BACK; AUDIT_UNAVAILABLE."""
        known = self.get(name)
        if row.generation > known.generation:
            # An operator's word that this process has not heard yet.
            raise stale("looked at in time")
        if row == known:
            return
        newer = row.generation == known.generation and row.sequence > known.sequence
        if not newer or not await leads(connection, name, known, row):
            raise rolled_back(name)

    def remember(self, name: str, head: Head, bodies: Sequence[bytes] = ()) -> None:
        """Note what this process committed, or relies on: it is owed to the log."""
        self.owed.setdefault(name, Owed()).commits.append((head, bodies))

    async def learn(self, connection: Connection, name: str, leaf: Head) -> list[Commit]:
        """Take in a leaf that the anchor bears out. Returns what this process wrote and the log's
        branch is without: what is anchored wins."""
        if name in self._logged and self._logged[name].covers(leaf):
            return []
        owed = self.owed.get(name)
        settled = owed is None or await owed.settle(connection, name, leaf)
        # Only now: a look that failed before this is repeated as a whole.
        self._logged[name] = leaf
        if not settled:
            return self.lose(name)
        if owed is not None and not owed.commits:
            del self.owed[name]
        return []

    def lose(self, name: str) -> list[Commit]:
        """Forget what this process wrote of a tenant, and no leaf is known to cover; return it."""
        owed = self.owed.pop(name, None)
        return owed.commits if owed is not None else []

    def dump(self) -> Iterator[bytes]:
        """Yield the log's newest heads, in parts of 10,000 names."""
        every = iter(self._logged.items())
        while part := list(islice(every, _NAMES_IN_PART)):
            rows = [(name, at.generation, at.sequence, at.hash.hex()) for name, at in part]
            yield json.dumps(rows).encode()

    def load(self, parts: Sequence[bytes]) -> None:
        """Take in what `dump` gave; the caller has authenticated it."""
        for part in parts:
            for name, generation, sequence, digest in json.loads(part):
                self._logged[name] = Head(generation, sequence, bytes.fromhex(digest))


async def leads(connection: Connection, name: str, older: Head, newer: Head) -> bool:
    """Say whether the stored events lead from one head to another."""
    sequence, digest = older.sequence, older.hash
    while sequence < newer.sequence:
        rows = await sql.bodies(connection, name, sequence, newer.sequence)
        if not rows:
            return False
        for number, body in rows:
            if number != sequence + 1:
                return False
            sequence, digest = number, link_hash(digest, body)
    return sequence == newer.sequence and hmac.compare_digest(digest, newer.hash)
