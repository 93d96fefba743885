"""The first tenant of a stack, made through the services' own APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc
from byokeep.names import tenant_name
from byokeep.orchestrator.v1 import tenant_pb2, tenant_pb2_grpc
from byokeep.transport import sync_channel

from .material import SERVER_NAMES, TRUST_DOMAIN
from .pki import Identity
from .state import State

_SECONDS = 15.0
_RIGHTS: Mapping[str, Sequence[options_pb2.TenantRole.ValueType]] = {
    "developer": (
        options_pb2.TENANT_ROLE_SUBMITTER,
        options_pb2.TENANT_ROLE_KEY_ADMIN,
        options_pb2.TENANT_ROLE_AUDITOR,
        options_pb2.TENANT_ROLE_OPERATOR,
    ),
    "submitter": (options_pb2.TENANT_ROLE_SUBMITTER,),
    "key-admin": (options_pb2.TENANT_ROLE_KEY_ADMIN,),
    "auditor": (options_pb2.TENANT_ROLE_AUDITOR,),
    "operator": (options_pb2.TENANT_ROLE_OPERATOR,),
}


def create_tenant(state: State, tenant: str, *, orchestrator: str, keyvault: str) -> None:
    """Create a tenant as the operator and give each role's identity its rights.

    Safe to repeat: what exists stays. Raises grpc.RpcError.
    """
    _create_tenant_key(state, tenant, keyvault)
    with _channel(state, orchestrator, "orchestrator") as channel:
        _create_tenant(tenant_pb2_grpc.TenantServiceStub(channel), tenant)
        callers = tenant_pb2_grpc.CallerServiceStub(channel)
        for role, rights in _RIGHTS.items():
            callers.AllowCaller(
                tenant_pb2.AllowCallerRequest(
                    parent=tenant_name(tenant),
                    caller=tenant_pb2.Caller(
                        spiffe_id=f"spiffe://{TRUST_DOMAIN}/client/{role}",
                        roles=rights,
                        may_assert_users=role == "developer",
                    ),
                    request_id=f"local-{tenant[:40]}-{role}",
                ),
                timeout=_SECONDS,
            )


def _create_tenant_key(state: State, tenant: str, keyvault: str) -> None:
    with _channel(state, keyvault, "keyvault") as channel:
        admin_pb2_grpc.AdminServiceStub(channel).CreateTenantKey(
            admin_pb2.CreateTenantKeyRequest(
                tenant=tenant_name(tenant), request_id=f"local-{tenant[:40]}"
            ),
            timeout=_SECONDS,
            wait_for_ready=True,
        )


def _create_tenant(tenants: tenant_pb2_grpc.TenantServiceStub, tenant: str) -> None:
    try:
        tenants.CreateTenant(
            tenant_pb2.CreateTenantRequest(
                name=tenant_name(tenant), request_id=f"local-{tenant[:40]}"
            ),
            timeout=_SECONDS,
            wait_for_ready=True,
        )
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.ALREADY_EXISTS:
            raise


def _channel(state: State, address: str, service: str) -> grpc.Channel:
    files = Identity.at(state.client / "operator")
    return sync_channel(
        address,
        SERVER_NAMES[service],
        files.certificate.read_bytes(),
        files.key.read_bytes(),
        (state.pki / "ca.pem").read_bytes(),
    )
