"""Many active keys at once, by the same rules as staging and promoting them one by one."""

from __future__ import annotations

import os

from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2

from services.common.secret import Secret
from services.keyvault import custody, kek, lifecycle, stage
from services.keyvault.custody import Origin
from services.keyvault.envelope import Context, encrypt
from services.keyvault.event import Head
from services.keyvault.kek import Backends
from services.keyvault.ledger import ALL, Ledger, Tenant

_ORIGIN = Origin("test", "test")


async def add_active_keys(
    ledger: Ledger, backends: Backends, deployment: str, tenant: str, count: int
) -> tuple[dict[str, str], Head]:
    """Store active keys of a tenant that has a KEK of the local backend, in one change; return
    their values by key id, and the head after it."""
    values = {new_id("key"): f"sk-proj-{number:040d}" for number in range(count)}
    backend, name = backends.primary, kek.tenant_kek(tenant)
    # The newest version is asked for once, not ten thousand times.
    version, cipher = await backend._newest_cipher(name)
    secrets = {}
    for key_id, value in values.items():
        with Secret(bytearray(os.urandom(32))) as data_key:
            context = Context(deployment, tenant, "", "openai", key_id, 1)
            envelope = encrypt(data_key.reveal(), value.encode(), context)
            wrapped = backend._wrap(name, version, cipher, data_key)
        secrets[key_id] = stage._Secret("sk-...", backend.name, version, wrapped, envelope)

    def decide(found: Tenant) -> None:
        living = sum(lifecycle.lives(key) for key in found.every_key())
        assert living + count <= lifecycle.MOST_KEYS
        for key_id, secret in secrets.items():
            order = stage.Order(
                tenant,
                key_id,
                "openai",
                "",
                key_id,
                "add",
                new_id("req"),
                custody_pb2.SealedKey(),
                "",
            )
            stage._add(found, order, _ORIGIN, 1, secret, backends)
            changes = lifecycle.promote(found.key(key_id), 1, destroy_previous=False)
            custody.apply(found, key_id, changes, _ORIGIN, backends)

    _, head = await ledger.change(tenant, decide, ALL)
    return values, head


async def fill(keyvault, count: int, tenant: str = "acme") -> dict[str, str]:
    """As above, in a keyvault that runs in the test's process; anchored."""
    app = keyvault.app
    deployment = keyvault.deployment.settings().deployment
    values, head = await add_active_keys(app.ledger, app.backends, deployment, tenant, count)
    await app.log.anchored(tenant, head)
    return values
