"""Content keys: what the orchestrator encrypts reviews' inputs and findings with at rest.

    content key = HKDF-SHA256(data key, info = (label, deployment, tenant, epoch), 32 bytes)

The data key is of this tenant and day alone, and wrapped by the epoch's KEK. There is no
way from here to a provider key: other KEKs (`content/…`, never `tenant/…`), so a
provider key's wrapped data key put into this table by SQL does not open; and what is
handed out is derived under a label of its own, so it is never a data key. A row moved to
another tenant or epoch gives a key that opens nothing. Whether the tenant is there, and was not
destroyed, its state says, never these rows.

Source: RFC 5869 (HKDF).
"""

from __future__ import annotations

import datetime
import logging

import grpc
from byokeep.encoding import fields
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common import logs
from services.common.errors import ByokeepError
from services.keyvault import epochs, kek, lifecycle
from services.keyvault.database import Database
from services.keyvault.ledger import Ledger
from services.keyvault.log import Log
from services.keyvault.sql import epochs as sql

log = logging.getLogger(__name__)
_LABEL = "byokeep/content-key/v1"


class ContentKeys:
    """Makes and opens content keys; runs in the data role."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        log_: Log,
        backends: kek.Backends,
        deployment: str,
        retention: datetime.timedelta,
    ) -> None:
        """Keep keys in a database, wrapped under the KEKs of epochs."""
        self._database = database
        self._ledger = ledger
        self._log = log_
        self._backends = backends
        self._deployment = deployment
        self._retention = retention

    async def get(self, tenant: str, epoch: str) -> tuple[str, bytes]:
        """Return (epoch, key) of a tenant; an empty epoch is the current one, made if need be.

        Raises:
            ByokeepError: CONTENT_EXPIRED, EPOCH_MISSING, TENANT_KEY_MISSING, ROW_TAMPERED,
                STATE_TAMPERED, ROLLED_BACK.
        """
        now = self._ledger.now()
        wanted = epoch or epochs.CONTENT.at(now)
        if self._over(wanted, now):
            raise _expired(wanted)
        await self._check(tenant, wanted, made=not epoch)
        row = await sql.content_key(self._database, tenant, wanted)
        if row is None and not epoch:
            await self._make(tenant, wanted)
            row = await sql.content_key(self._database, tenant, wanted)
        if row is None:
            raise _expired(wanted)
        return wanted, await self._open(tenant, wanted, row)

    def _over(self, epoch: str, now: datetime.datetime) -> bool:
        try:
            return epochs.content_close(epoch, self._retention) <= now
        except (ValueError, OverflowError):
            return True  # no day of the calendar, so no epoch that there ever was

    async def _check(self, tenant: str, epoch: str, *, made: bool) -> None:
        """Refuse a tenant that there is not, or not any more."""
        shredded = tenant in self._log.system.shredded
        try:
            shredded = shredded or (await self._ledger.read(tenant)).state.shredded
        except ByokeepError as error:
            if error.reason != "TENANT_KEY_MISSING" or made:
                raise
            shredded = True
        if shredded:
            raise lifecycle.tenant_key_missing(tenant) if made else _expired(epoch)

    async def _make(self, tenant: str, epoch: str) -> None:
        backend, name = self._backends.primary, kek.content_kek(epoch)
        try:
            data_key = await backend.generate_data_key(name)
        except kek.KekMissingError:
            raise epochs.missing(name) from None
        data_key.plaintext.wipe()
        row = sql.ContentRow(backend.name, data_key.kek_version, data_key.wrapped)
        await sql.insert_content_key(self._database, tenant, epoch, row)

    async def _open(self, tenant: str, epoch: str, row: sql.ContentRow) -> bytes:
        name = kek.content_kek(epoch)
        try:
            data_key = await self._backends.named(row.kek_backend).unwrap(name, row.wrapped_dek)
        except kek.KekMissingError:
            logs.event(log, "content_kek_gone", level=logging.WARNING, kek=name)
            raise _expired(epoch) from None
        except kek.UnwrapError:
            raise _tampered(epoch) from None
        with data_key as clear:
            return derive(clear.reveal(), self._deployment, tenant, epoch)


def derive(data_key: bytearray, deployment: str, tenant: str, epoch: str) -> bytes:
    """Return the content key of a tenant and epoch."""
    info = fields(_LABEL, deployment, tenant, epoch)
    return HKDF(SHA256(), 32, salt=None, info=info).derive(data_key)


def _expired(epoch: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "CONTENT_EXPIRED",
        "that content was kept as long as this deployment keeps it, or its tenant was"
        " destroyed: its key is gone",
        epoch=epoch,
    )


def _tampered(epoch: str) -> ByokeepError:
    return ByokeepError(
        grpc.StatusCode.DATA_LOSS,
        "ROW_TAMPERED",
        "the stored content key fails its authentication; it is not given out",
        epoch=epoch,
    )
