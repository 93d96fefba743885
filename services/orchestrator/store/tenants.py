"""SQL of tenants, callers and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from byokeep.orchestrator.v1 import settings_pb2, tenant_pb2

from services.common.errors import ByokeepError
from services.orchestrator.policy.refusals import deleted
from services.orchestrator.policy.states import Reason, TenantState
from services.orchestrator.store import requests, waits
from services.orchestrator.store.cancelling import cancel_all
from services.orchestrator.store.database import Database, Row, Session


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant with its settings; limits of 0 are not set."""

    id: str
    state: TenantState
    plan: str
    default_model: str
    max_diff_bytes: int
    max_calls_per_review: int
    max_calls_per_day: int
    max_reviews_per_day: int
    keep_superseded: bool
    retry_ambiguous: bool
    key_order: Sequence[str]
    managed_keys: bool
    fallback_models: Sequence[str]
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
    has_repository_keys: bool


_COLUMNS = """
tenant.id, tenant.state, tenant.plan, tenant.default_model, tenant.max_diff_bytes,
tenant.max_calls_per_review, tenant.max_calls_per_day, tenant.max_reviews_per_day,
tenant.keep_superseded, tenant.retry_ambiguous, tenant.key_order, tenant.managed_keys,
tenant.fallback_models, tenant.settings_version, tenant.create_time
"""
_WIDTH = len(TenantRow.__dataclass_fields__)

# Before every call.
_RIGHTS = f"""
SELECT {_COLUMNS}, caller.roles, caller.may_assert_users,
    EXISTS (SELECT FROM model_override WHERE tenant = tenant.id) AS has_overrides,
    EXISTS (SELECT FROM repository_key WHERE tenant = tenant.id) AS has_repository_keys
FROM tenant
LEFT JOIN caller ON caller.tenant = tenant.id AND caller.spiffe_id = %(spiffe_id)s
WHERE tenant.id = %(tenant)s
"""  # noqa: S608 - constants, here and below
_READ = f"SELECT {_COLUMNS} FROM tenant WHERE id = %(tenant)s"  # noqa: S608
_LOCK = _READ + " FOR NO KEY UPDATE"
_LOCK_STATE = "SELECT state FROM tenant WHERE id = %(tenant)s FOR NO KEY UPDATE"
_CREATE = """
INSERT INTO tenant (id, plan) VALUES (%(tenant)s, %(plan)s) ON CONFLICT DO NOTHING
"""
_PAGE = f"""
SELECT {_COLUMNS} FROM tenant
WHERE id > %(after)s AND (%(spiffe_id)s::text IS NULL OR EXISTS (
    SELECT FROM caller WHERE caller.tenant = tenant.id AND caller.spiffe_id = %(spiffe_id)s))
ORDER BY id LIMIT %(limit)s
"""  # noqa: S608
_SET_STATE = "UPDATE tenant SET state = %(state)s WHERE id = %(tenant)s AND state <> 'DELETED'"
_MARK_DELETED = """
UPDATE tenant SET state = 'DELETED', delete_time = coalesce(delete_time, now())
WHERE id = %(tenant)s
"""
_UNERASED = """
SELECT id FROM tenant WHERE state = 'DELETED' AND NOT erased ORDER BY delete_time LIMIT 100
"""
# Longer than any call takes.
_NOTE_ERASED = """
UPDATE tenant SET erased = true
WHERE id = %(tenant)s AND state = 'DELETED' AND delete_time < now() - interval '10 minutes'
"""
_ALLOW = """
INSERT INTO caller (tenant, spiffe_id, roles, may_assert_users)
VALUES (%(tenant)s, %(spiffe_id)s, %(roles)s::smallint[], %(may_assert_users)s)
ON CONFLICT ON CONSTRAINT caller_pkey
DO UPDATE SET roles = excluded.roles, may_assert_users = excluded.may_assert_users
"""
_DENY = "DELETE FROM caller WHERE tenant = %(tenant)s AND spiffe_id = %(spiffe_id)s"
_DENY_ALL = "DELETE FROM caller WHERE tenant = %(tenant)s"
_CALLERS = """
SELECT spiffe_id, roles, may_assert_users FROM caller
WHERE tenant = %(tenant)s AND spiffe_id > %(after)s ORDER BY spiffe_id LIMIT %(limit)s
"""
# With their attempts, calls, content and findings.
_ERASE_REVIEWS = """
DELETE FROM review WHERE id IN (SELECT id FROM review WHERE tenant = %(tenant)s LIMIT 2000)
"""
#: All of a tenant but its own row and its reviews.
_ERASE = (
    "DELETE FROM attempt WHERE tenant = %(tenant)s",
    "DELETE FROM pause WHERE tenant = %(tenant)s",
    "DELETE FROM turn WHERE tenant = %(tenant)s",
    "DELETE FROM retry_budget WHERE tenant = %(tenant)s",
    "DELETE FROM key_validation WHERE tenant = %(tenant)s",
    "DELETE FROM model_override WHERE tenant = %(tenant)s",
    "DELETE FROM repository_key WHERE tenant = %(tenant)s",
    "DELETE FROM request WHERE tenant = %(tenant)s",
    "DELETE FROM rate_bucket WHERE scope LIKE '%%:' || %(tenant)s",
)
_SETTINGS = """
UPDATE tenant SET settings_version = settings_version + 1,
    plan = coalesce(%(plan)s, plan),
    default_model = coalesce(%(default_model)s, default_model),
    max_diff_bytes = coalesce(%(max_diff_bytes)s, max_diff_bytes),
    max_calls_per_review = coalesce(%(max_calls_per_review)s, max_calls_per_review),
    max_calls_per_day = coalesce(%(max_calls_per_day)s, max_calls_per_day),
    max_reviews_per_day = coalesce(%(max_reviews_per_day)s, max_reviews_per_day),
    keep_superseded = coalesce(%(keep_superseded)s, keep_superseded),
    retry_ambiguous = coalesce(%(retry_ambiguous)s, retry_ambiguous),
    managed_keys = coalesce(%(managed_keys)s, managed_keys),
    key_order = coalesce(CAST(%(key_order)s AS text[]), key_order),
    fallback_models = coalesce(CAST(%(fallback_models)s AS text[]), fallback_models)
WHERE id = %(tenant)s
"""
_SETTABLE = (
    "plan",
    "default_model",
    "max_diff_bytes",
    "max_calls_per_review",
    "max_calls_per_day",
    "max_reviews_per_day",
    "keep_superseded",
    "retry_ambiguous",
    "key_order",
    "managed_keys",
    "fallback_models",
)


class TenantStore:
    """Tenants, callers, settings."""

    def __init__(self, database: Database) -> None:
        """Use a database."""
        self._database = database

    async def rights(self, tenant_id: str, spiffe_id: str) -> RightsRow | None:
        """Return a tenant and an identity's rights for it; None if there is no such tenant."""
        parameters = {"tenant": tenant_id, "spiffe_id": spiffe_id}
        async with self._database.statement() as session:
            row = await session.one(_RIGHTS, parameters)
        if row is None:
            return None
        return RightsRow(
            _tenant(row),
            tuple(row.roles or ()),
            bool(row.may_assert_users),
            row.has_overrides,
            row.has_repository_keys,
        )

    async def tenant(self, tenant_id: str) -> TenantRow:
        """Return a tenant that is known to be there."""
        async with self._database.statement() as session:
            return await read(session, tenant_id)

    async def create(
        self, tenant_id: str, plan: str, message: tenant_pb2.CreateTenantRequest
    ) -> TenantRow:
        """Make a tenant. Raises ByokeepError: TENANT_EXISTS."""
        async with self._database.transaction() as session:
            first = await requests.first_time(session, tenant_id, message)
            if first and not await session.run(_CREATE, {"tenant": tenant_id, "plan": plan}):
                raise ByokeepError(
                    grpc.StatusCode.ALREADY_EXISTS,
                    "TENANT_EXISTS",
                    "the tenant exists, or did: an id is not given twice",
                    tenant=tenant_id,
                )
            return await read(session, tenant_id)

    async def page(self, spiffe_id: str | None, after: str, limit: int) -> list[TenantRow]:
        """Return tenants by id: those that an identity has a role for, or all for None."""
        parameters = {"spiffe_id": spiffe_id, "after": after, "limit": limit}
        async with self._database.statement() as session:
            return [_tenant(row) for row in await session.all(_PAGE, parameters)]

    async def set_suspended(
        self, message: tenant_pb2.SuspendTenantRequest, tenant_id: str
    ) -> TenantRow:
        """Suspend or resume a tenant that is not deleted."""
        state = TenantState.ACTIVE if message.resume else TenantState.SUSPENDED
        async with self._database.of_tenant(tenant_id) as session:
            first = await requests.first_time(session, tenant_id, message)
            if first and not await session.run(_SET_STATE, {"tenant": tenant_id, "state": state}):
                raise deleted()
            if message.resume:
                await waits.resume(session, tenant_id, "", [Reason.TENANT_SUSPENDED])
            else:
                await waits.pause(session, tenant_id, "", Reason.TENANT_SUSPENDED)
            return await read(session, tenant_id)

    async def mark_deleted(self, tenant_id: str) -> None:
        """Take a tenant out of service for good; its callers lose their rights."""
        async with self._database.of_tenant(tenant_id) as session:
            await session.run(_MARK_DELETED, {"tenant": tenant_id})
            await session.run(_DENY_ALL, {"tenant": tenant_id})

    async def cancel_all(self, tenant_id: str) -> None:
        """Cancel all that runs, then all that waits, for a tenant that is DELETED."""
        async with self._database.statement() as session:
            await cancel_all(session, tenant_id)

    async def erase(self, tenant_id: str) -> None:
        """Delete all rows of a deleted tenant but the one that keeps its id from reuse."""
        async with self._database.statement() as session:
            while await session.run(_ERASE_REVIEWS, {"tenant": tenant_id}):
                pass
            for statement in _ERASE:
                await session.run(statement, {"tenant": tenant_id})

    async def unerased(self) -> list[str]:
        """Return deleted tenants of which more than their row may be left."""
        async with self._database.statement() as session:
            return [row.id for row in await session.all(_UNERASED)]

    async def note_erased(self, tenant_id: str) -> None:
        """Note that nothing is left of a deleted tenant, once no call that it outlasted runs."""
        async with self._database.statement() as session:
            await session.run(_NOTE_ERASED, {"tenant": tenant_id})

    async def allow(
        self, tenant_id: str, row: CallerRow, message: tenant_pb2.AllowCallerRequest
    ) -> None:
        """Give an identity roles in place of those that it had.

        Raises:
            ByokeepError: WRONG_STATE: the tenant is deleted; REQUEST_ID_CONFLICT.
        """
        values = {
            "tenant": tenant_id,
            "spiffe_id": row.spiffe_id,
            "roles": list(row.roles),
            "may_assert_users": row.may_assert_users,
        }
        async with self._database.of_tenant(tenant_id) as session:
            # Under the tenant's lock: its deletion erases the callers that it finds.
            if await is_deleted(session, tenant_id):
                raise deleted()
            if await requests.first_time(session, tenant_id, message):
                await session.run(_ALLOW, values)

    async def deny(self, tenant_id: str, message: tenant_pb2.DenyCallerRequest) -> None:
        """Take every role from an identity."""
        async with self._database.transaction() as session:
            if await requests.first_time(session, tenant_id, message):
                values = {"tenant": tenant_id, "spiffe_id": message.spiffe_id}
                await session.run(_DENY, values)

    async def callers(self, tenant_id: str, after: str, limit: int) -> list[CallerRow]:
        """Return the identities that have a role for a tenant, by SPIFFE ID."""
        parameters = {"tenant": tenant_id, "after": after, "limit": limit}
        async with self._database.statement() as session:
            return [
                CallerRow(row.spiffe_id, tuple(row.roles), row.may_assert_users)
                for row in await session.all(_CALLERS, parameters)
            ]

    async def change_settings(
        self,
        tenant_id: str,
        values: Mapping[str, Any],
        message: settings_pb2.UpdateSettingsRequest
        | settings_pb2.SetPlanRequest
        | settings_pb2.SetKeyCustodyRequest,
        *,
        etag: str = "",
    ) -> TenantRow:
        """Set columns of a tenant's settings. Raises ByokeepError: ETAG_MISMATCH."""
        async with self._database.of_tenant(tenant_id) as session:
            if await requests.first_time(session, tenant_id, message):
                row = _tenant(await session.one(_LOCK, {"tenant": tenant_id}))
                check_etag(etag, row.etag)
                await bump(session, tenant_id, values)
            return await read(session, tenant_id)


def check_etag(wanted: str, found: str) -> None:
    """Refuse a change of what changed since it was read. Raises ByokeepError: ETAG_MISMATCH."""
    if wanted and wanted != found:
        raise ByokeepError(
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
            "it changed since it was read; read it again",
            field="etag",
        )


async def is_deleted(session: Session, tenant_id: str) -> bool:
    """Whether a tenant is deleted; locks it, so that its deletion waits for what is stored now, or
    is seen."""
    row = await session.one(_LOCK_STATE, {"tenant": tenant_id})
    return TenantState(row.state) is TenantState.DELETED


async def read(session: Session, tenant_id: str) -> TenantRow:
    """Return a tenant that is there."""
    return _tenant(await session.one(_READ, {"tenant": tenant_id}))


async def bump(session: Session, tenant_id: str, values: Mapping[str, Any]) -> None:
    """Change columns of a tenant's settings, and with them their etag."""
    settings = {name: values.get(name) for name in _SETTABLE}
    await session.run(_SETTINGS, {"tenant": tenant_id, **settings})


def _tenant(row: Row) -> TenantRow:
    identity, state, *settings = row[:_WIDTH]
    return TenantRow(identity, TenantState(state), *settings)
