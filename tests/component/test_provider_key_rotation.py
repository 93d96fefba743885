"""A provider key's rotation: overlap, one blob or the other, rollback within its grace."""

from __future__ import annotations

import asyncio
import datetime

import grpc
import pytest
from byokeep.errors import error_info
from byokeep.keyvault.v1 import custody_pb2

from tests.harness import keyvault as kv

OLD, NEW = "sk-proj-" + "o" * 40, "sk-proj-" + "n" * 40


@pytest.fixture
async def keyvault(tmp_path, keyvault_database_url):
    deployment = kv.Deployment(tmp_path, keyvault_database_url)
    async with kv.running(deployment) as running:
        await running.create_tenant()
        yield running


async def _leased(keyvault, name: str) -> tuple[int, str]:
    """Lease the active version, as a review would; return it and the key that came."""
    key = (await keyvault.custody.GetKey(custody_pb2.GetKeyRequest(name=name))).key
    child = kv.Child()
    request = kv.lease_request(keyvault.deployment, kv.grant_for(key, child), child)
    answer = await keyvault.leases().LeaseKey(request)
    return key.active_version, child.open(request, answer)


async def test_the_blob_is_replaced_atomically(keyvault):
    """While a key is rotated and rolled back, every lease gets the value of the version that it
    names, whole, or is told that this version is not active any more."""
    key = await keyvault.add_active(OLD)
    seen: list[tuple[int, str]] = []
    refused: set[str] = set()
    over = asyncio.Event()

    async def review() -> None:
        while not over.is_set():
            try:
                seen.append(await _leased(keyvault, key.name))
            except grpc.RpcError as error:
                refused.add(error_info(error).reason)
            await asyncio.sleep(0.05)  # the key's caps are not what is tried here

    async with asyncio.TaskGroup() as group:
        group.create_task(review())
        group.create_task(review())
        staged = await keyvault.stage(NEW, key_id=key.name.split("/")[3], operation="rotate")
        before = len(seen)
        while len(seen) < before + 2:
            await asyncio.sleep(0.05)
        # Staged and not promoted: the old one serves.
        assert set(seen) == {(1, OLD)}
        await keyvault.promote(staged.name, 2)
        while (2, NEW) not in seen:
            await asyncio.sleep(0.05)
        await keyvault.change("RollBackKey", key.name)
        await asyncio.sleep(0.3)
        over.set()
    assert set(seen) <= {(1, OLD), (2, NEW)}
    assert refused <= {"WRONG_STATE"}
    assert await _leased(keyvault, key.name) == (1, OLD)


async def test_there_is_no_way_back_after_the_grace(keyvault):
    """After 24 h the superseded version is destroyed, and before that sweep it can't return."""
    key = await keyvault.add_active(OLD)
    staged = await keyvault.stage(NEW, key_id=key.name.split("/")[3], operation="rotate")
    clock = keyvault.app.ledger.now
    keyvault.app.ledger.now = lambda: clock() - datetime.timedelta(hours=25)
    await keyvault.promote(staged.name, 2)
    keyvault.app.ledger.now = clock
    assert await kv.refusal(keyvault.change("RollBackKey", key.name)) == "WRONG_STATE"
    await keyvault.tend()
    assert await keyvault.sql("SELECT version FROM key_secret") == [(2,)]
    assert await _leased(keyvault, key.name) == (2, NEW)
