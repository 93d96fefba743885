"""Which KEK backends are needed, by what, and until when.

After a migration the old backend still holds the KEKs of epochs that are not over: they
are not moved, for they end by themselves. keyvault does not start without a backend that
something needs, instead of failing once that something is asked for. Which backends ever wrapped
something stands in the deployment's own row; what each still holds is counted over all tenants'
states, when somebody asks, or a backend of that list is not configured.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass

from byokeep.keyvault.v1 import state_pb2

from services.common.background import each
from services.common.config import ConfigError
from services.keyvault import epochs, lifecycle
from services.keyvault.database import Database
from services.keyvault.event import SYSTEM
from services.keyvault.ledger import Ledger
from services.keyvault.sql import epochs as epoch_sql
from services.keyvault.sql import ledger as ledger_sql
from services.keyvault.sql import system_keys as system_sql


@dataclass(slots=True)
class Need:
    """What one backend holds."""

    data_keys: int = 0
    tenants: int = 0
    system_keys: int = 0
    #: When the last of its epochs' KEKs is destroyed; None where it has none.
    epochs_end: datetime.datetime | None = None

    def sentence(self) -> str:
        """Say what needs it; empty where nothing does."""
        parts = []
        if self.data_keys:
            parts.append(f"{self.data_keys} data keys of {self.tenants} tenants")
        if self.system_keys:
            parts.append(f"{self.system_keys} of keyvault's own keys")
        if self.epochs_end is not None:
            parts.append(f"keys of epochs until {self.epochs_end:%Y-%m-%d %H:%M} UTC")
        return ", ".join(parts)


async def needs(
    database: Database, ledger: Ledger, retention: datetime.timedelta
) -> dict[str, Need]:
    """Return what each backend holds; content is kept for `retention`. What a damaged tenant's row
    names is not counted."""
    counts = await system_sql.counts(database)
    found = {backend: Need(system_keys=keys) for backend, keys in counts}

    async def count(name: str) -> None:
        living: dict[str, int] = {}
        if name != SYSTEM:
            for one in lifecycle.holdings((await ledger.read(name)).state):
                living[one.backend] = living.get(one.backend, 0) + one.living
        for backend, versions in living.items():
            if versions:
                need = found.setdefault(backend, Need())
                need.data_keys += versions
                need.tenants += 1

    async for names in ledger_sql.every_name(database):
        await each("needed_count", names, count)
    for backend, epoch, not_after in await epoch_sql.needed(database):
        end = _end(epoch, not_after, retention)
        if end is not None and end > ledger.now():
            need = found.setdefault(backend, Need())
            need.epochs_end = max(need.epochs_end or end, end)
    return found


async def check(
    database: Database,
    ledger: Ledger,
    system: state_pb2.SystemState,
    usable: Collection[str],
    retention: datetime.timedelta,
) -> None:
    """Refuse to go on without a backend that ever wrapped something and still is needed. The log
    was looked at before. Raises ConfigError."""
    if set(system.backends) <= set(usable):
        return
    for backend, need in (await needs(database, ledger, retention)).items():
        if backend not in usable and need.sentence():
            raise ConfigError(
                f"KEK backend {backend} is not configured, and is needed for {need.sentence()}:"
                f" put {backend} into BYOKEEP_KEK_BACKENDS_READ; or, where it is gone for good and"
                " what it held with it, into BYOKEEP_KEK_BACKENDS_LOST"
            )


def _end(
    epoch: str | None, not_after: datetime.datetime | None, retention: datetime.timedelta
) -> datetime.datetime | None:
    try:
        if epoch is not None:
            return epochs.content_close(epoch, retention)
        if not_after is not None:
            return epochs.intake_close(epochs.INTAKE.at(not_after))
    except (ValueError, OverflowError):
        pass  # a row that keyvault did not write
    return None
