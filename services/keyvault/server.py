"""Wiring of keyvault."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal

import grpc
from byokeep.keyvault.v1 import (
    admin_pb2_grpc,
    audit_pb2_grpc,
    content_pb2_grpc,
    custody_pb2_grpc,
    lease_pb2_grpc,
)

from services.common import deadline, postgres
from services.common import metrics as common_metrics
from services.common.background import Background, Work, each
from services.common.config import ConfigError
from services.common.errors import ByokeepError
from services.common.waiting import NotYetError, until_there
from services.keyvault import (
    checkpoints,
    denials,
    epochs,
    grants,
    kek,
    metrics,
    needed,
    revocations,
    system_keys,
)
from services.keyvault.checkpoints import Checkpoints
from services.keyvault.config import Settings
from services.keyvault.content import ContentKeys
from services.keyvault.custody import Custody
from services.keyvault.database import Database
from services.keyvault.denials import Denials
from services.keyvault.epochs import Epochs
from services.keyvault.event import SYSTEM
from services.keyvault.heads import Heads
from services.keyvault.holds import Holds
from services.keyvault.intake import IntakeKeys
from services.keyvault.kek.configured import (
    check_logins,
    open_anchor,
    open_backends,
    open_signer,
)
from services.keyvault.lease import Leasing
from services.keyvault.ledger import Ledger
from services.keyvault.log import Log
from services.keyvault.release import Releases
from services.keyvault.revocations import Revocations
from services.keyvault.rpc.admin import Administered, AdminService
from services.keyvault.rpc.audit import AuditService
from services.keyvault.rpc.content import ContentKeyService
from services.keyvault.rpc.custody import CustodyService
from services.keyvault.rpc.lease import LeaseService
from services.keyvault.shred import Shredding
from services.keyvault.sql import index, intake
from services.keyvault.stage import Staging
from services.keyvault.tenant_keys import TenantKeys
from services.keyvault.upkeep import retention, work
from services.keyvault.upkeep.retention import Retention
from services.keyvault.upkeep.rewrap import Rewrap
from services.keyvault.upkeep.trim import Trim
from services.keyvault.upkeep.work import Upkeep

Role = Literal["all", "data", "admin"]
_KEYS_SECONDS = 2.0
_FORGET_SECONDS = 3600.0
_LAST_SECONDS = 5.0
_REVISION: Final = postgres.newest(Path(__file__).with_name("migrations"))
_MIGRATE: Final = "python -m services.keyvault migrate"


@contextmanager
def not_yet() -> Iterator[None]:
    """Turn what may still come into NotYetError, and what never will into ConfigError."""
    try:
        yield
    except kek.KekUnavailableError as error:
        raise NotYetError(error.metadata["dependency"], error.sentence) from None
    except ByokeepError as error:
        raise NotYetError(error.metadata.get("dependency", "database"), error.message) from None
    except KeyError:
        raise NotYetError(
            "schema", f"keyvault's own keys are not there; they come with '{_MIGRATE}'"
        ) from None
    except OSError as error:
        raise NotYetError("anchor", f"its file can't be used: {error.strerror}") from None
    except (kek.KekMissingError, kek.UnwrapError):
        raise ConfigError(
            "keyvault's own keys can't be opened: BYOKEEP_KEYRING_FILE, or BYOKEEP_KEK_BACKEND's"
            " settings, name another key-encryption key than that which this database was made with"
        ) from None


class App:
    """keyvault, in one of its roles."""

    def __init__(self, settings: Settings, role: Role) -> None:
        """Check the settings; connect only in `start`."""
        settings.check()
        check_logins(settings, role)
        self._settings = settings
        self._role = role
        self._kept = datetime.timedelta(days=settings.content_retention_days)
        self._url = postgres.database_url(settings.database_url_file)
        self.database = Database(self._url, settings.database_connections)
        self.backends = open_backends(settings, self.database)
        self._anchored = open_anchor(settings, self.backends)
        self._grant_keys = grants.GrantKeys(settings.grant_keys_dir)
        common_metrics.follow_pool(self.database.stats)
        self.background = Background()
        self._began = False

    async def start(self) -> None:
        """Connect, open keyvault's own keys, look at the anchor, start what runs beside."""
        await until_there(lambda: postgres.probe(self._url, _REVISION, _MIGRATE))
        await self.database.open()
        await until_there(self._open_keys)
        self._wire()
        await until_there(self._first_look)
        self._run_beside()

    async def _open_keys(self) -> None:
        settings = self._settings
        with not_yet():
            await self.backends.start()
            self.keys = await system_keys.load(self.database, self.backends, settings.deployment)
            self._signer = await open_signer(settings, self.backends, lambda: self.keys.audit_log)

    def _wire(self) -> None:
        """Put together what needs keyvault's own keys."""
        settings, database, backends = self._settings, self.database, self.backends
        deployment, shred_after = settings.deployment, settings.shred_after_seconds
        self.heads = Heads()
        self.ledger = Ledger(database, self.heads, self.keys.macs, deployment, shred_after)
        self.log = Log(
            database, self._anchored, self.heads, self.ledger, self.keys.macs, deployment
        )
        self._denials = Denials(self.ledger)
        self._revocations = Revocations(database)
        self._intake = IntakeKeys(database, backends, lambda: self.keys.intake_signing, deployment)
        self._content = ContentKeys(
            database, self.ledger, self.log, backends, deployment, self._kept
        )
        self.epochs = Epochs(database, self.ledger, self.log, backends, self._kept)
        self._custody = Custody(self.ledger, self.log, backends)
        self._staging = Staging(
            database,
            self.ledger,
            self.log,
            backends,
            self._intake,
            deployment,
            settings.intake_per_hour,
        )
        self._releases = Releases(database, self.ledger, backends)
        self._leasing = Leasing(
            self.ledger,
            self.log,
            backends,
            self._grant_keys.trusted,
            deployment,
            (settings.tenant_caps, settings.key_caps),
            self._denials.note,
        )
        self._checkpoints = Checkpoints(database, self.log, self._signer, deployment)
        self._holds = Holds(database, self.ledger, self.log, backends)
        self._tenant_keys = TenantKeys(self.ledger, self.log, backends)
        self._shredding = Shredding(database, self.ledger, self.log, backends)
        self.retention = Retention(
            database, self.ledger, self.heads, self.log, settings.audit_retention_days
        )
        self.upkeep = self._upkeep()
        self.rotation = system_keys.Rotation(
            database, self.ledger, self.log, backends, self.keys, deployment
        )
        metrics.ANCHOR_AGE.set_function(lambda: self.log.age)
        metrics.ROLLED_BACK.set_function(lambda: self.log.rolled_back)

    def _upkeep(self) -> Upkeep:
        settings, data, admin = self._settings, self._serves("data"), self._serves("admin")
        rewrap = Rewrap(
            self.ledger, self.backends, settings.deployment, settings.rewrap_rows_per_second
        )
        trim = Trim(
            self.ledger,
            self.log,
            self.backends,
            self._tenant_keys,
            self._shredding,
            settings.shred_after_seconds,
        )
        return Upkeep(
            self.database,
            self.ledger,
            self.heads,
            self.log,
            self.keys.macs,
            self.backends,
            self._holds,
            settings.shred_after_seconds,
            releases=self._releases if data else None,
            rewrap=rewrap if data else None,
            trim=trim if admin else None,
            shredding=self._shredding if admin else None,
        )

    async def _first_look(self) -> None:
        """Look at the log before anything is served: what that fails of gives no lease, and must
        not keep an operator from seeing why."""
        with not_yet():
            self.keys.choose((await self.ledger.stored(SYSTEM)).state)
            await self.log.start()
            await self._revocations.start()
        usable = {*self._settings.lost_backends(), *(one.name for one in self.backends)}
        await needed.check(self.database, self.ledger, self.log.system, usable, self._kept)
        if self._serves("admin"):
            # A backend that is away now must not keep the admin role from starting.
            await each("epochs", (self.epochs.tick,), lambda step: step())

    def _serves(self, role: Role) -> bool:
        return self._role in ("all", role)

    def _run_beside(self) -> None:
        """Start what goes on beside the calls."""
        self._began = True
        run = self.background.every
        self.background.run("log", self.log.run)
        run("denials", denials.TICK_SECONDS, self._denials.tick)
        run("checkpoints", checkpoints.TICK_SECONDS, self._checkpoints.tick)
        run("upkeep", work.TICK_SECONDS, self.upkeep.tick)
        run("scan", work.SCAN_SECONDS, self.upkeep.scan)
        run("retention", retention.TICK_SECONDS, self.retention.tick)
        run("revocations", revocations.HEARTBEAT_SECONDS, self._revocations.read, vital=True)
        run("keys", _KEYS_SECONDS, self.rotation.refresh, self._grant_keys.follow)
        forget = partial(intake.forget, self.database), partial(index.forget, self.database)
        run("forget", _FORGET_SECONDS, *forget)
        if self._serves("admin"):
            run("epochs", epochs.TICK_SECONDS, self.epochs.tick)

    async def missing(self) -> list[str]:
        """Name the database, and the KEK backends with the state of each, that do not answer."""
        found = {backend.name: await backend.health() for backend in self.backends}
        away = [f"{name}: {health.state}" for name, health in found.items() if not health.ok]
        return away if await self.database.answers() else ["database", *away]

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers of the role."""
        if self._serves("data"):
            custody_pb2_grpc.add_CustodyServiceServicer_to_server(
                CustodyService(self._custody, self._staging, self._intake), server
            )
            content_pb2_grpc.add_ContentKeyServiceServicer_to_server(
                ContentKeyService(self._content), server
            )
            lease_pb2_grpc.add_LeaseServiceServicer_to_server(
                LeaseService(self._leasing, self._releases, self._revocations), server
            )
        if self._serves("admin"):
            audit_pb2_grpc.add_AuditServiceServicer_to_server(
                AuditService(
                    self.database,
                    self._signer,
                    self._checkpoints,
                    self.ledger,
                    self.log,
                    self._settings.deployment,
                ),
                server,
            )
            admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin(), server)

    def _admin(self) -> AdminService:
        administered = Administered(
            self.ledger,
            self.log,
            self._holds,
            self._tenant_keys,
            self._shredding,
            self.rotation,
            self.upkeep,
        )
        return AdminService(
            self.database, self.backends, administered, self._kept, self._settings.deployment
        )

    def denied(self, spiffe_id: str, method: str, reason: str) -> None:
        """Count a denial for the system chain."""
        # Leasing has noted a refused grant already, with the reason that nobody is told.
        if reason != "GRANT_REFUSED":
            self._denials.note(spiffe_id, method, reason)

    async def stop(self) -> None:
        """Write what is counted, anchor once more, close."""
        await self.background.close()
        if self._began:
            count: Work = partial(self._denials.flush, 0.0, everything=True)
            steps = count, self.log.tick, self.log.save
            # A locked table, or a database that is away, must not hold a shutdown up.
            with deadline.within(_LAST_SECONDS), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await each("last_write", steps, lambda step: step())
        await self.backends.close()
        await self.database.close()
