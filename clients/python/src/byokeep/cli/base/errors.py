"""Errors as people and scripts see them: a sentence, a hint, a reason, an exit code."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from byokeep.cli.base.fieldnames import said_of
from byokeep.cli.base.text import clean

if TYPE_CHECKING:
    import grpc

    from byokeep.errors import ErrorInfo
    from byokeep.profile import Profile


class Exit(IntEnum):
    """Exit codes of the command."""

    OK = 0
    FAIL_ON = 1
    INPUT = 2
    PERMISSION = 3
    KEY = 4
    UNAVAILABLE = 5
    INTEGRITY = 6
    REVIEW_FAILED = 7
    UNREAD = 8
    INTERRUPTED = 130
    READER_GONE = 141


BY_CODE: Mapping[str, Exit] = {
    "INVALID_ARGUMENT": Exit.INPUT,
    "NOT_FOUND": Exit.INPUT,
    "ALREADY_EXISTS": Exit.INPUT,
    "FAILED_PRECONDITION": Exit.INPUT,
    "ABORTED": Exit.INPUT,
    "OUT_OF_RANGE": Exit.INPUT,
    "PERMISSION_DENIED": Exit.PERMISSION,
    "UNAUTHENTICATED": Exit.PERMISSION,
    "UNAVAILABLE": Exit.UNAVAILABLE,
    "DEADLINE_EXCEEDED": Exit.UNAVAILABLE,
    "RESOURCE_EXHAUSTED": Exit.UNAVAILABLE,
    "CANCELLED": Exit.UNAVAILABLE,
    "UNIMPLEMENTED": Exit.UNAVAILABLE,
    "INTERNAL": Exit.UNAVAILABLE,
    "UNKNOWN": Exit.UNAVAILABLE,
    "DATA_LOSS": Exit.INTEGRITY,
}
"""Exit code of a gRPC status, where its reason has none of its own."""

BY_REASON: Mapping[str, Exit] = {
    "KEY_NEEDS_REKEY": Exit.KEY,
    "NO_ACTIVE_KEY": Exit.KEY,
    "UNDECRYPTABLE": Exit.KEY,
    "TENANT_NOT_ACTIVE": Exit.PERMISSION,
    "DATABASE_ROLLED_BACK": Exit.INTEGRITY,
    "INTAKE_UNTRUSTED": Exit.INTEGRITY,
}
"""Exit code of an ErrorReason that says more than its status."""

BY_FAILURE: Mapping[str, Exit] = {
    "KEY_REJECTED": Exit.KEY,
    "KEY_RESTRICTED": Exit.KEY,
    "QUOTA_EXHAUSTED": Exit.KEY,
    "KEY_REVOKED": Exit.KEY,
}
"""Exit code of a review's FailureReason; every other one is REVIEW_FAILED."""

A_PART = "a part of it: git diff main...HEAD -- . ':!*.lock' | byokeep review --diff -"
"""What is left to do with a diff that is too large."""

_OTHER_MODEL = "byokeep model list, then submit the diff again with --model PROVIDER/MODEL"

_FAILURE_HINTS: Mapping[str, str] = {
    "KEY_REJECTED": "byokeep key rotate {key}, then {retry}",
    "KEY_RESTRICTED": "give the key the scope at its provider, or byokeep key rotate {key}",
    "QUOTA_EXHAUSTED": "raise or pay the quota at the provider, then {retry}",
    "KEY_REVOKED": "byokeep key add PROVIDER, then submit the diff again",
    "MODEL_NOT_FOUND": "byokeep model list, then byokeep model set PROVIDER/MODEL",
    "DAILY_LIMIT": "byokeep limit show tells the ceiling; later, {retry}",
    "LEASE_REFUSED": "byokeep doctor tells an operator whether the tenant is held; then {retry}",
    "AMBIGUOUS": "look at the provider's bill, then {retry}",
    "BAD_REQUEST": _OTHER_MODEL,
    "REFUSED": _OTHER_MODEL,
    "CONTEXT_TOO_LONG": A_PART,
    "REGION_REFUSED": "once who runs byokeep has mended that: {retry}",
}

_WAIT_HINTS: Mapping[str, str] = {
    "KEY_NEEDS_REKEY": "byokeep key rotate {key}",
    "TENANT_SUSPENDED": "byokeep doctor says which",
}
_OTHER_KEY = (
    "name another with --key; byokeep key assign and unassign --repo PATTERN change a repository's"
)
_DAMAGED = (
    "an operator finds out who changed it, and puts it back: byokeep admin status names every"
    " tenant of which that is so"
)

HINTS: Mapping[str, str] = {
    "KEY_EXISTS": "byokeep key rotate {key}; of a revoked one: byokeep key destroy {key}, then add",
    "KEY_NEEDS_REKEY": "byokeep key rotate {key}",
    "UNDECRYPTABLE": "byokeep key rotate {key}",
    "NO_ACTIVE_KEY": "byokeep key add {provider}{user}",
    "NO_MODEL": "byokeep model list, then byokeep model set PROVIDER/MODEL, or --model",
    "CONTENT_EXPIRED": "byokeep review list still shows the review",
    "MODEL_INVALID": "byokeep model list",
    "MODEL_NOT_USABLE": "byokeep model list; byokeep key check {key} asks the provider anew",
    "CALLER_NOT_ALLOWED": "byokeep doctor shows which roles this identity has",
    "TENANT_NOT_ALLOWED": "an operator allows it: byokeep caller allow SPIFFE_ID --role ROLE"
    " --tenant TENANT; byokeep doctor shows your SPIFFE ID and roles",
    "USER_ASSERTION_NOT_ALLOWED": "an operator allows it: byokeep caller allow SPIFFE_ID"
    " --role ROLE --assert-users --tenant TENANT",
    "TENANT_KEY_MISSING": "byokeep admin list-keks shows the tenants; an operator creates one:"
    " byokeep tenant create TENANT",
    "TENANT_EXISTS": "byokeep tenant list",
    "TENANT_NOT_ACTIVE": "byokeep status says what an operator does about it",
    "PLAN_LACKS_FEATURE": "an operator changes the plan: byokeep tenant set-plan TENANT PLAN",
    "REQUEST_ID_CONFLICT": "leave --request-id out, or use a new one",
    "ETAG_MISMATCH": "somebody else changed it meanwhile: look again, then repeat",
    "KEY_LIMIT": "byokeep key list, then byokeep key destroy KEY of those that are not needed",
    "ROW_TAMPERED": "byokeep key rotate {key}; an operator looks who writes keyvault's database",
    "ROLLED_BACK": _DAMAGED,
    "STATE_TAMPERED": _DAMAGED,
    "DATABASE_ROLLED_BACK": "an operator looks into it, then: byokeep admin resume-leases"
    " --reason TEXT",
    "DIFF_TOO_LARGE": f"{A_PART}; byokeep limit show tells the ceiling",
    "TOO_MANY_CALLS": "byokeep review --dry-run shows the calls; byokeep limit show tells whose"
    " ceiling it is",
    "DAILY_LIMIT": "byokeep limit show tells the ceilings",
    "QUEUE_FULL": "byokeep review list --state queued",
    "INTAKE_UNTRUSTED": "nothing was sealed and nothing left this machine; get trust.json again"
    " from whom you trust, and compare",
    "INTAKE_KEY_EXPIRED": "repeat the command: it asks for a new intake key",
}
_OF_STATES: Mapping[tuple[str, str], str] = {
    (
        "NO_ACTIVE_KEY",
        "MANAGED",
    ): "byokeep key add {provider} --managed --tenant TENANT, by an operator",
    ("NO_ACTIVE_KEY", "PENDING"): "byokeep key show {key} says how far that is",
    ("NO_ACTIVE_KEY", "REVOKED"): _OTHER_KEY,
    ("NO_ACTIVE_KEY", "DESTROYED"): _OTHER_KEY,
}
_OPERATOR_HINT = "takes an operator of the deployment"
_MISSING_HINTS: Mapping[str, str] = {
    "provider key": "byokeep key list shows what this tenant has",
    "review": "byokeep review list shows what this tenant has",
    "tenant": "byokeep tenant list shows those that there are, byokeep tenant create makes one",
}
_CODE_HINTS: Mapping[str, str] = {
    "UNAVAILABLE": "byokeep doctor checks configuration, certificates and both endpoints",
    "DEADLINE_EXCEEDED": "byokeep doctor checks configuration, certificates and both endpoints",
    "UNAUTHENTICATED": "byokeep doctor checks the certificate that you present",
}
_USER = re.compile(r"[A-Za-z0-9._@+-]{1,128}")
_PLACEHOLDERS = {
    "key": re.compile(r"key_[0-9a-z]{26}"),
    "provider": re.compile(r"openai|anthropic|gemini"),
}


@dataclass(slots=True, eq=False)
class CliError(Exception):
    """An error whose text is fit to be shown as it stands."""

    message: str
    hint: str = ""
    exit_code: Exit = Exit.INPUT
    reason: str = ""
    code: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    details: str = ""

    def __str__(self) -> str:
        """Return the sentence."""
        return self.message

    def to_dict(self) -> dict[str, object]:
        """Return what `--json` prints on stderr; without what there is not."""
        optional = {
            "reason": self.reason,
            "code": self.code,
            "hint": self.hint,
            "metadata": dict(self.metadata),
        }
        given = {name: value for name, value in optional.items() if value}
        return {"error": {"message": self.message, "exit": int(self.exit_code), **given}}


def from_rpc(error: grpc.RpcError, profile: Profile | None) -> CliError:
    """Return a failed call as an error to show; the profile names the endpoint that failed."""
    from byokeep.errors import error_info

    info = error_info(error)
    code = info.code.name
    reason = info.reason.removeprefix("ERROR_REASON_")
    metadata = {clean(name): clean(value) for name, value in info.metadata.items()}
    message = clean(info.message) if reason else _transport_message(info, profile)
    if reason == "INVALID_FIELD":
        message = said_of(metadata.get("field", ""), message)
    return CliError(
        message=message,
        hint=_hint(reason, metadata) or _CODE_HINTS.get(code, ""),
        exit_code=BY_REASON.get(reason) or BY_CODE.get(code, Exit.UNAVAILABLE),
        reason=reason,
        code=code,
        metadata=metadata,
        details=f"{code}: {clean(info.message)}",
    )


def failure_exit(failure: str) -> Exit:
    """Return the exit code of a failed review; `failure` is a FailureReason's short name."""
    return BY_FAILURE.get(failure, Exit.REVIEW_FAILED)


def failure_hint(failure: str, key_id: str, review_id: str, *, managed: bool = False) -> str:
    """Return what to do about a failed review; `managed`: its key is the operator's to mend."""
    retry = f"byokeep review retry {review_id}"
    if managed and failure in BY_FAILURE:
        return f"once the operator has mended the key, {retry}"
    return _FAILURE_HINTS.get(failure, retry).format(key=key_id or "KEY", retry=retry)


def wait_hint(reason: str, key_id: str, *, managed: bool = False) -> str:
    """Return what ends a review's wait, where somebody can end it; else an empty text."""
    if managed and "{key}" in _WAIT_HINTS.get(reason, ""):
        return ""
    return _WAIT_HINTS.get(reason, "").format(key=key_id or "KEY")


def _hint(reason: str, metadata: Mapping[str, str]) -> str:
    if reason == "TENANT_NOT_ALLOWED" and metadata.get("roles") == "operator":
        return _OPERATOR_HINT
    if reason == "NOT_FOUND":
        return _MISSING_HINTS.get(metadata.get("resource", ""), "")
    # A command to run is never taken from a server's text: only ids of a known form are.
    values = {}
    for name, pattern in _PLACEHOLDERS.items():
        value = metadata.get(name, "")
        values[name] = value if pattern.fullmatch(value) else name.upper()
    user = metadata.get("user", "")
    values["user"] = f" --user {user}" if _USER.fullmatch(user) else ""
    hint = _OF_STATES.get((reason, metadata.get("state", ""))) or HINTS.get(reason, "")
    return hint.format(**values)


def unreachable(info: ErrorInfo, profile: Profile | None) -> tuple[str, str]:
    """Return why a service could not be reached, and what helps, from gRPC's own text."""
    way = " (through the profile's proxy)" if profile and profile.proxy else ""
    if info.code.name == "DEADLINE_EXCEEDED":
        return f"did not answer in time{way}", "is it running? does a firewall let you through?"
    for pattern, sentence, remedy in _UNREACHABLE:
        if re.search(pattern, info.message):
            now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
            return sentence.format(now=now) + way, remedy
    if own := _own_certificate(profile):
        return "ends the connection, for " + own, _CLOCK
    return f"does not answer{way}", "is it running? make up"


#: What helps where an intake key's hour is not this machine's.
CLOCK_HINT = "set this machine's clock; if it is right, the service passes on an old intake key"
_CLOCK = "set this machine's clock; if it is right, the certificate has to be renewed"
# In gRPC's words: what they mean, and what helps.
_UNREACHABLE = (
    (
        "Hostname|Peer name",
        "presents the certificate of another service: the connection was refused",
        "its name in the profile and its certificate must agree; do not go on",
    ),
    (
        "certificate has expired",
        "presents a certificate that has expired by this machine's clock ({now})",
        _CLOCK,
    ),
    (
        "certificate is not yet valid",
        "presents a certificate that is not valid yet by this machine's clock ({now})",
        _CLOCK,
    ),
    (
        "Handshake read failed",
        "takes the connection, and says nothing on it",
        "it is stuck, or another program has that port",
    ),
    (
        "(?i)handshake|certificate|ssl",
        "and this client do not accept each other's certificates",
        "its certificate must be issued by a CA of trust.json, and yours by its; do not go on",
    ),
    (
        "(?i)DNS|name resolution|not found",
        "can't be found: its name does not resolve",
        "look at its address in the profile",
    ),
    (
        "HTTP proxy returned",
        "can't be reached: the proxy refuses to connect to it",
        "look at `proxy` in the profile",
    ),
    ("Connection refused", "can't be reached: the connection is refused", "is it running? make up"),
)


def _own_certificate(profile: Profile | None) -> str:
    """Say that the client's own certificate is not valid now: servers then only hang up."""
    from byokeep.cli.base.identity import read_identity
    from byokeep.profile import ProfileError

    if profile is None:
        return ""
    try:
        own = read_identity(profile)
    except ProfileError:
        return ""
    now = datetime.datetime.now(datetime.UTC)
    if own.not_before <= now <= own.not_after:
        return ""
    return (
        f"this client's certificate is valid from {own.not_before:%Y-%m-%d %H:%M} to"
        f" {own.not_after:%Y-%m-%d %H:%M} UTC, and this machine's clock says"
        f" {now:%Y-%m-%d %H:%M} UTC"
    )


def _transport_message(info: ErrorInfo, profile: Profile | None) -> str:
    code, text = info.code.name, clean(info.message)
    if code == "DEADLINE_EXCEEDED":
        return "the service did not answer in time"
    if code != "UNAVAILABLE":
        return text or f"the call failed: {code}"
    return f"{_endpoint(text, profile)} {unreachable(info, profile)[0]}"


def _endpoint(text: str, profile: Profile | None) -> str:
    if profile is None:
        return "the service"
    known = {"the orchestrator": profile.orchestrator, "keyvault": profile.keyvault}
    for name, endpoint in known.items():
        if endpoint is not None and endpoint.address in text:
            return f"{name} at {endpoint.address}"
    return f"the service (orchestrator: {profile.orchestrator.address})"
