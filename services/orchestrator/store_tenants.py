"""SQL of tenants, callers and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from byokeep.orchestrator.v1 import settings_pb2, tenant_pb2
from sqlalchemy import bindparam, delete, exists, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.common.errors import ByokeepError
from services.orchestrator import store_requests
from services.orchestrator.database import Database
from services.orchestrator.schema import (
    attempt,
    caller,
    key_validation,
    model_override,
    rate_bucket,
    request,
    review,
    tenant,
)


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant with its settings; limits of 0 are not set."""

    id: str
    state: str
    plan: str
    default_model: str
    max_diff_bytes: int
    max_calls_per_review: int
    max_reviews_per_day: int
    settings_version: int
    create_time: datetime

    @property
    def etag(self) -> str:
        """Changes with every change of the settings."""
        return str(self.settings_version)


@dataclass(frozen=True, slots=True)
class CallerRow:
    """What an identity may do for a tenant."""

    spiffe_id: str
    roles: tuple[int, ...]
    may_assert_users: bool


@dataclass(frozen=True, slots=True)
class RightsRow:
    """A tenant, and what one identity may do for it."""

    tenant: TenantRow
    roles: tuple[int, ...]
    may_assert_users: bool
    has_overrides: bool


_TENANT = [tenant.c[name] for name in TenantRow.__dataclass_fields__]

# Before every call: built once.
_RIGHTS = (
    select(
        *_TENANT,
        caller.c.roles,
        caller.c.may_assert_users,
        exists().where(model_override.c.tenant == tenant.c.id).label("has_overrides"),
    )
    .select_from(
        tenant.outerjoin(
            caller,
            (caller.c.tenant == tenant.c.id) & (caller.c.spiffe_id == bindparam("spiffe_id")),
        )
    )
    .where(tenant.c.id == bindparam("tenant"))
)


class TenantStore:
    """Tenants, callers, settings."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def rights(self, tenant_id: str, spiffe_id: str) -> RightsRow | None:
        """Return a tenant and an identity's rights for it; None if there is no such tenant."""
        parameters = {"tenant": tenant_id, "spiffe_id": spiffe_id}
        async with self._database.statement() as connection:
            row = (await connection.execute(_RIGHTS, parameters)).one_or_none()
        if row is None:
            return None
        return RightsRow(
            _tenant(row), tuple(row.roles or ()), bool(row.may_assert_users), row.has_overrides
        )

    async def tenant(self, tenant_id: str) -> TenantRow:
        """Return a tenant that is known to be there."""
        async with self._database.statement() as connection:
            return await _read(connection, tenant_id)

    async def create(
        self, tenant_id: str, plan: str, message: tenant_pb2.CreateTenantRequest
    ) -> TenantRow:
        """Make a tenant. Raises ByokeepError: TENANT_EXISTS."""
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                done = await connection.execute(
                    insert(tenant)
                    .values(id=tenant_id, plan=plan)
                    .on_conflict_do_nothing()
                    .returning(tenant.c.id)
                )
                if done.one_or_none() is None:
                    raise ByokeepError(
                        grpc.StatusCode.ALREADY_EXISTS,
                        "TENANT_EXISTS",
                        "the tenant exists, or did: an id is not given twice",
                        tenant=tenant_id,
                    )
            return await _read(connection, tenant_id)

    async def page(self, spiffe_id: str | None, after: str, limit: int) -> list[TenantRow]:
        """Return tenants by id: those that an identity has a role for, or all for None."""
        query = select(*_TENANT).where(tenant.c.id > after).order_by(tenant.c.id).limit(limit)
        if spiffe_id is not None:
            query = query.join(caller, caller.c.tenant == tenant.c.id).where(
                caller.c.spiffe_id == spiffe_id
            )
        async with self._database.statement() as connection:
            return [_tenant(row) for row in await connection.execute(query)]

    async def set_suspended(
        self, message: tenant_pb2.SuspendTenantRequest, tenant_id: str
    ) -> TenantRow:
        """Suspend or resume a tenant that is not deleted."""
        state = "ACTIVE" if message.resume else "SUSPENDED"
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                done = await connection.execute(
                    update(tenant)
                    .where(tenant.c.id == tenant_id, tenant.c.state != "DELETED")
                    .values(state=state)
                )
                if done.rowcount == 0:
                    raise deleted()
            return await _read(connection, tenant_id)

    async def mark_deleted(self, tenant_id: str) -> None:
        """Take a tenant out of service for good; its callers lose their rights."""
        async with self._database.transaction() as connection:
            await connection.execute(
                update(tenant).where(tenant.c.id == tenant_id).values(state="DELETED")
            )
            await connection.execute(delete(caller).where(caller.c.tenant == tenant_id))

    async def erase(self, tenant_id: str) -> None:
        """Delete all rows of a deleted tenant but the one that keeps its id from reuse."""
        async with self._database.transaction() as connection:
            for table in (attempt, review, key_validation, model_override, request):
                await connection.execute(delete(table).where(table.c.tenant == tenant_id))
            await connection.execute(
                delete(rate_bucket).where(rate_bucket.c.scope.endswith(f":{tenant_id}"))
            )

    async def allow(
        self, tenant_id: str, row: CallerRow, message: tenant_pb2.AllowCallerRequest
    ) -> None:
        """Give an identity roles in place of those that it had."""
        values = {"roles": list(row.roles), "may_assert_users": row.may_assert_users}
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                await connection.execute(
                    insert(caller)
                    .values(tenant=tenant_id, spiffe_id=row.spiffe_id, **values)
                    .on_conflict_do_update(constraint="caller_pkey", set_=values)
                )

    async def deny(self, tenant_id: str, message: tenant_pb2.DenyCallerRequest) -> None:
        """Take every role from an identity."""
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                await connection.execute(
                    delete(caller).where(
                        caller.c.tenant == tenant_id, caller.c.spiffe_id == message.spiffe_id
                    )
                )

    async def callers(self, tenant_id: str, after: str, limit: int) -> list[CallerRow]:
        """Return the identities that have a role for a tenant, by SPIFFE ID."""
        query = (
            select(caller)
            .where(caller.c.tenant == tenant_id, caller.c.spiffe_id > after)
            .order_by(caller.c.spiffe_id)
            .limit(limit)
        )
        async with self._database.statement() as connection:
            return [
                CallerRow(row.spiffe_id, tuple(row.roles), row.may_assert_users)
                for row in await connection.execute(query)
            ]

    async def overrides(self, tenant_id: str) -> dict[str, str]:
        """Return a tenant's models by repository pattern."""
        query = select(model_override.c.pattern, model_override.c.model).where(
            model_override.c.tenant == tenant_id
        )
        async with self._database.statement() as connection:
            return {row.pattern: row.model for row in await connection.execute(query)}

    async def change_settings(
        self,
        tenant_id: str,
        values: Mapping[str, Any],
        message: settings_pb2.UpdateSettingsRequest | settings_pb2.SetPlanRequest,
        *,
        etag: str = "",
    ) -> TenantRow:
        """Set columns of a tenant's settings. Raises ByokeepError: ETAG_MISMATCH."""
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                row = await _read(connection, tenant_id, lock=True)
                check_etag(etag, row.etag)
                await _bump(connection, tenant_id, values)
            return await _read(connection, tenant_id)

    async def set_override(
        self, tenant_id: str, message: settings_pb2.SetModelOverrideRequest
    ) -> TenantRow:
        """Set the model of a repository pattern, or remove it."""
        pattern, model = message.repository_pattern, message.model
        async with self._database.transaction() as connection:
            if await store_requests.first_time(connection, tenant_id, message):
                if model:
                    await connection.execute(
                        insert(model_override)
                        .values(tenant=tenant_id, pattern=pattern, model=model)
                        .on_conflict_do_update(
                            constraint="model_override_pkey", set_={"model": model}
                        )
                    )
                else:
                    await connection.execute(
                        delete(model_override).where(
                            model_override.c.tenant == tenant_id,
                            model_override.c.pattern == pattern,
                        )
                    )
                await _bump(connection, tenant_id, {})
            return await _read(connection, tenant_id)


def check_etag(wanted: str, found: str) -> None:
    """Refuse a change of what changed since it was read. Raises ByokeepError: ETAG_MISMATCH."""
    if wanted and wanted != found:
        raise ByokeepError(
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
            "it changed since it was read; read it again",
            field="etag",
        )


def deleted() -> ByokeepError:
    """Return the refusal of a change to a deleted tenant."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_STATE",
        "the tenant is deleted",
        state="DELETED",
    )


async def _read(connection: AsyncConnection, tenant_id: str, *, lock: bool = False) -> TenantRow:
    query = select(*_TENANT).where(tenant.c.id == tenant_id)
    if lock:
        query = query.with_for_update(key_share=True)
    return _tenant((await connection.execute(query)).one())


async def _bump(connection: AsyncConnection, tenant_id: str, values: Mapping[str, Any]) -> None:
    await connection.execute(
        update(tenant)
        .where(tenant.c.id == tenant_id)
        .values(settings_version=tenant.c.settings_version + 1, **values)
    )


def _tenant(row: Any) -> TenantRow:
    return TenantRow(*row[: len(_TENANT)])
