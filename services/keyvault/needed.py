"""Which KEK backends are needed, by what, and until when.

After a migration the old backend still holds the KEKs of epochs that are not over: they
are not moved, for they end by themselves. keyvault does not start without a backend that
something needs, instead of failing once that something is asked for.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass

from services.common.config import ConfigError
from services.keyvault import epochs
from services.keyvault.database import Database
from services.keyvault.store import epochs as epoch_store
from services.keyvault.store import needed as store


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


async def needs(database: Database, retention: datetime.timedelta) -> dict[str, Need]:
    """Return what each backend that a row names holds; content is kept for `retention`."""
    found: dict[str, Need] = {}
    for backend, count, tenants in await store.data_keys(database):
        found[backend] = Need(data_keys=count, tenants=tenants)
    for backend, count in await store.system_keys(database):
        found.setdefault(backend, Need()).system_keys = count
    for one in await epoch_store.all_keks(database):
        if epochs.is_epoch(one.name):
            need = found.setdefault(one.backend, Need())
            end = epochs.close(one.name, retention)
            need.epochs_end = max(need.epochs_end or end, end)
    return found


def require(found: dict[str, Need], usable: Collection[str]) -> None:
    """Refuse to go on without a backend that is needed. Raises ConfigError."""
    for backend, need in found.items():
        if backend not in usable and need.sentence():
            raise ConfigError(
                f"KEK backend {backend} is not configured, and is needed for {need.sentence()}:"
                f" put {backend} into BYOKEEP_KEK_BACKENDS_READ; or, where it is gone for good and"
                " what it held with it, into BYOKEEP_KEK_BACKENDS_LOST"
            )
