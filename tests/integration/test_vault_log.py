"""The audit log's anchor in Vault's key/value engine, and checkpoints signed by Transit."""

from __future__ import annotations

import asyncio
import base64
import json
import time

from byokeep import dsse
from byokeep.keyvault.v1 import admin_pb2, audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.keyvault.anchor import Stored
from services.keyvault.kek.vault.backend import VaultBackend
from tests.harness import keyvault as kv


def in_vault(vault, tmp_path) -> dict[str, object]:
    return vault.settings(
        tmp_path,
        anchor_file=None,
        vault_anchor="byokeep/anchor",
        vault_checkpoint_key="byokeep-checkpoint",
    )


async def test_a_lease_with_everything_in_vault(own_vault, deployment, tmp_path):
    """KEKs, anchor and the audit log's key in Vault; the export verifies with the pinned key."""
    async with kv.running(deployment, **in_vault(own_vault, tmp_path)) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert await kv.try_lease(keyvault, key) == ""
        anchored = own_vault.api("GET", "byokeep/data/anchor")["data"]
        assert '"size"' in anchored["data"]["text"]
        assert not (deployment.folder / "anchor.json").exists()
        signer = keyvault.app._signer
        assert base64.b64decode(keyvault.audit_keys[signer.key_id]) == signer.public_key
        heads = [
            item.head
            async for item in keyvault.audit.ExportEvents(
                audit_pb2.ExportEventsRequest(parent="tenants/acme")
            )
            if item.HasField("head")
        ]
        envelope = heads[-1].head if hasattr(heads[-1], "head") else heads[-1]
        assert envelope.key_id == signer.key_id
        message = dsse.pre_authentication_encoding(envelope.payload_type, envelope.payload)
        public = Ed25519PublicKey.from_public_bytes(signer.public_key)
        public.verify(envelope.signature, message)


async def test_rollback_is_noticed_by_the_anchor_in_vault(own_vault, deployment, tmp_path):
    """The log is cut in the database; Vault's anchor says that it was longer.

    Shown to fail with `Stored(None, "0")` for whatever `KvAnchor.read` finds and an empty log."""
    settings = in_vault(own_vault, tmp_path)
    async with kv.running(deployment, **settings) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert await kv.try_lease(keyvault, key) == ""
        await keyvault.tick()
        size = keyvault.app.log.position.size
        assert size > 0
    async with kv.database(deployment) as connection:
        await connection.execute("DELETE FROM log_snapshot")
        await connection.execute("DELETE FROM log_leaf WHERE index = %s", (size - 1,))
    async with kv.running(deployment, **settings) as keyvault:
        assert await kv.try_lease(keyvault, key) == "DATABASE_ROLLED_BACK"
        # The verdict stands beside the position, where SQL does not reach.
        anchored = own_vault.api("GET", "byokeep/data/anchor")["data"]["data"]["text"]
        assert json.loads(anchored)["distrusted"] is True
        word = admin_pb2.ResumeLeasesRequest(reason="a drill")
        await keyvault.admin.ResumeLeases(word)
        assert await kv.try_lease(keyvault, key) == ""


async def test_two_replicas_share_the_anchor(own_vault, deployment, tmp_path):
    """A write over a version that is not the newest is refused, and nothing is written."""
    backend = VaultBackend(deployment.settings(**own_vault.settings(tmp_path)))
    await backend.start()
    try:
        ours, theirs = backend.anchor("byokeep/anchor"), backend.anchor("byokeep/anchor")
        empty = await ours.read()
        assert empty == Stored(None, "0")
        assert await ours.write("one", empty) is True
        assert await theirs.write("two", empty) is False
        now = await theirs.read()
        assert now == Stored("one", "1")
        assert await theirs.write("two", now) is True
        assert (await ours.read()).text == "two"
        own_vault.api("DELETE", "byokeep/data/anchor")
        gone = await ours.read()
        assert gone.text is None
    finally:
        await backend.close()


async def test_leases_stop_when_the_anchor_in_vault_can_not_be_read(
    own_vault, deployment, tmp_path, monkeypatch
):
    """KEKs in the keyring, the anchor in Vault: without Vault leases stop after a while."""
    settings = in_vault(own_vault, tmp_path)
    settings |= {"kek_backend": "local", "kek_backends_read": "vault", "vault_checkpoint_key": ""}
    async with kv.running(deployment, **settings) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
        assert await kv.try_lease(keyvault, key) == ""
        monkeypatch.setattr("services.keyvault.log.STALE_SECONDS", 2.0)
        own_vault.seal()
        end = time.monotonic() + 60
        while (reason := await kv.try_lease(keyvault, key)) != "AUDIT_UNAVAILABLE":
            assert reason == ""
            assert time.monotonic() < end
            await asyncio.sleep(0.2)
        own_vault.unseal()
        while await kv.try_lease(keyvault, key) != "":
            assert time.monotonic() < end + 60
            await asyncio.sleep(0.2)
