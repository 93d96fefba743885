"""The states of things, by the short names of their proto enums: so they stand in the database.

SQL text writes them out; a test holds every one of those to these.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final


class TenantState(StrEnum):
    """What a tenant may do."""

    ACTIVE = "ACTIVE"
    SUSPENDED = "SUSPENDED"
    DELETED = "DELETED"


class ReviewState(StrEnum):
    """How far a review is."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


#: A review in one of these has ended.
TERMINAL: Final = frozenset({ReviewState.COMPLETED, ReviewState.FAILED, ReviewState.CANCELLED})
#: A review in one of these goes on.
OPEN: Final = frozenset(ReviewState) - TERMINAL


class AttemptState(StrEnum):
    """How far an attempt is. FENCED: its worker fell silent."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    FENCED = "FENCED"


class AttemptKind(StrEnum):
    """What an attempt is for: a review, or a provider's word on a staged version of a key, or on
    one that serves."""

    REVIEW = "REVIEW"
    VALIDATION = "VALIDATION"
    CHECK = "CHECK"


class Verdict(StrEnum):
    """What a provider says of a key."""

    UNSPECIFIED = "UNSPECIFIED"
    VALID = "VALID"
    INVALID = "INVALID"
    RESTRICTED = "RESTRICTED"
    QUOTA_EXHAUSTED = "QUOTA_EXHAUSTED"
    UNREACHABLE = "UNREACHABLE"


class Action(StrEnum):
    """What keyvault is to be told after a verdict."""

    NONE = ""
    PROMOTE = "PROMOTE"
    DESTROY = "DESTROY"


class Fallback(StrEnum):
    """Why a review runs on another model than its settings chose."""

    NONE = ""
    NOT_USABLE = "NOT_USABLE"
    NOT_FOUND = "NOT_FOUND"


class Priority(IntEnum):
    """Which of a tenant's reviews come first."""

    INTERACTIVE = 0
    BATCH = 1


class Reason(StrEnum):
    """Why an attempt failed, or a review failed or waits."""

    KEY_REJECTED = "KEY_REJECTED"
    KEY_RESTRICTED = "KEY_RESTRICTED"
    QUOTA_EXHAUSTED = "QUOTA_EXHAUSTED"
    RATE_LIMITED = "RATE_LIMITED"
    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    BAD_REQUEST = "BAD_REQUEST"
    BAD_RESPONSE = "BAD_RESPONSE"
    REFUSED = "REFUSED"
    NETWORK = "NETWORK"
    AMBIGUOUS = "AMBIGUOUS"
    LEASE_REFUSED = "LEASE_REFUSED"
    KEY_REVOKED = "KEY_REVOKED"
    CHILD_LOST = "CHILD_LOST"
    RUNNER_UNAVAILABLE = "RUNNER_UNAVAILABLE"
    TIMEOUT = "TIMEOUT"
    INTERNAL = "INTERNAL"
    CONTENT_UNREADABLE = "CONTENT_UNREADABLE"
    KEYVAULT_UNAVAILABLE = "KEYVAULT_UNAVAILABLE"
    DAILY_LIMIT = "DAILY_LIMIT"
    RUNNERS_FULL = "RUNNERS_FULL"
    LEASE_CAP = "LEASE_CAP"
    TENANT_SUSPENDED = "TENANT_SUSPENDED"
    KEY_NEEDS_REKEY = "KEY_NEEDS_REKEY"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    REGION_REFUSED = "REGION_REFUSED"
