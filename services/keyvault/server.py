"""Wiring of keyvault."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator
from contextlib import contextmanager
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
    anchor,
    checkpoints,
    denials,
    epochs,
    grants,
    kek,
    metrics,
    needed,
    reconcile,
    retention,
    revocations,
    rewrap,
    rotation,
    system_keys,
)
from services.keyvault.anchor import Anchor
from services.keyvault.checkpoints import Checkpoints
from services.keyvault.config import Settings
from services.keyvault.content import ContentKeys
from services.keyvault.custody import Custody
from services.keyvault.database import Database
from services.keyvault.denials import Denials
from services.keyvault.epochs import Epochs
from services.keyvault.holds import Holds
from services.keyvault.intake import IntakeKeys
from services.keyvault.kek.configured import (
    check_logins,
    open_anchor,
    open_backends,
    open_signer,
)
from services.keyvault.leasing import Leasing
from services.keyvault.reconcile import Reconcile
from services.keyvault.redemption import Redemption
from services.keyvault.releases import Releases
from services.keyvault.retention import Retention
from services.keyvault.revocations import Revocations
from services.keyvault.rewrap import Rewrap
from services.keyvault.rotation import Rotation
from services.keyvault.service.admin import AdminService
from services.keyvault.service.audit import AuditService
from services.keyvault.service.content import ContentKeyService
from services.keyvault.service.custody import CustodyService
from services.keyvault.service.lease import LeaseService
from services.keyvault.staging import Staging
from services.keyvault.store.leases import Locked
from services.keyvault.wraps import Wraps

Role = Literal["all", "data", "admin"]
_SWEEP_SECONDS = 10.0
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
        self._database = Database(self._url, settings.database_connections)
        self._reading = Database(self._url, 1)
        self._backends = open_backends(settings, self._database)
        self._denials = Denials(self._database, settings.deployment)
        anchored = open_anchor(settings, self._backends)
        self._anchor = Anchor(self._database, anchored, settings.deployment)
        common_metrics.follow_pool(self._database.stats)
        metrics.ANCHOR_AGE.set_function(lambda: self._anchor.age)
        metrics.ROLLED_BACK.set_function(lambda: self._anchor.rolled_back)
        self._revocations = Revocations(self._database)
        self._grant_keys = grants.GrantKeys(settings.grant_keys_dir)
        self.background = Background()
        self._began = False

    async def start(self) -> None:
        """Connect, open keyvault's own keys, look at the anchor, start what runs beside."""
        await until_there(lambda: postgres.probe(self._url, _REVISION, _MIGRATE))
        await self._database.open()
        await self._reading.open()
        await until_there(self._open_keys)
        self._wire()
        await until_there(self._first_look)
        self._run_beside()

    async def _open_keys(self) -> None:
        settings = self._settings
        usable = {*settings.lost_backends(), *(one.name for one in self._backends)}
        with not_yet():
            needed.require(await needed.needs(self._database, self._kept), usable)
            await self._backends.start()
            self._keys = await system_keys.load(self._database, self._backends, settings.deployment)
            self._signer = await open_signer(settings, self._backends, lambda: self._keys.audit_log)

    async def _first_look(self) -> None:
        """Let anchor and pass look once before anything is served."""
        with not_yet():
            await self._anchor.tick()
            # What the pass fails of gives no lease, and must not keep an operator from seeing why.
            await each("reconcile", (self._reconcile.once,), lambda step: step())
            await self._revocations.start()
        if self._role in ("all", "admin"):
            # A backend that is away now must not keep the admin role from starting.
            await each("epochs", (self._epochs.tick,), lambda step: step())

    def _wire(self) -> None:
        """Put together what needs keyvault's own keys."""
        settings, kept = self._settings, self._kept
        self._intake = IntakeKeys(
            self._database,
            self._backends,
            lambda: self._keys.intake_signing,
            settings.deployment,
        )
        self._content = ContentKeys(self._database, self._backends, settings.deployment, kept)
        self._epochs = Epochs(self._database, self._backends, settings.deployment, kept)
        wraps = Wraps(self._keys.state_mac, settings.deployment)
        self._reconcile = Reconcile(
            self._database,
            self._reading,
            self._anchor,
            self._keys.state_mac,
            settings.deployment,
        )
        self._custody = Custody(
            self._database,
            self._backends,
            self._reconcile,
            self._keys.state_mac,
            settings.deployment,
            settings.shred_after_seconds,
        )
        self._staging = Staging(
            self._database,
            self._backends,
            self._intake,
            self._custody,
            wraps,
            settings.deployment,
            settings.intake_per_hour,
        )
        self._rewrap = Rewrap(
            self._database,
            self._backends,
            wraps,
            settings.deployment,
            settings.rewrap_rows_per_second,
        )
        self._holds = Holds(self._database, self._keys.state_mac, settings.deployment)
        self._releases = Releases(self._database, self._custody, settings.deployment)
        self._leasing = Leasing(
            self._database,
            self._backends,
            Redemption(
                self._database,
                self._custody,
                self._backends,
                self._holds,
                settings.deployment,
                (settings.tenant_caps, settings.key_caps),
                self._refusal,
            ),
            self._grant_keys.trusted,
            settings.deployment,
            self._denials.note,
        )
        self._checkpoints = Checkpoints(
            self._database, self._anchor, self._signer, settings.deployment
        )
        self._rotation = Rotation(
            self._database, self._backends, self._reconcile, wraps, settings.deployment
        )
        self._retention = Retention(
            self._database,
            self._reconcile.following,
            settings.deployment,
            settings.audit_retention_days,
        )

    def _run_beside(self) -> None:
        """Start what goes on beside the calls."""
        self._began = True
        run = self.background.every
        run("denials", denials.TICK_SECONDS, self._denials.tick)
        run("anchor", anchor.TICK_SECONDS, self._anchor.tick)
        run("checkpoints", checkpoints.TICK_SECONDS, self._checkpoints.tick)
        run(
            "reconcile",
            reconcile.INTERVAL_SECONDS,
            self._reconcile.once,
            self._reconcile.save_if_due,
        )
        run("retention", retention.TICK_SECONDS, self._retention.tick)
        run("revocations", revocations.HEARTBEAT_SECONDS, self._revocations.read, vital=True)
        run("sweep", _SWEEP_SECONDS, self._releases.expire, self._custody.sweep)
        run("keys", _KEYS_SECONDS, self._follow_keys, self._grant_keys.follow)
        if self._role in ("all", "data"):
            run("rewrap", rewrap.TICK_SECONDS, self._rewrap.tick)
        run("intake", _SWEEP_SECONDS, self._intake.forget_closed)
        run("requests", _FORGET_SECONDS, self._custody.forget)
        if self._role in ("all", "admin"):
            run("rotation", rotation.TICK_SECONDS, self._rotation.tick)
            run("jobs", _FORGET_SECONDS, self._rotation.forget, self._rotation.resweep)
            run("epochs", epochs.TICK_SECONDS, self._epochs.tick)

    async def missing(self) -> list[str]:
        """Name the database, and the KEK backends with the state of each, that do not answer."""
        found = {backend.name: await backend.health() for backend in self._backends}
        away = [f"{name}: {health.state}" for name, health in found.items() if not health.ok]
        return away if await self._database.answers() else ["database", *away]

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers of the role."""
        if self._role in ("all", "data"):
            custody_pb2_grpc.add_CustodyServiceServicer_to_server(
                CustodyService(self._custody, self._staging, self._intake), server
            )
            content_pb2_grpc.add_ContentKeyServiceServicer_to_server(
                ContentKeyService(self._content), server
            )
            lease_pb2_grpc.add_LeaseServiceServicer_to_server(
                LeaseService(self._leasing, self._releases, self._revocations), server
            )
        if self._role in ("all", "admin"):
            audit_pb2_grpc.add_AuditServiceServicer_to_server(
                AuditService(
                    self._database,
                    self._signer,
                    self._checkpoints,
                    self._reconcile,
                    self._settings.deployment,
                ),
                server,
            )
            admin_pb2_grpc.add_AdminServiceServicer_to_server(
                AdminService(
                    self._database,
                    self._backends,
                    self._custody,
                    self._rotation,
                    self._anchor,
                    self._reconcile,
                    self._holds,
                    datetime.timedelta(days=self._settings.content_retention_days),
                    self._settings.deployment,
                ),
                server,
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
            # A locked table, or a database that is away, must not hold a shutdown up.
            with deadline.within(_LAST_SECONDS), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await each("last_write", self._last_steps(), lambda step: step())
        await self._backends.close()
        await self._reading.close()
        await self._database.close()

    def _last_steps(self) -> tuple[Work, ...]:
        async def count() -> None:
            await self._denials.flush(0.0, everything=True)

        return count, self._anchor.tick, self._reconcile.once, self._reconcile.save

    def _refusal(self, locked: Locked) -> ByokeepError | None:
        return self._anchor.refusal() or self._reconcile.refusal(locked)

    async def _follow_keys(self) -> None:
        await system_keys.refresh(
            self._keys, self._database, self._backends, self._settings.deployment
        )
