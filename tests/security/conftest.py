"""A keyvault with tenant `acme`, for tests that attack it."""

from __future__ import annotations

import pytest

from tests.harness import keyvault as kv


@pytest.fixture
def deployment(tmp_path, keyvault_database_url):
    return kv.Deployment(tmp_path, keyvault_database_url)


@pytest.fixture
async def keyvault(deployment):
    async with kv.running(deployment) as running:
        await running.create_tenant()
        yield running
