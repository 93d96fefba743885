"""Key versions in ranges of about a thousand rows, and which of them changed.

Of each range keyvault remembers where it ends and the digest of its rows when they
last agreed with the chains. The database computes today's digest, so that rows are
read again only where one changed, or where a chain says that one should have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable

from services.keyvault.database import Database, Row
from services.keyvault.domain import WHOLE_KEY
from services.keyvault.store import reconcile as store

ROWS = 1024
_AT_LEAST = 64
_LARGEST = 2**31 - 1


class Pages:
    """The ranges (see the module)."""

    def __init__(self, database: Database, agree: Callable[[list[Row]], Awaitable[bool]]) -> None:
        """Watch a database; `agree` compares rows and says whether all of them are settled."""
        self._database = database
        self._agree = agree
        self.forget()

    def forget(self) -> None:
        """Read every row again."""
        self._ends: list[store.Bound] = [store.LAST]
        self._digests: list[bytes | None] = [None]
        self._touched: list[store.Bound] = []
        self._next = 0
        self._begun = False

    def touch(self, version: store.Bound) -> None:
        """Read a version's range again, or all of a key's or a tenant's: it should not be what it
        was."""
        if self._begun:
            self._touched.append(version)

    async def look(self) -> None:
        """Look at half of the ranges, and at those touched; at all of them the first time."""
        if not self._begun:
            self._begun = True
            self._next = await self._read(0)
            return
        self._apply_touched()
        for _ in range(min(len(self._ends), max(_AT_LEAST, len(self._ends) // 2 + 1))):
            self._next = await self._check(self._next % len(self._ends))

    async def _check(self, page: int) -> int:
        known = self._digests[page]
        if known is not None:
            found = await store.digest(self._database, self._start(page), self._ends[page])
            if found == known:
                return page + 1
        return await self._read(page)

    async def _read(self, page: int) -> int:
        """Compare a range's rows, in parts of about a thousand; return the range after it."""
        after, end = self._start(page), self._ends[page]
        ends: list[store.Bound] = []
        digests: list[bytes | None] = []
        while True:
            rows = await store.rows(self._database, after, end, ROWS)
            digests.append(store.digest_of(rows) if await self._agree(rows) else None)
            if len(rows) < ROWS:
                break
            after = (rows[-1][0], rows[-1][1], rows[-1][2])
            ends.append(after)
        self._ends[page : page + 1] = [*ends, end]
        self._digests[page : page + 1] = digests
        # What an event changed while its range was read: the digest may be of before.
        self._apply_touched()
        return page + len(digests)

    def _apply_touched(self) -> None:
        for version in self._touched:
            first = bisect_left(self._ends, version)
            last = bisect_left(self._ends, _last(version))
            for place in range(first, min(last + 1, len(self._digests))):
                self._digests[place] = None
        self._touched.clear()

    def _start(self, page: int) -> store.Bound:
        return self._ends[page - 1] if page else store.FIRST


def _last(bound: store.Bound) -> store.Bound:
    tenant, key_id, version = bound
    if version != WHOLE_KEY:
        return bound
    return (tenant, key_id, _LARGEST) if key_id else (tenant, store.LAST[0], 0)
