"""How much a server takes on: of one caller before its call is authorised, of one tenant after.

A caller's calls are read and authorised some at a time; the others wait unread, so that a flood
takes neither memory nor more of the event loop than one caller's part. A tenant has as many calls
of a method in flight as its proto says, and a few of them run at once: of a stream, what stands in
`turn`, for a stream that waits is no load.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.common.v1 import options_pb2

from services.common import authz
from services.common.errors import ByokeepError
from services.common.turns import Full, Turns

_PER_TENANT: Final = 256
_PER_CALLER: Final = 4096
_REQUEST_BYTES: Final = 64 * 1024
_ADMITTED_AT_ONCE: Final = 4
#: Most calls of one caller that wait to be read and authorised, with those that are.
PER_CALLER: Final = 1024
#: Most calls of one tenant, and looks of its streams, that run.
RUN_AT_ONCE: Final = 8
#: Most bytes of one tenant in flight, where it is more than one request: of requests that are being
#: answered, and of answers that are not sent yet, for a caller may take none.
TENANT_BYTES: Final = 64 * 1024 * 1024
_AGAIN_SECONDS: Final = 1.0
#: A call that is refused for the load is told so after this long.
PAUSE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What a method's proto says of its load (`byokeep.common.v1.Load`)."""

    per_tenant: int
    per_caller: int
    request_bytes: int


def declared(method: str) -> Limits:
    """Return the limits of `/package.Service/Method`."""
    load = authz.descriptor_of(method).GetOptions().Extensions[options_pb2.load]
    return Limits(
        load.per_tenant or _PER_TENANT,
        load.per_caller or _PER_CALLER,
        load.request_bytes or _REQUEST_BYTES,
    )


class Load:
    """What is in flight at one server."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._admitted = Turns(_ADMITTED_AT_ONCE, PER_CALLER)
        self._running = Turns(RUN_AT_ONCE)
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[str] = Counter()

    async def admit(self, caller: str, method: str) -> Callable[[], None]:
        """Wait until a call of a caller may be read; return what ends that. Each method has a line
        of its own: one identity may serve many tenants. Raises OVERLOADED."""
        try:
            return await self._admitted.take(f"{caller} {method}")
        except Full:
            pass
        raise _overloaded("calls of this identity that wait to be authorised", PER_CALLER)

    def enter(self, tenant: str, method: str, limits: Limits, size: int) -> Callable[[], None]:
        """Count a call that was authorised; return what ends that. Raises OVERLOADED."""
        if self._bytes[tenant] and self._bytes[tenant] + size > TENANT_BYTES:
            raise _overloaded("bytes in flight for this tenant", TENANT_BYTES)
        counted = self._count(tenant, method, limits.per_tenant, "for this tenant")
        read = self.hold(tenant, size)

        def leave() -> None:
            read()
            counted()

        return leave

    def present(self, caller: str, method: str, limits: Limits) -> Callable[[], None]:
        """Count a call of a caller, of which nothing is read yet; return what ends that. Raises
        OVERLOADED."""
        return self._count(caller, method, limits.per_caller, "of this identity")

    def _count(self, whose: str, method: str, most: int, words: str) -> Callable[[], None]:
        # A tenant's id is no SPIFFE ID: both are counted in one place.
        call = (whose, method)
        if self._calls[call] >= most:
            raise _overloaded(f"calls of {method.rsplit('/', 1)[1]} {words} at once", most)
        self._calls[call] += 1

        def end() -> None:
            self._calls[call] -= 1
            if not self._calls[call]:
                del self._calls[call]

        return end

    def hold(self, tenant: str, size: int) -> Callable[[], None]:
        """Count bytes that a tenant's call keeps here; return what ends that."""
        self._bytes[tenant] += size

        def let_go() -> None:
            self._bytes[tenant] -= size
            if not self._bytes[tenant]:
                del self._bytes[tenant]

        return let_go

    async def run(self, tenant: str) -> Callable[[], None]:
        """Wait until a tenant's call may run; return what ends that."""
        return await self._running.take(tenant)

    def stream(self, tenant: str) -> None:
        """Let `turn` know whose call this is."""
        _stream.set((self, tenant))

    async def run_with_room(self, tenant: str) -> Callable[[], None]:
        """As `run`, and not before the tenant's callers have taken what was sent to them."""
        while True:
            give_back = await self.run(tenant)
            if self._bytes[tenant] <= TENANT_BYTES:
                return give_back
            give_back()
            await asyncio.sleep(PAUSE_SECONDS)


_stream: ContextVar[tuple[Load, str]] = ContextVar("byokeep_stream")


@asynccontextmanager
async def turn() -> AsyncIterator[None]:
    """Run a part of a stream's handler as a call of its tenant runs, when its turn has come.

    Nothing may be sent in it: a caller who takes nothing would keep the tenant's other calls.
    """
    load, tenant = _stream.get()
    give_back = await load.run_with_room(tenant)
    try:
        yield
    finally:
        give_back()


def _overloaded(what: str, limit: int) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OVERLOADED",
        f"more than {limit} {what} are not served; try again",
        retry_after_seconds=_AGAIN_SECONDS,
        limit=str(limit),
    )
