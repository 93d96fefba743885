"""Epochs: the KEKs that live for a window only, made ahead of it and destroyed after it.

Intake keys are wrapped under the KEK of their hour, content keys under that of their
day (UTC). The admin role makes and destroys these KEKs; the data role only uses them,
and says EPOCH_MISSING where the current one is not there. Each is made in the primary
backend, and destroyed in the one that its row names. Creation and destruction are events
of the system chain; a destruction is written after it is done. No backend lists its KEKs: one
whose row is gone (a crash, a restored database, SQL) is looked for by its name, every day anew.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass

import grpc
from byokeep.keyvault.v1 import audit_pb2
from byokeep.sealing import MAX_WINDOW

from services.common import logs
from services.common.background import each
from services.common.errors import ByokeepError
from services.keyvault import chain, kek
from services.keyvault.database import Database
from services.keyvault.store import epochs as store

log = logging.getLogger(__name__)
TICK_SECONDS = 20.0
#: Seals to an intake key are taken so long after its window: clocks, and calls on their way.
INTAKE_GRACE = datetime.timedelta(minutes=5)
#: A KEK without a row is looked for so long after it should have been destroyed: longer than
#: keyvault is away, and longer than the backups of its database are old.
ORPHANED = datetime.timedelta(days=30)
#: How many of them are looked for in a tick.
_LOOKS = 100
#: More than any epoch's KEK is made ahead of its time.
_FORESEEN = datetime.timedelta(days=30)
#: The database's clock and ours may differ by so much.
_CLOCKS = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of epoch: its KEKs' prefix, how long it lasts, and how many are made ahead."""

    prefix: str
    length: datetime.timedelta
    form: str
    ahead: int

    def at(self, moment: datetime.datetime) -> str:
        """Return the epoch of a moment."""
        return moment.astimezone(datetime.UTC).strftime(self.form)

    def end(self, epoch: str) -> datetime.datetime:
        """Return when an epoch ends."""
        start = datetime.datetime.strptime(epoch, self.form)
        return start.replace(tzinfo=datetime.UTC) + self.length


INTAKE = Kind("intake", datetime.timedelta(hours=1), "%Y-%m-%dT%H", ahead=6)
CONTENT = Kind("content", datetime.timedelta(days=1), "%Y-%m-%d", ahead=3)
_NAMES = {INTAKE.prefix: kek.intake_kek, CONTENT.prefix: kek.content_kek}


def clock() -> datetime.datetime:
    """Return this process's time: whoever writes the database may set the database's."""
    return datetime.datetime.now(datetime.UTC)


def is_epoch(name: str) -> bool:
    """Say whether a row names a KEK of an epoch that there was or soon is: another one is not
    ours to destroy, nor to be waited for."""
    for kind in (INTAKE, CONTENT):
        try:
            begun = kind.end(name.removeprefix(f"{kind.prefix}/")) - kind.length
        except (ValueError, OverflowError):
            continue
        if _NAMES[kind.prefix](kind.at(begun)) == name and begun <= clock() + _FORESEEN:
            return True
    logs.event(log, "epoch_row_foreign", level=logging.ERROR)
    return False


def intake_close(epoch: str) -> datetime.datetime:
    """Return when an intake epoch's KEK is destroyed: no key made in the epoch outlives it."""
    return INTAKE.end(epoch) + MAX_WINDOW + INTAKE_GRACE


def content_close(epoch: str, retention: datetime.timedelta) -> datetime.datetime:
    """Return when a content epoch's KEK is destroyed."""
    return CONTENT.end(epoch) + retention


def close(name: str, retention: datetime.timedelta) -> datetime.datetime:
    """Return when the KEK of an epoch is destroyed, by its name."""
    prefix, _, epoch = name.partition("/")
    return intake_close(epoch) if prefix == INTAKE.prefix else content_close(epoch, retention)


class Epochs:
    """Makes and destroys the KEKs of epochs; runs in the admin role."""

    def __init__(
        self,
        database: Database,
        backends: kek.Backends,
        deployment: str,
        retention: datetime.timedelta,
    ) -> None:
        """Content epochs are kept for `retention` after their end."""
        self._database = database
        self._backends = backends
        self._deployment = deployment
        self._retention = retention
        self._looked: datetime.date | None = None
        #: Still to be looked for, the newest last.
        self._looks: list[store.EpochKek] = []

    async def tick(self) -> None:
        """Make what is missing, destroy what is over; one failure does not stop the rest."""
        now = await store.now(self._database)
        known = {one for one in await store.all_keks(self._database) if is_epoch(one.name)}
        primary = self._backends.primary.name
        missing = [name for name in self._wanted(now) if store.EpochKek(name, primary) not in known]
        await each("epoch_create", missing, self._create)
        await self._look(now, known)
        ours = clock()
        if abs(now - ours) > _CLOCKS:
            logs.event(log, "clocks_differ", level=logging.CRITICAL, database=now.isoformat())
        # Both clocks must say so: what is destroyed by a wrong one is gone for good.
        over = [one for one in known if close(one.name, self._retention) <= min(now, ours)]
        await each("epoch_destroy", over, self._destroy)

    def _wanted(self, now: datetime.datetime) -> list[str]:
        return [
            _NAMES[kind.prefix](kind.at(now + step * kind.length))
            for kind in (INTAKE, CONTENT)
            for step in range(kind.ahead + 1)
        ]

    async def _look(self, now: datetime.datetime, known: set[store.EpochKek]) -> None:
        if self._looked != now.date():
            self._looks, self._looked = self._past(now), now.date()
        looks, self._looks = self._looks[-_LOOKS:], self._looks[:-_LOOKS]
        failed = set(looks)
        # A backend that does not answer is not asked a hundred times.
        away = set[str]()

        async def look(one: store.EpochKek) -> None:
            if one.backend in away:
                return
            if one not in known:
                away.add(one.backend)
                await self._adopt(one)
                away.discard(one.backend)
            failed.discard(one)

        await each("epoch_adopt", reversed(looks), look)
        self._looks += [one for one in looks if one in failed]

    def _past(self, now: datetime.datetime) -> list[store.EpochKek]:
        names = []
        for kind in (INTAKE, CONTENT):
            moment = now - kind.length
            while True:
                name = _NAMES[kind.prefix](kind.at(moment))
                end = close(name, self._retention)
                if end <= now - ORPHANED:
                    break
                names.append((end, name))
                moment -= kind.length
        return [
            store.EpochKek(name, backend.name)
            for _, name in sorted(names)
            for backend in self._backends
        ]

    async def _create(self, name: str) -> None:
        backend = self._backends.primary
        await backend.create(name)
        event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_CREATED, kek=name)
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            if await store.insert(connection, store.EpochKek(name, backend.name)):
                await chain.append(connection, head, self._deployment, [event])

    async def _adopt(self, one: store.EpochKek) -> None:
        """Take in a KEK that no row names, where it is there: it must die in time."""
        try:
            await self._backends.named(one.backend).newest(one.name)
        except kek.KekMissingError:
            return
        async with self._database.transaction() as connection:
            await store.insert(connection, one)

    async def _destroy(self, one: store.EpochKek) -> None:
        backend = self._backends.named(one.backend)
        await backend.destroy(one.name)
        event = audit_pb2.AuditEvent(
            type=audit_pb2.AUDIT_EVENT_TYPE_EPOCH_KEY_DESTROYED, kek=one.name, shred=backend.shred
        )
        async with self._database.transaction() as connection:
            head = await chain.lock(connection, chain.SYSTEM)
            if await store.delete(connection, one):
                await chain.append(connection, head, self._deployment, [event])


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
