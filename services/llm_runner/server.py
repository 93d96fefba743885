"""Wiring of the parent."""

from __future__ import annotations

import logging
import os
import signal
from typing import Final

import grpc
from byokeep import transport
from byokeep.runner.v1.runner_pb2_grpc import add_RunnerServiceServicer_to_server

from services.common import logs
from services.common.background import Background
from services.common.config import ConfigError
from services.llm_runner.attempt import Means
from services.llm_runner.attempts import Attempts
from services.llm_runner.config import Settings
from services.llm_runner.leases import Leases
from services.llm_runner.revocation import RevocationWatch
from services.llm_runner.service import RunnerService
from services.llm_runner.sockets import Dialer, parse_overrides
from services.llm_runner.spawner import Spawner, SpawnError

log = logging.getLogger(__name__)
_STOP_SECONDS: Final = 5.0


class App:
    """The runner's parent; see services.common.server for the order of the calls."""

    def __init__(self, settings: Settings, spawner: Spawner) -> None:
        """Take over a zygote that is already starting."""
        self._settings = settings
        self._spawner = spawner
        self.zygote_lost = False
        self.background = Background()

    async def start(self) -> None:
        """Wait for the zygote, and open the channel to keyvault. Raises ConfigError."""
        settings = self._settings
        self._channel = transport.aio_channel(
            settings.keyvault_address, settings.keyvault_name, settings.tls
        )
        self._leases = Leases(self._channel)
        self._watch = RevocationWatch(self._channel, lambda: self._attempts.watch_changed())
        means = Means(Dialer(parse_overrides(settings.provider_dial)), self._leases, self._watch)
        self._attempts = Attempts(self._spawner, means, settings.max_children)
        try:
            await self._spawner.start()
        except (SpawnError, TimeoutError):
            raise ConfigError("the zygote does not start; it says above why") from None
        self._spawner.lost = self._lost
        self.background.run("revocations", self._watch.watch)

    def register(self, server: grpc.aio.Server) -> None:
        """Add RunnerService."""
        add_RunnerServiceServicer_to_server(RunnerService(self._attempts), server)

    async def missing(self) -> list[str]:
        """Name keyvault where no revocation would be heard: no key is leased then."""
        return [] if self._watch.healthy else ["keyvault's revocations"]

    def drain(self) -> None:
        """Take nothing more, and say so to who watches."""
        self._attempts.drain()

    async def stop(self) -> None:
        """Kill what is left, release its leases, close everything."""
        await self._attempts.close(_STOP_SECONDS)
        await self._leases.close(_STOP_SECONDS)
        await self.background.close()
        self._watch.close()
        await self._spawner.close()
        await self._channel.close()

    def _lost(self) -> None:
        """Drain and end: without a zygote there are no children, and the next start has one."""
        self.zygote_lost = True
        logs.event(log, "zygote_lost", level=logging.ERROR)
        os.kill(os.getpid(), signal.SIGTERM)
