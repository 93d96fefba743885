"""May this caller do that for this tenant? Decided from our own tables, before any handler."""

from __future__ import annotations

import contextvars
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from byokeep.common.v1 import options_pb2
from byokeep.orchestrator.v1 import tenant_pb2

from services.common import authz
from services.common.errors import ByokeepError
from services.orchestrator.policy.keys import OPERATOR
from services.orchestrator.policy.plans import Plan, Plans
from services.orchestrator.policy.refusals import deleted, not_active, unexpected
from services.orchestrator.policy.states import TenantState
from services.orchestrator.store.tenants import TenantRow, TenantStore

_TENANT = re.compile(r"tenants/([a-z0-9][a-z0-9-]{0,62})(?:/.*)?")
# What keyvault's audit takes.
_ACTOR_CHARS: Final = 256


@dataclass(frozen=True, slots=True)
class Rights:
    """What the caller of the RPC that is being handled may do for its tenant."""

    spiffe_id: str
    tenant: TenantRow
    roles: frozenset[int]
    may_assert_users: bool
    has_overrides: bool
    has_repository_keys: bool
    plan: Plan

    def actor(self, user: str = "") -> str:
        """Return who acts, for audit: the caller, and the user that it says it acts for.

        A long SPIFFE ID is cut and ends in `~` and 128 bits of its SHA-256; the user is kept whole.
        """
        tail = f"#{user}" if user and user != OPERATOR else ""
        room = _ACTOR_CHARS - len(tail)
        if len(self.spiffe_id) <= room:
            return self.spiffe_id + tail
        digest = hashlib.sha256(self.spiffe_id.encode()).hexdigest()[:32]
        return f"{self.spiffe_id[: room - len(digest) - 1]}~{digest}{tail}"

    def require_active(self) -> None:
        """Refuse what is new for a tenant out of service. Raises TENANT_NOT_ACTIVE."""
        if self.tenant.state is not TenantState.ACTIVE:
            raise not_active(self.tenant.id, self.tenant.state)

    def require_user(self, user: str, field: str) -> None:
        """Refuse a user that the caller may not speak for, and the name that no user has.

        Raises USER_ASSERTION_NOT_ALLOWED, INVALID_FIELD.
        """
        if user == OPERATOR:
            raise unexpected(field, "a user's name")
        if user and not self.may_assert_users:
            raise ByokeepError(
                grpc.StatusCode.PERMISSION_DENIED,
                "USER_ASSERTION_NOT_ALLOWED",
                "this identity may not speak for users",
                field=field,
            )

    def require_key_owner(self, owner: str, field: str) -> None:
        """Refuse to change a key of an owner: a managed one is the operators', all others are the
        key-admins'. Raises TENANT_NOT_ALLOWED, USER_ASSERTION_NOT_ALLOWED."""
        managed = owner == OPERATOR
        role = options_pb2.TENANT_ROLE_OPERATOR if managed else options_pb2.TENANT_ROLE_KEY_ADMIN
        if role not in self.roles:
            raise not_allowed(self.tenant.id, [role])
        if not managed:
            self.require_user(owner, field)

    def require_user_keys(self, user: str) -> None:
        """Refuse keys of users where the plan lacks them. Raises PLAN_LACKS_FEATURE."""
        if user and user != OPERATOR:
            self.plan.require("user-keys")

    @property
    def may_read_users(self) -> bool:
        """Whether the caller may see what belongs to the tenant's users."""
        return self.may_assert_users or options_pb2.TENANT_ROLE_AUDITOR in self.roles

    def may_read(self, owner: str) -> bool:
        """Whether the caller may see what belongs to an owner; the tenant's own has none. Of keys,
        all see managed ones, and those who are operators alone no others."""
        if owner == OPERATOR:
            return True
        if self.roles == {options_pb2.TENANT_ROLE_OPERATOR}:
            return False
        return not owner or self.may_read_users

    def require_reader(self, owner: str, field: str) -> None:
        """Refuse what the caller may not see. Raises USER_ASSERTION_NOT_ALLOWED,
        TENANT_NOT_ALLOWED."""
        if not self.may_read(owner):
            self.require_user(owner, field)
            raise not_allowed(self.tenant.id, [options_pb2.TENANT_ROLE_KEY_ADMIN])


_current: contextvars.ContextVar[Rights] = contextvars.ContextVar("byokeep_rights")
_question: contextvars.ContextVar[Callable[[], Awaitable[None]]] = contextvars.ContextVar(
    "byokeep_question"
)


def current() -> Rights:
    """Return the rights of the caller of the RPC that is being handled."""
    return _current.get()


async def again() -> Rights:
    """Return the caller's rights as they are now: a stream outlives those that it began with.

    Raises ByokeepError, as `Authority.authorize` does.
    """
    await _question.get()()
    return current()


class Authority:
    """Decides from the caller table and the caller's class."""

    def __init__(self, store: TenantStore, plans: Plans) -> None:
        """Use the tenants' store, and the plans that there are."""
        self._store = store
        self._plans = plans

    async def authorize(
        self, caller: authz.Caller, access: options_pb2.Access, request: Any
    ) -> None:
        """Let a caller in with its rights, or refuse it.

        A tenant that doesn't exist looks like one that is not allowed, but for operators.

        Raises:
            ByokeepError: TENANT_NOT_ALLOWED, WRONG_STATE of a deleted tenant, NOT_FOUND,
                INVALID_FIELD.
        """
        _question.set(lambda: self.authorize(caller, access, request))
        tenant = tenant_of(request)
        found = await self._store.rights(tenant, caller.spiffe_id)
        operator = options_pb2.CALLER_CLASS_OPERATOR in caller.classes
        creates = isinstance(request, tenant_pb2.CreateTenantRequest)
        held = set(found.roles) if found else set()
        if operator:
            held.add(options_pb2.TENANT_ROLE_OPERATOR)
        # An operator may know what there is; a deleted tenant has no callers any more.
        if operator and found is None and not creates:
            raise ByokeepError(
                grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such tenant", resource="tenant"
            )
        gone = operator and found is not None and found.tenant.state is TenantState.DELETED
        # Of its keys nothing is left, for operators neither.
        if gone and options_pb2.TENANT_ROLE_KEY_ADMIN in access.roles:
            raise deleted()
        if not held.intersection(access.roles):
            raise deleted() if gone else not_allowed(tenant, access.roles)
        if found is not None:
            _current.set(
                Rights(
                    caller.spiffe_id,
                    found.tenant,
                    frozenset(held),
                    found.may_assert_users,
                    found.has_overrides,
                    found.has_repository_keys,
                    self._plans.of(found.tenant.plan),
                )
            )


def tenant_of(request: Any) -> str:
    """Return the tenant that a request names in its resource name. Raises INVALID_FIELD."""
    fields = request.DESCRIPTOR.fields_by_name
    if "settings" in fields:
        field, value = "settings.name", request.settings.name
    else:
        # A method with roles and without such a field fails here: nobody gets in by omission.
        field = next(name for name in ("parent", "name", "tenant") if name in fields)
        value = getattr(request, field)
    match = _TENANT.fullmatch(value)
    if match is None:
        raise ByokeepError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            f"{field}: tenants/TENANT expected",
            field=field,
            rule="resource_name",
        )
    return match[1]


def not_allowed(tenant: str, roles: Iterable[options_pb2.TenantRole.ValueType]) -> ByokeepError:
    """Return the refusal of what takes one of some roles."""
    wanted = sorted(
        options_pb2.TenantRole.Name(role).removeprefix("TENANT_ROLE_").lower().replace("_", "-")
        for role in roles
    )
    return ByokeepError(
        grpc.StatusCode.PERMISSION_DENIED,
        "TENANT_NOT_ALLOWED",
        f"this identity may not do that for the tenant; it takes the role {' or '.join(wanted)}",
        tenant=tenant,
        roles=",".join(wanted),
    )
