"""What `byokeep doctor` checks: client files, both endpoints, the clock, the roles."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from byokeep import sealing
from byokeep.cli.admin.tenants import out_of_service, tenant_state, way_out
from byokeep.cli.base.errors import CLOCK_HINT, unreachable
from byokeep.cli.base.identity import Identity, read_identity
from byokeep.cli.base.session import Session
from byokeep.cli.base.text import clean, count
from byokeep.common.v1 import options_pb2
from byokeep.errors import UNANSWERED, error_info
from byokeep.keyvault.v1 import admin_pb2, audit_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2
from byokeep.profile import Endpoint, Profile, ProfileError

_SECONDS = 5.0
_SOON = datetime.timedelta(hours=1)
# Never reviewed: a dry run is refused before it is looked at, where the role is lacking.
_TINY_DIFF = b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `ok` is None where it is neither right nor wrong."""

    what: str
    ok: bool | None
    found: str
    remedy: str = ""


def all_checks(session: Session) -> Iterator[Check]:
    """Yield the checks in order; what can't be looked at any more is left out."""
    try:
        profile = session.profile
    except ProfileError as error:
        yield Check("configuration", False, str(error), error.hint)
        return
    yield Check("configuration", True, f"profile {profile.name} of {profile.source}")
    yield _trust(profile)
    try:
        identity = read_identity(profile)
    except ProfileError as error:
        yield Check("identity", False, str(error), error.hint)
        return
    yield from _identity(identity)
    if not identity.key_fits:
        return
    connection = session.connection
    listing = tenant_pb2.ListTenantsRequest(page_size=1)
    reached = _endpoint(
        session,
        "orchestrator",
        profile.orchestrator,
        lambda: connection.tenants.ListTenants(listing, timeout=_SECONDS),
    )
    yield reached
    vault = None
    if profile.keyvault is not None:
        vault = _endpoint(
            session,
            "keyvault",
            profile.keyvault,
            lambda: connection.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=_SECONDS),
        )
        yield vault
    else:
        yield Check("keyvault", None, "no address: audit and admin can't be used with this profile")
    if reached.ok:
        tenant = _tenant(session, identity)
        yield tenant
        yield _intake(session)
        if vault is not None and vault.ok:
            yield from _leases(session, in_service=tenant.ok is True)
        yield from _roles(session, keyvault=bool(vault and vault.ok))
        if vault and vault.ok:
            yield from _audit_key(session)


def _trust(profile: Profile) -> Check:
    trust = profile.trust
    found = (
        f"deployment {trust.deployment}; pinned:"
        f" {count(len(trust.intake_signing_keys), 'intake signing key')}"
        f" and {count(len(trust.audit_log_keys), 'audit log key')}"
    )
    if trust.intake_signing_keys and trust.audit_log_keys:
        return Check("trust bundle", True, found)
    return Check("trust bundle", False, found, "get trust.json again from whom you trust")


def _identity(identity: Identity) -> Iterator[Check]:
    yield Check("private key", True, "readable by its owner alone")
    now = datetime.datetime.now(datetime.UTC)
    left = identity.not_after - now
    found = f"{identity.spiffe_id or 'no SPIFFE ID'}, until {identity.not_after:%Y-%m-%d %H:%M} UTC"
    remedy = ""
    if not identity.spiffe_id:
        remedy = "it needs exactly one URI name, a SPIFFE ID: issue it again"
    elif not identity.key_fits:
        found, remedy = "the private key belongs to another certificate", "issue both again"
    elif not identity.issued_by_trusted_ca:
        found += "; none of the trust bundle's CAs issued it"
        remedy = "certificate and trust.json are of two deployments, or of two times: renew both"
    elif now < identity.not_before:
        start = f"{identity.not_before:%Y-%m-%d %H:%M} UTC"
        found = f"valid from {start} on, and it is {now:%Y-%m-%d %H:%M}"
        remedy = "set this machine's clock, or wait"
    elif left <= datetime.timedelta():
        found += f", and it is {now:%Y-%m-%d %H:%M}"
        remedy = "renew it (a local stack does at its start: make up), or set this machine's clock"
    elif left < _SOON:
        yield Check("certificate", None, f"{found}: it ends within the hour", "renew it")
        return
    yield Check("certificate", not remedy, found, remedy)


def _endpoint(session: Session, name: str, endpoint: Endpoint, call: Callable[[], object]) -> Check:
    """Whether a service is reached, as every command reaches it; any answer of its own will do."""
    what = f"{name} {endpoint.address}"
    way = " through the profile's proxy" if session.profile.proxy else ""
    try:
        call()
    except grpc.RpcError as error:
        info = error_info(error)
        if not info.reason and info.code in UNANSWERED:
            return Check(what, False, *unreachable(info, session.profile))
    return Check(what, True, f"answers{way}, with a certificate of {endpoint.server_name}")


def _tenant(session: Session, identity: Identity) -> Check:
    try:
        name = session.connection.tenant
        state = tenant_state(session, _SECONDS)
        what, remedy = out_of_service(name, state, identity.spiffe_id)
    except ProfileError as error:
        return Check("tenant", False, str(error), error.hint)
    except grpc.RpcError as error:
        return Check("tenant", False, _said(error), "an operator allows this identity")
    if what:
        return Check("tenant", False, f"{name}: {what}", remedy)
    return Check("tenant", True, name)


def _leases(session: Session, *, in_service: bool) -> Iterator[Check]:
    """Whether keyvault gives leases at all, and to the tenant; for operators, who may know."""
    connection, name = session.connection, session.connection.tenant
    try:
        status = connection.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=_SECONDS)
    except grpc.RpcError:
        return
    if not status.leases_allowed:
        reason = clean(status.refusal_reason)
        remedy = "look into it; then byokeep admin resume-leases --reason TEXT"
        yield Check("leases", False, f"refused to every tenant: {reason}", remedy)
    elif remedy := way_out(status, name):
        yield Check("leases", False, f"refused to tenant {name}: it is held", remedy)
    elif not in_service:
        yield Check("leases", None, f"none for tenant {name} as it is")
    else:
        yield Check("leases", True, f"given to tenant {name}")


def _intake(session: Session) -> Check:
    connection = session.connection
    request = key_pb2.GetIntakeKeyRequest(parent=connection.parent, suite=sealing.SUITE)
    try:
        answer = connection.keys.GetIntakeKey(request, timeout=_SECONDS)
        sealing.verify_statement(
            answer.statement,
            deployment=connection.trust.deployment,
            pinned=connection.trust.intake_signing_keys,
            now=datetime.datetime.now(datetime.UTC),
        )
    except grpc.RpcError as error:
        return Check("intake key, clock", None, f"not looked at: {_said(error)}")
    except sealing.ClockError as error:
        return Check("clock", False, str(error), CLOCK_HINT)
    except sealing.UntrustedIntakeKeyError as error:
        return Check("intake key", False, str(error), "do not add keys here")
    return Check("intake key, clock", True, "signed by a pinned key, and its hour is now")


def _audit_key(session: Session) -> Iterator[Check]:
    connection = session.connection
    request = audit_pb2.GetCheckpointRequest(parent=connection.parent)
    try:
        key_id = connection.audit.GetCheckpoint(request, timeout=_SECONDS).head.key_id
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.PERMISSION_DENIED:
            yield Check("audit log key", None, f"not looked at: {_said(error)}")
        return
    if key_id in connection.trust.audit_log_keys:
        yield Check("audit log key", True, f"{key_id} signs exports, and is pinned")
    else:
        found = f"{clean(key_id)} signs exports, and trust.json does not pin it"
        yield Check("audit log key", False, found, "get trust.json again from whom you trust")


def _roles(session: Session, *, keyvault: bool) -> Iterator[Check]:
    connection, parent = session.connection, session.connection.parent
    sample = review_pb2.ReviewInput(repository="doctor", diff=_TINY_DIFF)
    suite = options_pb2.HPKE_SUITE_X25519_V1
    probes: list[tuple[str, Callable[[], object]]] = [
        (
            "submitter: review",
            lambda: connection.reviews.DryRunReview(
                review_pb2.DryRunReviewRequest(parent=parent, input=sample), timeout=_SECONDS
            ),
        ),
        (
            "key-admin: add keys, set models",
            lambda: connection.keys.GetIntakeKey(
                key_pb2.GetIntakeKeyRequest(parent=parent, suite=suite), timeout=_SECONDS
            ),
        ),
        (
            "read settings and keys",
            lambda: connection.settings.GetSettings(
                settings_pb2.GetSettingsRequest(name=f"{parent}/settings"), timeout=_SECONDS
            ),
        ),
        (
            "auditor or operator: see callers",
            lambda: connection.callers.ListCallers(
                tenant_pb2.ListCallersRequest(parent=parent, page_size=1), timeout=_SECONDS
            ),
        ),
    ]
    if keyvault:
        probes += [
            (
                "auditor at keyvault",
                lambda: connection.audit.ListEvents(
                    audit_pb2.ListEventsRequest(parent=parent, page_size=1), timeout=_SECONDS
                ),
            ),
            (
                "operator at keyvault",
                lambda: connection.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=_SECONDS),
            ),
        ]
    for what, probe in probes:
        yield _role(what, probe)


def _role(what: str, probe: Callable[[], object]) -> Check:
    try:
        probe()
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.PERMISSION_DENIED:
            return Check(what, None, "no")
        if error.code() in UNANSWERED:
            return Check(what, False, _said(error))
    # Any other refusal comes after the question who is calling.
    return Check(what, True, "yes")


def _said(error: grpc.RpcError) -> str:
    info = error_info(error)
    if info.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return clean(info.message) if info.reason else info.code.name
