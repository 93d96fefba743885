"""What the health port says of a service."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from grpc_health.v1 import health_pb2

from services.common import server
from services.common.background import Background


class _App:
    """Lacks something when it is first asked."""

    def __init__(self) -> None:
        self.background = Background()
        self._lacks = [["keyvault"]]

    async def missing(self) -> list[str]:
        return self._lacks.pop() if self._lacks else []


async def test_a_start_is_told_when_it_is_done_and_not_a_look_later(monkeypatch):
    """Fails where only whoever has a ready file is told soon."""
    monkeypatch.setattr(server, "_HEALTH_SECONDS", 3600.0)
    app: Any = _App()
    settings: Any = SimpleNamespace(ready_file=None)
    status = server._Status()
    health = server._Health(app, Background(), status, settings)
    following = asyncio.create_task(health.follow())
    async with asyncio.timeout(60):
        while status.value != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
    following.cancel()
