"""A tenant has at most 10,000 keys that are not destroyed: one more is refused, by name."""

from __future__ import annotations

import grpc
import pytest
from byokeep.errors import error_info

from services.keyvault.lifecycle import MOST_KEYS
from tests.harness import bulk
from tests.harness.keyvault import refusal

pytestmark = pytest.mark.timeout(300)


async def test_a_tenant_s_keys_are_bounded(keyvault):
    """Also where two come at once; what is destroyed makes room.

    Shown to fail: without the count in stage._next_version.
    """
    await bulk.fill(keyvault, MOST_KEYS - 1)
    last = await keyvault.stage(name="last")
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.stage(name="one-more")
    info = error_info(error.value)
    assert (info.code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT")
    assert info.metadata["limit"] == str(MOST_KEYS)
    # A new version of a key is no new key.
    rotation = {"key_id": last.name.split("/")[3], "operation": "rotate", "name": "last"}
    await keyvault.stage(**rotation)
    # Another tenant's keys are its own.
    await keyvault.create_tenant("other")
    await keyvault.stage(tenant="other")
    await keyvault.change("DestroyKey", last.name)
    await keyvault.add_active(name="one-more")
    assert await refusal(keyvault.stage(name="too-many")) == "KEY_LIMIT"
