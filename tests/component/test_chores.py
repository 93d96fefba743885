"""54 `chores`: what each service does beside its calls is made to die: health and log say so, and
it is started again."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from services.common import background, config, server
from services.common.background import Background
from services.llm_runner import config as runner_config
from services.llm_runner.server import App as RunnerApp
from services.llm_runner.spawner import Spawner
from tests.harness import keyvault as kv
from tests.harness import orchestrator as orch
from tests.harness.services import good

ROOT = Path(__file__).resolve().parents[2]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# What there is at least; each that there is has to die.
CHORES = {
    "keyvault": {
        *("checkpoints", "denials", "epochs", "forget", "keys", "log"),
        *("retention", "revocations", "scan", "upkeep"),
    },
    "orchestrator": {
        *("attempts", "dispatcher", "events", "grant-key", "heartbeat", "paused-keys", "retention"),
        *("runner", "runners", "unscheduled", "verdicts", "waits"),
    },
    "llm_runner": {"revocations"},
}


@asynccontextmanager
async def running(
    zone: str, folder: Path, url: Callable[[str], str]
) -> AsyncIterator[tuple[server.App, config.ServiceSettings]]:
    if zone == "keyvault":
        deployment = kv.Deployment(folder, url("keyvault"))
        async with kv.running(deployment) as keyvault:
            yield keyvault.app, deployment.settings()
    elif zone == "orchestrator":
        async with orch.running(url("orchestrator"), folder) as stack:
            yield stack.app, stack.settings
    else:
        settings = runner_config.load(good(zone, folder, ""))
        app = RunnerApp(settings, Spawner(os.environ))
        await app.start()
        try:
            yield app, settings
        finally:
            await app.stop()


@pytest.fixture
def url(keyvault_database_url, orchestrator_database_url) -> Callable[[str], str]:
    urls = {"keyvault": keyvault_database_url, "orchestrator": orchestrator_database_url}
    return lambda zone: urls[zone]


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("zone", sorted(CHORES))
async def test_chores_that_die_are_told_and_started_again(zone, tmp_path, url, caplog, monkeypatch):
    """Shown to fail with a chore that is started by asyncio.create_task, and with `down()` left
    out of `_Health._look`."""
    monkeypatch.setattr(background, "PROVEN_SECONDS", 0.1)
    caplog.set_level("INFO", "services.common.background")

    def told(event: str) -> set[Any]:
        return {one.byokeep_fields["task"] for one in caplog.records if one.msg == event}

    async with running(zone, tmp_path, url) as (app, settings):
        chores = app.background
        await until(lambda: {kind(name) for name in chores.tasks} >= CHORES[zone])
        before = dict(chores.tasks)
        for task in before.values():
            task.cancel()
        await until(lambda: set(chores.down()) == set(before))
        assert await health(app, settings) == NOT_SERVING
        await until(lambda: told("background_well") == set(before))
        assert told("background_died") == set(before)
        assert chores.down() == []
        assert all(chores.tasks[name] is not before[name] for name in before)


def kind(name: str) -> str:
    """A chore's name; there is one for each runner's address."""
    return name.split()[0]


async def health(app: server.App, settings: config.ServiceSettings) -> int:
    """What the health port says after a look."""
    status = server._Status()
    await server._Health(app, Background(), status, settings)._look()
    answer = await status.check(health_pb2.HealthCheckRequest(), None)
    return int(answer.status)


# Tasks that have an end, which somebody awaits.
AWAITED = {
    "services/common/background.py": 3,
    "services/common/server.py": 2,  # a start, and the wait for SIGTERM beside it
    "services/llm_runner/attempt.py": 1,  # a child's end
    "services/llm_runner/service.py": 1,  # a call's requests
    "services/orchestrator/custody/content.py": 1,  # an answer that several wait for
}


def test_chores_are_started_in_one_place():
    """Whatever else starts a task would have nobody who sees it die."""
    found = {}
    for path in sorted((ROOT / "services").rglob("*.py")):
        number = len(re.findall(r"create_task\(|ensure_future\(", path.read_text()))
        if number:
            found[str(path.relative_to(ROOT))] = number
    assert found == AWAITED
