"""A connection to byokeep: typed stubs over mutual TLS, and sealing.

    with byokeep.connect() as connection:
        connection.keys.ListKeys(ListKeysRequest(parent=connection.parent))

Channels open when they are first used, and follow the files of the certificate and its key; the
trust bundle is read once. UNAVAILABLE is retried by the channel with
identical bytes; every mutation carries a request id (`new_request_id`), so that a
repetition changes nothing more.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import grpc

from byokeep import names, sealing
from byokeep.identity import Followed, IdentityError, Pem, TlsFiles, checked
from byokeep.keyshape import check_key
from byokeep.keyvault.v1 import admin_pb2_grpc, audit_pb2_grpc, custody_pb2
from byokeep.orchestrator.v1 import (
    key_pb2,
    key_pb2_grpc,
    review_pb2_grpc,
    settings_pb2_grpc,
    tenant_pb2_grpc,
)
from byokeep.profile import Endpoint, Profile, ProfileError, TrustBundle, load_profile, load_trust
from byokeep.transport import following_channel

DEADLINE_SECONDS = 20.0
"""Deadline of a unary call that is made without one."""


def new_request_id() -> str:
    """Return a fresh id for one mutation; a retry of that mutation uses it again."""
    return uuid.uuid4().hex


def connect(
    profile: str | Profile | None = None,
    *,
    config: Path | None = None,
    tenant: str | None = None,
    orchestrator: str | None = None,
    orchestrator_name: str = "",
    keyvault: str | None = None,
    keyvault_name: str = "",
    tls: TlsFiles | None = None,
    trust: TrustBundle | Path | None = None,
) -> Connection:
    """Return a connection; nothing is dialled before the first call.

    Either by a profile (its name, or a `Profile`; by default the config file's own),
    or by addresses (`host:port`), the DNS names that the certificates must have, the
    caller's TLS files and the trust bundle. `tenant` overrides the profile's.

    Raises:
        ProfileError: a client file is missing or wrong, or the arguments don't fit.
    """
    if orchestrator is not None:
        if profile is not None or tls is None or trust is None or not orchestrator_name:
            raise ProfileError(
                "an explicit connection needs orchestrator, orchestrator_name, tls and trust,"
                " and no profile"
            )
        bundle = load_trust(trust) if isinstance(trust, Path) else trust
        chosen = Profile(
            name="",
            orchestrator=Endpoint(orchestrator, orchestrator_name),
            keyvault=Endpoint(keyvault, keyvault_name) if keyvault else None,
            certificate=tls.certificate,
            key=tls.key,
            trust=TrustBundle(
                bundle.deployment,
                tls.ca.read_bytes(),
                bundle.intake_signing_keys,
                bundle.audit_log_keys,
            ),
        )
    else:
        chosen = profile if isinstance(profile, Profile) else load_profile(profile, config)
    return Connection(chosen, tenant or chosen.tenant)


class Connection:
    """The services as one identity sees them. A context manager; `close` ends it."""

    def __init__(self, profile: Profile, tenant: str = "") -> None:
        """Keep the profile; open nothing yet."""
        self.profile = profile
        self.trust = profile.trust
        self._tenant = tenant
        self._channels: list[grpc.Channel] = []

    @property
    def tenant(self) -> str:
        """Return the tenant's id. Raises ProfileError where none is set."""
        if not self._tenant:
            raise ProfileError("no tenant is chosen", "--tenant NAME, or `tenant` in the profile")
        return self._tenant

    @property
    def parent(self) -> str:
        """Return `tenants/{tenant}`. Raises ProfileError where none is set."""
        return names.tenant_name(self.tenant)

    @cached_property
    def tenants(self) -> tenant_pb2_grpc.TenantServiceStub:
        """Return the orchestrator's tenants."""
        return tenant_pb2_grpc.TenantServiceStub(self._orchestrator)

    @cached_property
    def callers(self) -> tenant_pb2_grpc.CallerServiceStub:
        """Return the orchestrator's callers."""
        return tenant_pb2_grpc.CallerServiceStub(self._orchestrator)

    @cached_property
    def keys(self) -> key_pb2_grpc.KeyServiceStub:
        """Return the orchestrator's keys."""
        return key_pb2_grpc.KeyServiceStub(self._orchestrator)

    @cached_property
    def reviews(self) -> review_pb2_grpc.ReviewServiceStub:
        """Return the orchestrator's reviews."""
        return review_pb2_grpc.ReviewServiceStub(self._orchestrator)

    @cached_property
    def settings(self) -> settings_pb2_grpc.SettingsServiceStub:
        """Return the orchestrator's settings."""
        return settings_pb2_grpc.SettingsServiceStub(self._orchestrator)

    @cached_property
    def audit(self) -> audit_pb2_grpc.AuditServiceStub:
        """Return keyvault's audit log. Raises ProfileError without a keyvault address."""
        return audit_pb2_grpc.AuditServiceStub(self._keyvault)

    @cached_property
    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        """Return keyvault's administration. Raises ProfileError without a keyvault address."""
        return admin_pb2_grpc.AdminServiceStub(self._keyvault)

    def seal(
        self,
        provider: str,
        key_text: str,
        key_id: str,
        operation: Literal["add", "rotate"],
        request_id: str,
        owner: str = "",
    ) -> custody_pb2.SealedKey:
        """Seal a provider key to keyvault's newest intake key.

        The orchestrator relays the intake statement and can't make one: it is believed
        only with the signature of a key that the trust bundle pins.

        Raises:
            KeyFormatError: the text can't be a key of that provider.
            UntrustedIntakeKeyError: the statement is not to be believed; nothing was sealed.
            grpc.RpcError: the statement could not be had.
        """
        check_key(provider, key_text)
        answer = self.keys.GetIntakeKey(
            key_pb2.GetIntakeKeyRequest(parent=self.parent, suite=sealing.SUITE)
        )
        statement = sealing.verify_statement(
            answer.statement,
            deployment=self.trust.deployment,
            pinned=self.trust.intake_signing_keys,
            now=datetime.datetime.now(datetime.UTC),
        )
        # A relay must not choose a weaker suite by passing on another genuine statement.
        if statement.suite != sealing.SUITE:
            raise sealing.UntrustedIntakeKeyError(
                "intake statement refused: it is for another suite than was asked for"
            )
        context = sealing.SealContext(
            tenant=self.tenant,
            owner=owner,
            provider=provider,
            key_id=key_id,
            operation=operation,
            request_id=request_id,
        )
        return sealing.seal_key(key_text, context, statement)

    def close(self) -> None:
        """Close the channels that were opened."""
        while self._channels:
            self._channels.pop().close()

    def __enter__(self) -> Connection:
        """Return the connection itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    @cached_property
    def _orchestrator(self) -> grpc.Channel:
        return self._open(self.profile.orchestrator)

    @cached_property
    def _keyvault(self) -> grpc.Channel:
        if self.profile.keyvault is None:
            raise ProfileError(
                "this needs keyvault's own edge, and the profile has no keyvault address",
                "set `keyvault` and `keyvault_name` in the profile; auditors and operators have it",
            )
        return self._open(self.profile.keyvault)

    def _open(self, endpoint: Endpoint) -> grpc.Channel:
        identity = Followed((self.profile.certificate, self.profile.key), self._identity)
        channel = following_channel(
            endpoint.address, endpoint.server_name, identity, self.profile.proxy
        )
        self._channels.append(channel)
        return grpc.intercept_channel(channel, _Deadline())

    def _identity(self) -> Pem:
        try:
            return checked(Pem(*self.profile.read_identity(), ca=self.trust.ca))
        except IdentityError as error:
            raise ProfileError(f"the profile's certificate and key: {error}") from None


class _Deadline(grpc.UnaryUnaryClientInterceptor):
    """Gives every unary call a deadline."""

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        if client_call_details.timeout is None:
            client_call_details = client_call_details._replace(timeout=DEADLINE_SECONDS)
        return continuation(client_call_details, request)
