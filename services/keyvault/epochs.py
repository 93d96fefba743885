"""Epochs: the KEKs that live for a window only, made ahead of it and destroyed after it.

Intake keys are wrapped under the KEK of their hour, content keys under that of their
day (UTC). The admin role makes and destroys these KEKs; the data role only uses them,
and says EPOCH_MISSING where the current one is not there. Which of them there are follows from
this process's clock, so that no row can keep one alive or have one destroyed: they are made in the
primary backend, and looked for in every backend, once a day, when they are over. Creation and
destruction are events of the system chain; a destruction is written after it is done.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import grpc
from byokeep.keyvault.v1 import audit_pb2
from byokeep.sealing import MAX_WINDOW

from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import clocks, kek
from services.keyvault.database import Database
from services.keyvault.event import SYSTEM
from services.keyvault.ledger import Ledger, Tenant
from services.keyvault.log import Log
from services.keyvault.sql import epochs as sql

TICK_SECONDS = 20.0
#: Seals to an intake key are taken so long after its window: clocks, and calls on their way.
INTAKE_GRACE = datetime.timedelta(minutes=5)
#: A KEK is looked for so long after it should have been destroyed: longer than keyvault is away,
#: and longer than the backups of its database are old.
ORPHANED = datetime.timedelta(days=30)
#: How many are looked for in a tick, the newest first: of one backend a day's, all in ten minutes.
_LOOKS: Final = 30


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of epoch: how its KEKs are named, how long it lasts, how many are made ahead."""

    kek: Callable[[str], str]
    length: datetime.timedelta
    form: str
    ahead: int

    def at(self, moment: datetime.datetime) -> str:
        """Return the epoch of a moment."""
        return moment.astimezone(datetime.UTC).strftime(self.form)

    def end(self, epoch: str) -> datetime.datetime:
        """Return when an epoch ends. Raises ValueError, OverflowError."""
        start = datetime.datetime.strptime(epoch, self.form)
        return start.replace(tzinfo=datetime.UTC) + self.length


INTAKE = Kind(kek.intake_kek, datetime.timedelta(hours=1), "%Y-%m-%dT%H", ahead=6)
CONTENT = Kind(kek.content_kek, datetime.timedelta(days=1), "%Y-%m-%d", ahead=3)


def intake_close(epoch: str) -> datetime.datetime:
    """Return when an intake epoch's KEK is destroyed: no key made in the epoch outlives it."""
    return INTAKE.end(epoch) + MAX_WINDOW + INTAKE_GRACE


def content_close(epoch: str, retention: datetime.timedelta) -> datetime.datetime:
    """Return when a content epoch's KEK is destroyed. Raises ValueError, OverflowError."""
    return CONTENT.end(epoch) + retention


class Epochs:
    """Makes and destroys the KEKs of epochs; runs in the admin role."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        log_: Log,
        backends: kek.Backends,
        retention: datetime.timedelta,
    ) -> None:
        """Content epochs are kept for `retention` after their end."""
        self._database = database
        self._ledger = ledger
        self._log = log_
        self._backends = backends
        self._retention = retention
        #: KEKs that this process made, or found there.
        self._made: set[str] = set()
        self._generation = 0
        #: (backend, KEK) that are over and were looked for on a day, and are not there.
        self._gone: set[tuple[str, str]] = set()
        self._day: datetime.date | None = None

    async def tick(self) -> None:
        """Make what is missing, destroy what is over; one failure does not stop the rest."""
        now = self._ledger.now()
        wanted = set(self._wanted(now))
        if self._log.position.generation != self._generation:
            # A database that was put back may be without them.
            self._made, self._generation = set(), self._log.position.generation
        await each("epoch_create", sorted(wanted - self._made), self._create)
        self._made &= wanted
        if now.date() != self._day:
            self._gone, self._day = set(), now.date()
        agreed = await clocks.agree(self._database, now)
        if agreed and not self._log.quiet and self._log.refusal() is None:
            await self._destroy_past(now)

    def _wanted(self, now: datetime.datetime) -> Iterator[str]:
        for kind in (INTAKE, CONTENT):
            for step in range(kind.ahead + 1):
                yield kind.kek(kind.at(now + step * kind.length))

    def _past(self, now: datetime.datetime) -> list[str]:
        """Return the KEKs that are over and may still be there, the newest first."""
        names = []
        for kind in (INTAKE, CONTENT):
            moment = now
            while True:
                epoch = kind.at(moment)
                content = kind is CONTENT
                end = content_close(epoch, self._retention) if content else intake_close(epoch)
                if end <= now - ORPHANED:
                    break
                if end <= now:
                    names.append((end, kind.kek(epoch)))
                moment -= kind.length
        return [name for _, name in sorted(names, reverse=True)]

    async def _create(self, name: str) -> None:
        backend = self._backends.primary
        if await backend.create(name):
            event = audit_pb2.AuditEvent(
                type=audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_CREATED, kek=name
            )

            def add(system: Tenant) -> None:
                if backend.name not in system.state.backends:
                    system.edit().backends.append(backend.name)
                system.events.append(event)

            await self._ledger.change(SYSTEM, add)
        self._made.add(name)

    async def _destroy_past(self, now: datetime.datetime) -> None:
        places = [(backend.name, name) for name in self._past(now) for backend in self._backends]
        places = [one for one in places if one not in self._gone][:_LOOKS]
        # A backend that does not answer is asked once.
        away = set[str]()

        async def look(place: tuple[str, str]) -> None:
            backend = self._backends.named(place[0])
            if backend.name in away:
                return
            away.add(backend.name)
            await self._destroy(backend, place[1])
            away.discard(backend.name)
            self._gone.add(place)

        await each("epoch_destroy", places, look)

    async def _destroy(self, backend: kek.Backend, name: str) -> None:
        """Destroy a KEK that is over, where it is there."""
        epoch = name.partition("/")[2]
        if name == CONTENT.kek(epoch):
            await sql.forget_epoch(self._database, epoch, backend.name)
        try:
            await backend.newest(name)
        except kek.KekMissingError:
            return
        await backend.destroy(name)
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_DESTROYED, kek=name, shred=backend.shred
        )
        await self._ledger.change(SYSTEM, lambda system: system.events.append(event))


def missing(name: str) -> ByokeepError:
    """Return the error for a current epoch whose KEK is not there."""
    return ByokeepError(
        grpc.StatusCode.UNAVAILABLE,
        "EPOCH_MISSING",
        f"the key-encryption key {name} is not there: keyvault's admin role makes it ahead of"
        " time; see that it runs",
        retry_after_seconds=TICK_SECONDS,
        epoch=name,
    )
