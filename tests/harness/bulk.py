"""Many active keys at once, by the same rules as staging and promoting them one by one."""

from __future__ import annotations

import hashlib
import os

from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2
from byokeep.names import provider_value

from services.common.secret import Secret
from services.keyvault import chain, domain, kek
from services.keyvault.database import Database
from services.keyvault.domain import Key, State, Version
from services.keyvault.envelope import Context, encrypt
from services.keyvault.kek.local import LocalBackend
from services.keyvault.wraps import Wraps

_KEYS = """
INSERT INTO provider_key (tenant, key_id, provider, owner, display_name)
SELECT %s, k, 'openai', '', k FROM unnest(%s::text[]) AS i (k)
"""
_VERSIONS = """
INSERT INTO key_version (tenant, key_id, version, state, state_sequence, state_mac, hint,
                         kek_backend, kek_version, wrapped_dek, wrap_mac, envelope)
SELECT %s, i.key_id, 1, %s, i.sequence, i.mac, 'sk-...', %s, i.kek_version, i.wrapped,
       i.wrap_mac, i.envelope
FROM unnest(%s::text[], %s::bigint[], %s::bytea[], %s::int[], %s::bytea[], %s::bytea[], %s::bytea[])
  AS i (key_id, sequence, mac, kek_version, wrapped, wrap_mac, envelope)
"""


async def add_active_keys(
    database: Database,
    backend: LocalBackend,
    mac_key: bytes,
    deployment: str,
    tenant: str,
    count: int,
) -> dict[str, str]:
    """Store active keys of a tenant that has a KEK; return their values by key id."""
    values = {new_id("key"): f"sk-proj-{number:040d}" for number in range(count)}
    # The newest version is asked for once, not ten thousand times.
    newest = await backend._newest_cipher(kek.tenant_kek(tenant))
    rows: dict[str, list] = {"wrapped": [], "kek_version": [], "wrap_mac": [], "envelope": []}
    for key_id, value in values.items():
        data_key = _data_key(backend, newest, kek.tenant_kek(tenant))
        with data_key.plaintext as clear:
            context = Context(deployment, tenant, "", "openai", key_id, 1)
            rows["envelope"].append(encrypt(clear.reveal(), value.encode(), context))
        rows["wrapped"].append(data_key.wrapped)
        rows["kek_version"].append(data_key.kek_version)
        rows["wrap_mac"].append(
            Wraps(mac_key, deployment).mac(
                tenant,
                (key_id, 1),
                backend.name,
                data_key.kek_version,
                data_key.wrapped,
                hashlib.sha256(rows["envelope"][-1]).digest(),
            )
        )
    async with database.transaction() as connection:
        head = await chain.lock(connection, chain.tenant_chain(tenant))
        events, sequences, macs = [], [], []
        for key_id in values:
            for kind in (
                audit_pb2.AUDIT_EVENT_TYPE_STAGED,
                audit_pb2.AUDIT_EVENT_TYPE_PROMOTED,
            ):
                events.append(
                    audit_pb2.AuditEvent(
                        type=kind, key_id=key_id, key_version=1, provider=provider_value("openai")
                    )
                )
            sequences.append(head.sequence + len(events))
            key = Key(tenant, key_id, "openai", "", key_id, 1, head.now, ())
            version = Version(
                1, State.ACTIVE, sequences[-1], b"", "", backend.name, 1, head.now, head.now
            )
            macs.append(domain.state_mac(mac_key, deployment, key, version))
        await chain.append(connection, head, deployment, events)
        await connection.execute(_KEYS, (tenant, list(values)))
        await connection.execute(
            _VERSIONS,
            (
                tenant,
                int(State.ACTIVE),
                backend.name,
                list(values),
                sequences,
                macs,
                rows["kek_version"],
                rows["wrapped"],
                rows["wrap_mac"],
                rows["envelope"],
            ),
        )
    return values


def _data_key(backend: LocalBackend, newest, name: str) -> kek.DataKey:
    version, cipher = newest
    key = Secret(bytearray(os.urandom(32)))
    return kek.DataKey(key, backend._wrap(name, version, cipher, key), version)


async def fill(keyvault, count: int, tenant: str = "acme") -> dict[str, str]:
    """As above, in a keyvault that runs in the test's process."""
    app = keyvault.app
    return await add_active_keys(
        app._database,
        app._backends.primary,
        app._keys.state_mac,
        keyvault.deployment.settings().deployment,
        tenant,
        count,
    )
