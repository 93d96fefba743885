"""keyvault's core on a running stack's database, beside the process that serves it: a bench stores
many keys or tenants with it, and times one change without the wire."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2, custody_pb2, state_pb2
from byokeep.testing import Stack

from services.common.postgres import database_url
from services.keyvault import custody, kek, lifecycle, stage, system_keys
from services.keyvault.custody import Origin
from services.keyvault.database import Database
from services.keyvault.envelope import Context, encrypt
from services.keyvault.heads import Heads
from services.keyvault.kek import Backends
from services.keyvault.kek.keyring import load_keyring
from services.keyvault.kek.local import LocalBackend
from services.keyvault.ledger import ALL, Ledger, Tenant, part_of
from tests.harness.bulk import add_active_keys

_ORIGIN = Origin("bench", "bench")


@dataclass(frozen=True, slots=True)
class Inside:
    """A ledger of the stack's tenants, and the backend that wraps their keys."""

    ledger: Ledger
    backends: Backends
    deployment: str

    async def add_tenant(self, name: str) -> None:
        """Create a tenant with its KEK."""
        await self.backends.primary.create(kek.tenant_kek(name))
        event = audit_pb2.AuditEvent(type=audit_pb2.AUDIT_EVENT_TYPE_TENANT_KEY_CREATED)
        state = state_pb2.TenantState()
        state.keks.add(backend="local", version=1)
        await self.ledger.create(name, state, lambda made: made.events.append(event))

    async def add_keys(self, tenant: str, count: int) -> list[str]:
        """Store active keys; return their ids."""
        values, _ = await add_active_keys(
            self.ledger, self.backends, self.deployment, tenant, count
        )
        return list(values)

    async def add_pending(self, tenant: str, key_ids: list[str]) -> None:
        """Store a second version of keys, PENDING."""
        backend, secrets = self.backends.primary, {}
        for key_id in key_ids:
            made = await backend.generate_data_key(kek.tenant_kek(tenant))
            context = Context(self.deployment, tenant, "", "openai", key_id, 2)
            with made.plaintext as clear:
                envelope = encrypt(clear.reveal(), b"sk-proj-" + b"2" * 40, context)
            secrets[key_id] = stage._Secret(
                "sk-...", backend.name, made.kek_version, made.wrapped, envelope
            )

        def decide(found: Tenant) -> None:
            for key_id, secret in secrets.items():
                order = stage.Order(
                    tenant,
                    key_id,
                    "openai",
                    "",
                    key_id,
                    "rotate",
                    new_id("req"),
                    custody_pb2.SealedKey(),
                    "",
                )
                stage._add(found, order, _ORIGIN, 2, secret, self.backends)

        await self.ledger.change(tenant, decide, ALL)

    async def promote(self, tenant: str, key_id: str) -> None:
        """Promote the second version of a key, as its RPC does but for the anchor's wait."""

        def act(found: Tenant) -> None:
            changes = lifecycle.promote(found.edit_key(key_id), 2, destroy_previous=False)
            custody.apply(found, key_id, changes, _ORIGIN, self.backends)

        await self.ledger.change(tenant, act, {part_of(key_id)})


@contextlib.asynccontextmanager
async def inside(stack: Stack, deployment: str) -> AsyncIterator[Inside]:
    """Open a stack's keyvault database as another keyvault of that deployment would."""
    secrets = stack.root / "secrets"
    database = Database(database_url(secrets / "keyvault-database-url"), 4)
    await database.open()
    try:
        keyring = load_keyring(secrets / "keyring.json", {})
        backends = Backends(LocalBackend(database, keyring, deployment))
        keys = await system_keys.load(database, backends, deployment)
        yield Inside(Ledger(database, Heads(), keys.macs, deployment), backends, deployment)
    finally:
        await database.close()
