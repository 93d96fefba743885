"""The attacker, who is also the customers that he attacks: their keys, grants and leases."""

from __future__ import annotations

import datetime
import secrets
import string
from collections.abc import Callable
from functools import cached_property
from typing import Any

from byokeep import sealing
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2, custody_pb2, lease_pb2
from byokeep.names import key_name, provider_value, tenant_name
from byokeep.profile import load_trust

from deploy.local.material import DEPLOYMENT
from deploy.local.pki import Identity
from deploy.local.prove.access import SECONDS, Access
from deploy.local.prove.attack import NotShownError
from deploy.local.prove.customer import Customer
from deploy.local.prove.forge import Child, Victim, grant_for, signed

_ACTOR = "make prove"
_PREFIXES = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
_LETTERS = string.ascii_letters + string.digits

Seal = Callable[[str, sealing.SealContext, custody_pb2.IntakeStatement], custody_pb2.SealedKey]


def fresh_key(provider: str = "openai") -> str:
    """Return a random key of the provider's shape, which nothing else holds."""
    return _PREFIXES[provider] + "".join(secrets.choice(_LETTERS) for _ in range(44))


class Attacker(Access):
    """Adds keys as their owners do, and asks for them as anyone."""

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
