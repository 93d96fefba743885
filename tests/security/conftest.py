"""A keyvault with tenant `acme`, for tests that attack it."""

from __future__ import annotations

import functools

import pytest

from services.keyvault import server
from services.keyvault.upkeep.trim import TRIM_DELAY, Trim
from tests.harness import keyvault as kv


@pytest.fixture
def deployment(tmp_path, keyvault_database_url):
    return kv.Deployment(tmp_path, keyvault_database_url)


@pytest.fixture
async def keyvault(deployment):
    async with kv.running(deployment) as running:
        await running.create_tenant()
        yield running


@pytest.fixture
def soon(monkeypatch):
    """What waits for leases that are being opened waits less here."""
    monkeypatch.setattr(server, "Trim", functools.partial(Trim, delay=TRIM_DELAY / 20))
