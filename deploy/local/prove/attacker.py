"""What the attacker holds: every certificate, signing key and password of the stack.

No real one has so much. Each attack says which part of it is used, so that what stops
it is not that something was missing.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import secrets
import string
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from byokeep import sealing
from byokeep.client import Connection, connect
from byokeep.ids import new_id
from byokeep.keyvault.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    custody_pb2,
    custody_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from byokeep.names import key_name, provider_value, tenant_name
from byokeep.profile import load_trust
from byokeep.transport import channel_options
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.emulator.control import EmulatorControl
from deploy.local.material import DEPLOYMENT, ROLES, SERVER_NAMES, make_grant_key
from deploy.local.pki import Identity
from deploy.local.prove.attack import NotShownError
from deploy.local.prove.customer import Customer
from deploy.local.prove.forge import Child, Victim, grant_for, signed
from deploy.local.supervisor import LocalStack

SECONDS = 30.0
_ACTOR = "make prove"
_PREFIXES = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
_LETTERS = string.ascii_letters + string.digits

Seal = Callable[[str, sealing.SealContext, custody_pb2.IntakeStatement], custody_pb2.SealedKey]


def fresh_key(provider: str = "openai") -> str:
    """Return a random key of the provider's shape, which nothing else holds."""
    return _PREFIXES[provider] + "".join(secrets.choice(_LETTERS) for _ in range(44))


class Attacker:
    """Speaks to a stack as anyone, and writes to its databases. A context manager."""

    def __init__(self, stack: LocalStack) -> None:
        """Attack a stack that serves."""
        self.stack = stack
        self.state = stack.state
        self._resources = ExitStack()
        self._channels: dict[Path | None, grpc.Channel] = {}

    def __enter__(self) -> Self:
        """Return the attacker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what was opened."""
        self.hang_up()
        self._resources.close()

    # Identities and channels

    def loot(self, name: str) -> Path:
        """Return a path in the attacker's own folder, below the stack's."""
        folder = self.state.run / "attacker"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / name

    def identity(self, name: str) -> Identity:
        """The certificate of a service, or of a client's role."""
        return Identity.at((self.state.client if name in ROLES else self.state.pki) / name)

    @cached_property
    def grant_key(self) -> Ed25519PrivateKey:
        """The orchestrator's grant signing key."""
        pem = make_grant_key(self.state).read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        if not isinstance(key, Ed25519PrivateKey):
            raise TypeError("the grant signing key is not Ed25519")
        return key

    def keyvault(self, identity: Identity | None) -> grpc.Channel:
        """Return a channel to keyvault; None presents no certificate."""
        key = identity.certificate if identity else None
        if key not in self._channels:
            credentials = grpc.ssl_channel_credentials(
                (self.state.pki / "ca.pem").read_bytes(),
                identity.key.read_bytes() if identity else None,
                identity.certificate.read_bytes() if identity else None,
            )
            options = channel_options(SERVER_NAMES["keyvault"])
            address = self.stack.topology.address("keyvault")
            self._channels[key] = grpc.secure_channel(address, credentials, options=options)
        return self._channels[key]

    def hang_up(self) -> None:
        """Close the channels: what is called next connects anew."""
        while self._channels:
            self._channels.popitem()[1].close()

    def leases(self, identity: Identity | None) -> lease_pb2_grpc.LeaseServiceStub:
        """keyvault's leases, as somebody."""
        return lease_pb2_grpc.LeaseServiceStub(self.keyvault(identity))

    @property
    def custody(self) -> custody_pb2_grpc.CustodyServiceStub:
        """keyvault's custody, as the orchestrator."""
        return custody_pb2_grpc.CustodyServiceStub(self.keyvault(self.identity("orchestrator")))

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        """keyvault's administration, as the operator."""
        return admin_pb2_grpc.AdminServiceStub(self.keyvault(self.identity("operator")))

    def connect(self, role: str = "developer") -> Connection:
        """Connect as a client of a role. The caller closes it."""
        profile = "demo" if role == "developer" else role
        return connect(profile, config=self.state.config)

    @cached_property
    def emulator(self) -> EmulatorControl:
        """The control of what plays the providers."""
        ports = self.stack.emulator_ports
        if ports is None:
            raise RuntimeError("this stack has no emulator")
        return self._resources.enter_context(EmulatorControl(f"http://127.0.0.1:{ports[1]}"))

    # Keys

    def new_tenant(self) -> str:
        """Make a tenant of its own for an attack, in keyvault."""
        tenant = f"prove-{secrets.token_hex(6)}"
        self.admin.CreateTenantKey(
            admin_pb2.CreateTenantKeyRequest(tenant=tenant_name(tenant), request_id=new_id("req")),
            timeout=SECONDS,
        )
        return tenant

    def statement(self) -> custody_pb2.IntakeStatement:
        """Return the newest intake key, verified as a client does."""
        answer = self.custody.GetIntakeKey(
            custody_pb2.GetIntakeKeyRequest(suite=sealing.SUITE), timeout=SECONDS
        )
        return sealing.verify_statement(
            answer.statement,
            deployment=DEPLOYMENT,
            pinned=load_trust(self.state.trust).intake_signing_keys,
            now=datetime.datetime.now(datetime.UTC),
        )

    def stage_request(
        self,
        tenant: str,
        plaintext: str,
        *,
        provider: str = "openai",
        key_id: str = "",
        operation: str = "add",
        seal: Seal = sealing.seal_key,
    ) -> custody_pb2.StageKeyRequest:
        """A request that stages a key; ``seal`` replaces how its owner seals it."""
        context = sealing.SealContext(
            tenant, "", provider, key_id or new_id("key"), operation, new_id("req")
        )
        return custody_pb2.StageKeyRequest(
            name=key_name(tenant, context.key_id),
            provider=provider_value(provider),
            display_name="default",
            operation=custody_pb2.IntakeOperation.Value(f"INTAKE_OPERATION_{operation.upper()}"),
            sealed_key=seal(plaintext, context, self.statement()),
            request_id=context.request_id,
            actor=_ACTOR,
        )

    def stage(
        self,
        tenant: str,
        *,
        provider: str = "openai",
        key_id: str = "",
        operation: str = "add",
    ) -> Victim:
        """Stage a fresh key as its owner does."""
        plaintext = fresh_key(provider)
        request = self.stage_request(
            tenant, plaintext, provider=provider, key_id=key_id, operation=operation
        )
        answer = self.custody.StageKey(request, timeout=SECONDS)
        return Victim(
            tenant,
            answer.key.name.rpartition("/")[2],
            answer.key.versions[-1].version,
            provider,
            plaintext,
        )

    def active(self, tenant: str = "", *, provider: str = "openai") -> Victim:
        """Stage a fresh key and make it ACTIVE; by default for a tenant of its own."""
        victim = self.stage(tenant or self.new_tenant(), provider=provider)
        self.custody.PromoteKeyVersion(
            custody_pb2.PromoteKeyVersionRequest(
                name=victim.name,
                version=victim.version,
                request_id=new_id("req"),
                actor=_ACTOR,
            ),
            timeout=SECONDS,
        )
        return victim

    def revoke(self, victim: Victim) -> None:
        """Revoke a key as its owner does."""
        self.custody.RevokeKey(
            custody_pb2.RevokeKeyRequest(name=victim.name, request_id=new_id("req"), actor=_ACTOR),
            timeout=SECONDS,
        )

    def destroy(self, victim: Victim) -> None:
        """Destroy a key as its owner does."""
        self.custody.DestroyKey(
            custody_pb2.DestroyKeyRequest(name=victim.name, request_id=new_id("req"), actor=_ACTOR),
            timeout=SECONDS,
        )

    @cached_property
    def victim(self) -> Victim:
        """A key that attacks share which leave it as it is; leased and opened once."""
        victim = self.active()
        self.check_that_it_leases(victim)
        return victim

    @cached_property
    def customer(self) -> Customer:
        """A customer whose key went through the whole stack, and ran a review."""
        return Customer.new(self.connect, fresh_key())

    # Leases

    def request(self, victim: Victim, child: Child, **fields: Any) -> lease_pb2.LeaseKeyRequest:
        """A grant with the orchestrator's signature, and what redeems it."""
        return signed(grant_for(victim, child, **fields), child, self.grant_key)

    def lease(self, request: lease_pb2.LeaseKeyRequest) -> lease_pb2.LeaseKeyResponse:
        """Ask for a lease as the runner. Raises grpc.RpcError."""
        return self.leases(self.identity("runner")).LeaseKey(request, timeout=SECONDS)

    def take(self, victim: Victim, **fields: Any) -> lease_pb2.LeaseKeyResponse:
        """Lease a victim's key with a fresh grant and child. Raises grpc.RpcError."""
        return self.take_as(self.identity("runner"), victim, **fields)

    def take_as(
        self, identity: Identity | None, victim: Victim, **fields: Any
    ) -> lease_pb2.LeaseKeyResponse:
        """The same as somebody else; None presents no certificate."""
        request = self.request(victim, Child(), **fields)
        return self.leases(identity).LeaseKey(request, timeout=SECONDS)

    def check_that_it_leases(self, victim: Victim) -> None:
        """Lease the key honestly and open it: an attack that is stopped where nothing works
        shows nothing. Raises NotShownError, grpc.RpcError."""
        child = Child()
        request = self.request(victim, child)
        lease = self.lease(request)
        if child.open(request, lease) != victim.plaintext:
            raise NotShownError("the runner's own lease opened to another key")
        self.release(lease)

    def release(self, lease: lease_pb2.LeaseKeyResponse) -> None:
        """Give a lease back."""
        self.leases(self.identity("runner")).ReleaseLease(
            lease_pb2.ReleaseLeaseRequest(
                lease_id=lease.lease_id, outcome=lease_pb2.LEASE_OUTCOME_COMPLETED
            ),
            timeout=SECONDS,
        )

    # Databases, audit, the command

    def sql(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement on keyvault's database as PostgreSQL's superuser."""
        with self.stack.postgres.connect("keyvault") as session:
            cursor = session.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def events(self, chain: str, key_id: str = "") -> list[audit_pb2.AuditEvent]:
        """Return a chain's events, as the auditor."""
        stub = audit_pb2_grpc.AuditServiceStub(self.keyvault(self.identity("auditor")))
        request = audit_pb2.ListEventsRequest(parent=chain, key_id=key_id, page_size=1000)
        return list(stub.ListEvents(request, timeout=SECONDS).events)

    def byokeep(self, *line: str) -> tuple[int, str]:
        """Run the command in this process; return its exit code and all that it said."""
        from byokeep.cli.app import run

        os.environ["BYOKEEP_CONFIG"] = str(self.state.config)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = run(line)
        return status, said.getvalue()
