"""Wiring: what the orchestrator is made of, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.orchestrator.v1 import (
    key_pb2_grpc,
    review_pb2_grpc,
    settings_pb2_grpc,
    tenant_pb2_grpc,
)
from byokeep.transport import aio_channel

from services.common import authz, models, postgres
from services.common import metrics as common_metrics
from services.common.background import Background
from services.common.config import ConfigError
from services.common.waiting import until_there
from services.orchestrator import metrics
from services.orchestrator.api.access import Authority
from services.orchestrator.api.choosing import Chooser
from services.orchestrator.api.keys import KeyServicer
from services.orchestrator.api.planning import Planner
from services.orchestrator.api.reviews import ReviewServicer
from services.orchestrator.api.settings import SettingsServicer
from services.orchestrator.api.tenants import CallerServicer, TenantServicer
from services.orchestrator.compute.pool import Compute
from services.orchestrator.config import Settings
from services.orchestrator.custody.content import ContentKeys
from services.orchestrator.custody.grants import LOOK_SECONDS, GrantSigner
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy import plans
from services.orchestrator.store.attempts import AttemptStore
from services.orchestrator.store.choices import ChoiceStore
from services.orchestrator.store.database import Database
from services.orchestrator.store.endings import EndingStore
from services.orchestrator.store.events import Events
from services.orchestrator.store.keys import KeyStore
from services.orchestrator.store.picks import PickStore
from services.orchestrator.store.retention import RetentionStore
from services.orchestrator.store.reviews import ReviewStore
from services.orchestrator.store.submissions import SubmissionStore
from services.orchestrator.store.tenants import TenantStore
from services.orchestrator.store.waits import WaitStore
from services.orchestrator.work.deletion import Deletion
from services.orchestrator.work.dispatcher import HEARTBEAT_SECONDS, Dispatcher
from services.orchestrator.work.execution import Means
from services.orchestrator.work.fleet import Fleet
from services.orchestrator.work.outcomes import Outcomes
from services.orchestrator.work.sweeper import Sweeper
from services.orchestrator.work.verdicts import Verdicts

BUILT_IN_PLANS: Final = Path(__file__).with_name("data") / "plans.toml"
_REVISION: Final = postgres.newest(Path(__file__).with_name("migrations"))
_MIGRATE: Final = "python -m services.orchestrator migrate"


class App:
    """The orchestrator, for services.common.server."""

    def __init__(self, settings: Settings) -> None:
        """Read files and prepare; nothing is opened yet. Raises ConfigError."""
        self._url = url = postgres.database_url(settings.database_url_file)
        try:
            catalog = models.load(settings.models_file)
        except (ValueError, OSError) as error:
            raise ConfigError(f"BYOKEEP_MODELS_FILE: {error}") from None
        self._plans = _plans(settings.plans_file)
        self._settings = settings
        self._signer = GrantSigner(
            settings.grant_signing_key, settings.deployment, settings.runner_class
        )
        self._catalog = catalog
        self._database = Database(url, settings.database_connections)
        common_metrics.follow_pool(self._database.stats)
        self._events = Events(url)
        self._compute = Compute()
        self.tenants = TenantStore(self._database)
        self.choices = ChoiceStore(self._database)
        self.keys = KeyStore(self._database)
        self.picks = PickStore(self._database, self._plans)
        self.attempts = AttemptStore(self._database)
        self.endings = EndingStore(self._database)
        self.reviews = ReviewStore(self._database)
        self.waits = WaitStore(self._database, settings.wait_seconds)
        self._authority = Authority(self.tenants, self._plans)
        self._channels: list[grpc.aio.Channel] = []
        self.background = Background()
        self.fleet = Fleet(
            settings.runner_address,
            lambda address: aio_channel(address, settings.runner_name, settings.tls),
            self.background,
            lambda: self.dispatcher.room_changed(),
        )

    async def start(self) -> None:
        """Open database and channels, and begin to work."""
        settings = self._settings
        channel = aio_channel(settings.keyvault_address, settings.keyvault_name, settings.tls)
        self._channels = [channel]
        self.keyvault = Keyvault(channel)
        self._contents = ContentKeys(self.keyvault.content_key)
        verdicts = Verdicts(self.keys, self.waits, self.keyvault)
        self.dispatcher = Dispatcher(
            self.picks,
            self.attempts,
            Outcomes(self.attempts, self.endings, self.keyvault, verdicts),
            self._contents,
            self._events,
            self.fleet,
            Means(self.attempts, self.fleet, self._signer.sign),
            attempt_seconds=settings.attempt_seconds,
            concurrency=settings.concurrency,
        )
        self._deletion = Deletion(self.tenants, self.keyvault)
        self.sweeper = Sweeper(
            self.endings,
            RetentionStore(
                self._database,
                content_hours=settings.failed_content_hours,
                findings_days=settings.findings_days,
                review_days=settings.review_days,
            ),
            self.keys,
            self.tenants,
            self.keyvault,
            self._deletion,
            verdicts,
            self.waits,
            self.dispatcher,
            self.fleet,
            self._plans,
        )
        await until_there(lambda: postgres.probe(self._url, _REVISION, _MIGRATE))
        await self._database.open()
        background = self.background
        background.run("events", self._events.listen)
        background.run("dispatcher", self.dispatcher.run)
        background.every("heartbeat", HEARTBEAT_SECONDS, self.dispatcher.beat, vital=True)
        background.every("grant-key", LOOK_SECONDS, self._signer.follow)
        background.every("figures", metrics.LOOK_SECONDS, self._look)
        self.fleet.start()
        self.sweeper.start(background)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers."""
        settings = self._settings
        tenant_pb2_grpc.add_TenantServiceServicer_to_server(
            TenantServicer(self.tenants, self._deletion, self._plans), server
        )
        tenant_pb2_grpc.add_CallerServiceServicer_to_server(
            CallerServicer(self.tenants, settings.trust_domain), server
        )
        key_pb2_grpc.add_KeyServiceServicer_to_server(
            KeyServicer(
                self.keys,
                self.keyvault,
                self._events,
                self.waits,
                intake_per_hour=settings.intake_per_hour,
                intake_per_hour_of_caller=settings.intake_per_hour_of_caller,
            ),
            server,
        )
        settings_pb2_grpc.add_SettingsServiceServicer_to_server(
            SettingsServicer(
                self.tenants,
                self.choices,
                self.keys,
                self.keyvault,
                self._catalog,
                self._plans,
                self._settings,
            ),
            server,
        )
        planner = Planner(self._catalog, self._compute)
        review_pb2_grpc.add_ReviewServiceServicer_to_server(
            ReviewServicer(
                settings,
                self.reviews,
                SubmissionStore(self._database, self.reviews),
                self._contents,
                Chooser(self.choices, self.keys, self.keyvault, self._catalog, planner),
                planner,
                self._compute,
                self._events,
            ),
            server,
        )

    async def _look(self) -> None:
        metrics.show_waiting(await self.waits.waiting())

    async def authorize(
        self, caller: authz.Caller, access: options_pb2.Access, request: Any
    ) -> None:
        """Let a caller in with its rights for the tenant, or refuse it."""
        await self._authority.authorize(caller, access, request)

    async def missing(self) -> list[str]:
        """Name the database where it does not answer."""
        return [] if await self._database.answers() else ["database"]

    async def stop(self) -> None:
        """Take no more attempts, wait for those that run, close everything."""
        started = "dispatcher" in self.background.tasks
        if started:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.dispatcher.drain(), self._settings.drain_seconds)
        await self.background.close()
        await self._compute.close()
        if started:
            await self.dispatcher.close()
        await self.fleet.close()
        for channel in self._channels:
            await channel.close()
        await self._database.close()


def _plans(own: Path | None) -> plans.Plans:
    files = [BUILT_IN_PLANS] if own is None else [BUILT_IN_PLANS, own]
    try:
        return plans.parse((str(file), file.read_text(encoding="utf-8")) for file in files)
    except (ValueError, OSError) as error:
        raise ConfigError(f"BYOKEEP_PLANS_FILE: {error}") from None
