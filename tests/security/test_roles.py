"""The two roles as two processes, as production runs them: neither can do the other's work."""

from __future__ import annotations

import grpc
import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, audit_pb2

from tests.harness.keyvault import Child, grant_for, lease_request, refusal, try_lease
from tests.harness.replica import in_roles

pytestmark = pytest.mark.timeout(300)
TENANT = "tenants/acme"


async def _status(call) -> grpc.StatusCode | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


async def test_roles_share_a_key_s_life(deployment):
    """The admin role makes, rotates, trims and destroys KEKs; the data role wraps and opens.

    That neither could do more is for the KEK backend to enforce: test_policy_matrix.
    """
    async with in_roles(deployment, "admin", "data") as (admin, data):
        await admin.create_tenant()
        key = await data.add_active()
        assert await try_lease(data, key) == ""
        rotated = await admin.admin.RotateTenantKey(
            admin_pb2.RotateTenantKeyRequest(tenant=TENANT, request_id=new_id("req"))
        )
        assert rotated.version == 2
        request = admin_pb2.RewrapTenantRequest(tenant=TENANT, trim=True)
        last = [one async for one in admin.admin.RewrapTenant(request, timeout=60)][-1]
        assert (last.done, last.phase) == (1, admin_pb2.KEK_JOB_PHASE_DONE)
        assert await try_lease(data, key) == ""
        shred = admin_pb2.ShredTenantRequest(tenant=TENANT, request_id=new_id("req"))
        assert (await admin.admin.ShredTenant(shred)).destroyed_versions == 1
        assert await try_lease(data, key) == "WRONG_STATE"


async def test_a_role_does_not_serve_the_other_s_methods(deployment):
    """Shown to fail: with every servicer added whatever the role."""
    async with in_roles(deployment, "admin", "data") as (admin, data):
        await admin.create_tenant()
        key = await data.add_active()
        status = data.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert await _status(status) is grpc.StatusCode.UNIMPLEMENTED
        listing = data.audit.ListEvents(audit_pb2.ListEventsRequest(parent=TENANT))
        assert await _status(listing) is grpc.StatusCode.UNIMPLEMENTED
        assert await _status(admin.stage()) is grpc.StatusCode.UNIMPLEMENTED
        assert await refusal(admin.admin.GetStatus(admin_pb2.GetStatusRequest())) == ""
        # No reason of ours: there is no such method in that process.
        request = lease_request(deployment, grant_for(key, Child()), Child())
        assert await _status(admin.leases().LeaseKey(request)) is grpc.StatusCode.UNIMPLEMENTED
