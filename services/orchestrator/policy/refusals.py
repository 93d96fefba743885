"""Refusals that several RPCs share."""

from __future__ import annotations

import grpc

from services.common.errors import ByokeepError
from services.orchestrator.policy.states import TenantState


def unexpected(field: str, expected: str) -> ByokeepError:
    """Return the refusal of a field that holds something else than what is expected."""
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field}: {expected} expected",
        field=field,
        rule="expected",
    )


def above(field: str, most: int, whose: str) -> ByokeepError:
    """Return the refusal of a ceiling that is above the one over it."""
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field}: can be at most {most:,}, for {whose} allows no more",
        field=field,
        rule="ceiling",
        limit=str(most),
    )


def full(field: str, what: str, most: int) -> ByokeepError:
    """Return the refusal of one more of what there are as many of as may be."""
    return ByokeepError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"{field}: there are {most:,} {what} already, and no more are taken; take one away first",
        field=field,
        rule="ceiling",
        limit=str(most),
    )


def not_active(tenant: str, state: TenantState) -> ByokeepError:
    """Return the refusal of what is new for a tenant that is SUSPENDED or DELETED."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "TENANT_NOT_ACTIVE",
        f"the tenant is {state.lower()}",
        tenant=tenant,
        state=state,
    )


def deleted() -> ByokeepError:
    """Return the refusal of a change to a deleted tenant."""
    return ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_STATE",
        "the tenant is deleted, for good",
        state=TenantState.DELETED,
    )
