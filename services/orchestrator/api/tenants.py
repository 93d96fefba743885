"""TenantService and CallerService: RPC ↔ store."""

from __future__ import annotations

import re
from datetime import datetime

from byokeep import names
from byokeep.common.v1 import options_pb2
from byokeep.orchestrator.v1 import tenant_pb2, tenant_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.common import authz
from services.orchestrator.api import access, paging
from services.orchestrator.policy.plans import Plan, Plans
from services.orchestrator.policy.refusals import unexpected
from services.orchestrator.store.tenants import CallerRow, TenantRow, TenantStore
from services.orchestrator.work.deletion import Deletion


def timestamp(value: datetime | None) -> Timestamp | None:
    """Return a protobuf timestamp, or None."""
    if value is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def tenant_message(row: TenantRow) -> tenant_pb2.Tenant:
    """Return a tenant as clients see it."""
    return tenant_pb2.Tenant(
        name=names.tenant_name(row.id),
        state=tenant_pb2.TenantState.Value(f"TENANT_STATE_{row.state}"),
        plan=row.plan,
        create_time=timestamp(row.create_time),
    )


class TenantServicer(tenant_pb2_grpc.TenantServiceServicer):
    """Tenants, for operators."""

    def __init__(self, store: TenantStore, deletion: Deletion, plans: Plans) -> None:
        """Use the store, what ends a deleted tenant's things, and the plans there are."""
        self._store = store
        self._deletion = deletion
        self._plans = plans

    async def CreateTenant(
        self, request: tenant_pb2.CreateTenantRequest, context: object
    ) -> tenant_pb2.CreateTenantResponse:
        """Make a tenant."""
        row = await self._store.create(
            names.tenant_of(request.name), self._plans.chosen(request.plan), request
        )
        return tenant_pb2.CreateTenantResponse(tenant=tenant_message(row))

    async def ListTenants(
        self, request: tenant_pb2.ListTenantsRequest, context: object
    ) -> tenant_pb2.ListTenantsResponse:
        """List the caller's tenants; an operator's are all."""
        caller = authz.current()
        operator = options_pb2.CALLER_CLASS_OPERATOR in caller.classes
        limit = paging.size(request.page_size)
        rows = await self._store.page(
            None if operator else caller.spiffe_id, request.page_token, limit + 1
        )
        page, token = paging.cut(rows, limit, lambda row: row.id, tenant_message)
        return tenant_pb2.ListTenantsResponse(tenants=page, next_page_token=token)

    async def ListPlans(
        self, request: tenant_pb2.ListPlansRequest, context: object
    ) -> tenant_pb2.ListPlansResponse:
        """List the plans that there are."""
        limit = paging.size(request.page_size)

        def message(plan: Plan) -> tenant_pb2.Plan:
            return tenant_pb2.Plan(
                name=plan.name,
                default=self._plans.is_default(plan),
                attempts_in_flight=plan.attempts_in_flight,
                reviews_per_day=plan.reviews_per_day,
                reviews_waiting=plan.reviews_waiting,
                keys_per_provider=plan.keys_per_provider,
                features=sorted(plan.features),
            )

        page, token = paging.cut(
            self._plans.page(request.page_token, limit + 1), limit, lambda plan: plan.name, message
        )
        return tenant_pb2.ListPlansResponse(plans=page, next_page_token=token)

    async def SuspendTenant(
        self, request: tenant_pb2.SuspendTenantRequest, context: object
    ) -> tenant_pb2.SuspendTenantResponse:
        """Suspend or resume a tenant."""
        row = await self._store.set_suspended(request, names.tenant_of(request.name))
        return tenant_pb2.SuspendTenantResponse(tenant=tenant_message(row))

    async def DeleteTenant(
        self, request: tenant_pb2.DeleteTenantRequest, context: object
    ) -> tenant_pb2.DeleteTenantResponse:
        """Delete a tenant. What breaks off is completed by a retry, or by the sweeper."""
        tenant = names.tenant_of(request.name)
        await self._store.mark_deleted(tenant)
        destroyed = await self._deletion.carry_out(tenant, access.current().actor())
        return tenant_pb2.DeleteTenantResponse(destroyed_keys=destroyed)


class CallerServicer(tenant_pb2_grpc.CallerServiceServicer):
    """Callers of tenants, for operators."""

    def __init__(self, store: TenantStore, trust_domain: str) -> None:
        """Use the tenants' store; identities are of one trust domain."""
        self._store = store
        self._spiffe_id = re.compile(
            rf"spiffe://{re.escape(trust_domain)}(/[A-Za-z0-9._-]+)+", re.ASCII
        )

    async def AllowCaller(
        self, request: tenant_pb2.AllowCallerRequest, context: object
    ) -> tenant_pb2.AllowCallerResponse:
        """Give an identity roles."""
        given = request.caller
        if len(given.spiffe_id) > 512 or not self._spiffe_id.fullmatch(given.spiffe_id):
            raise unexpected("caller.spiffe_id", "a SPIFFE ID of this deployment's trust domain")
        known = set(options_pb2.TenantRole.values()) - {options_pb2.TENANT_ROLE_UNSPECIFIED}
        roles = tuple(sorted(set(given.roles)))
        if not roles or not known.issuperset(roles):
            raise unexpected("caller.roles", "one role or more, each a known one")
        row = CallerRow(given.spiffe_id, roles, given.may_assert_users)
        await self._store.allow(names.tenant_of(request.parent), row, request)
        return tenant_pb2.AllowCallerResponse(caller=_caller(row))

    async def DenyCaller(
        self, request: tenant_pb2.DenyCallerRequest, context: object
    ) -> tenant_pb2.DenyCallerResponse:
        """Take an identity's roles."""
        await self._store.deny(names.tenant_of(request.parent), request)
        return tenant_pb2.DenyCallerResponse()

    async def ListCallers(
        self, request: tenant_pb2.ListCallersRequest, context: object
    ) -> tenant_pb2.ListCallersResponse:
        """List a tenant's callers."""
        limit = paging.size(request.page_size)
        rows = await self._store.callers(
            names.tenant_of(request.parent), request.page_token, limit + 1
        )
        page, token = paging.cut(rows, limit, lambda row: row.spiffe_id, _caller)
        return tenant_pb2.ListCallersResponse(callers=page, next_page_token=token)


def _caller(row: CallerRow) -> tenant_pb2.Caller:
    return tenant_pb2.Caller(
        spiffe_id=row.spiffe_id,
        roles=[options_pb2.TenantRole.ValueType(role) for role in row.roles],
        may_assert_users=row.may_assert_users,
    )
