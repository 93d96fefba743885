"""Rotation of keyvault's own signing keys and of grant-signing keys, with overlap."""

from __future__ import annotations

import asyncio
import base64

import grpc
import pytest
from byokeep import dsse
from byokeep.errors import error_info
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, custody_pb2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.config import ConfigError
from services.keyvault import migrate
from services.keyvault.grants import GrantKeys
from services.orchestrator.custody import grants as orchestrator_grants
from tests.harness import keyvault as kv
from tests.security.test_rewrap import until

INTAKE = admin_pb2.SYSTEM_KEY_KIND_INTAKE_SIGNING
AUDIT = admin_pb2.SYSTEM_KEY_KIND_AUDIT_LOG


async def _signer_of_intake(keyvault) -> str:
    answer = await keyvault.custody.GetIntakeKey(custody_pb2.GetIntakeKeyRequest(suite=2))
    return answer.statement.key_id


async def _signer_of_heads(keyvault) -> str:
    request = audit_pb2.ExportEventsRequest(parent="tenants/acme")
    return [one async for one in keyvault.audit.ExportEvents(request)][-1].head.key_id


@pytest.mark.parametrize(
    ("kind", "signer"), [(INTAKE, _signer_of_intake), (AUDIT, _signer_of_heads)]
)
async def test_a_signing_key_is_given_out_before_it_signs(keyvault, deployment, kind, signer):
    """Prepared: its public part is known and nothing is signed with it. Activated: every replica
    signs with it within seconds, and the old one stays pinned.

    Shown to fail: with `load` taking keys that are not activated.
    """
    async with kv.running(deployment) as replica:
        before = await signer(keyvault)
        prepared = await keyvault.admin.PrepareSystemKey(
            admin_pb2.PrepareSystemKeyRequest(kind=kind)
        )
        again = await keyvault.admin.PrepareSystemKey(admin_pb2.PrepareSystemKeyRequest(kind=kind))
        assert again == prepared
        # A replica that starts now has it, for its bundle, and does not use it.
        trust = await migrate.bootstrap(deployment.settings())
        pinned = trust["intake_signing_keys" if kind == INTAKE else "audit_log_keys"]
        assert set(pinned) == {before, prepared.key_id}
        assert base64.b64decode(pinned[prepared.key_id]) == prepared.public_key
        async with kv.running(deployment) as late:
            assert await signer(late) == before
        await asyncio.sleep(2.5)
        assert (await signer(keyvault), await signer(replica)) == (before, before)
        for _ in range(2):
            await keyvault.admin.ActivateSystemKey(
                admin_pb2.ActivateSystemKeyRequest(kind=kind, key_id=prepared.key_id)
            )

        async def both() -> bool:
            return {await signer(keyvault), await signer(replica)} == {prepared.key_id}

        await until(both)
        if kind == INTAKE:
            public = Ed25519PublicKey.from_public_bytes(prepared.public_key)
            keyvault.pinned[prepared.key_id] = public
            await keyvault.add_active()
        events = await keyvault.events("system")
        assert [one.type for one in events if one.detail.endswith(prepared.key_id)] == [
            audit_pb2.AUDIT_EVENT_TYPE_SYSTEM_KEY_PREPARED,
            audit_pb2.AUDIT_EVENT_TYPE_SYSTEM_KEY_ACTIVATED,
        ]


async def test_the_key_that_authenticates_rows_is_rotated(keyvault, deployment):
    """Its rows are read with the old one and written with the new one, at every replica; a scan
    authenticates anew what nobody changes.

    Shown to fail: with `macs.keys` left as they are in Rotation.refresh, and without the reseal
    in Upkeep._look.
    """
    key = await keyvault.add_active()
    await keyvault.create_tenant("idle")
    names = admin_pb2.SYSTEM_KEY_KIND_STATE_MAC
    async with kv.running(deployment) as replica:
        prepared = await keyvault.admin.PrepareSystemKey(
            admin_pb2.PrepareSystemKeyRequest(kind=names)
        )
        assert prepared.public_key == b""

        async def known() -> bool:
            return prepared.key_id in replica.app.keys.macs.keys

        await until(known)
        await keyvault.admin.ActivateSystemKey(
            admin_pb2.ActivateSystemKeyRequest(kind=names, key_id=prepared.key_id)
        )

        async def used() -> bool:
            both = (keyvault.app.keys.macs, replica.app.keys.macs)
            return all(one.current == prepared.key_id for one in both)

        await until(used)
        for one in (keyvault, replica):
            assert await kv.try_lease(one, key) == ""
        await keyvault.app.upkeep.scan()
        query = "SELECT name FROM tenant WHERE mac_key_id <> %s"
        assert await keyvault.sql(query, prepared.key_id) == []
    async with kv.running(deployment) as restarted:
        assert await kv.try_lease(restarted, key) == ""


async def test_only_a_prepared_key_is_activated(keyvault):
    with pytest.raises(grpc.RpcError) as caught:
        await keyvault.admin.ActivateSystemKey(
            admin_pb2.ActivateSystemKeyRequest(kind=INTAKE, key_id="isk_0123456789abcdef")
        )
    assert error_info(caught.value).reason == "NOT_FOUND"


async def test_grant_keys_are_followed(keyvault, deployment):
    """A new replica's key counts once its file is there, the old one until it is gone; both
    side by side in between.

    Shown to fail: without `trusted.clear()` in GrantKeys.follow.
    """
    key = await keyvault.add_active()
    new = Ed25519PrivateKey.generate()

    async def lease(signer) -> str:
        child = kv.Child()
        request = kv.lease_request(deployment, kv.grant_for(key, child), child, signer=signer)
        return await kv.refusal(keyvault.leases().LeaseKey(request))

    assert await lease(new) == "GRANT_REFUSED"
    deployment.trust_grant_key(new)

    async def trusted() -> bool:
        return await lease(new) == ""

    await until(trusted)
    assert await lease(deployment.grant_key) == ""
    newest = dsse_key_id(new)
    for path in (deployment.folder / "grants").glob("*.pem"):
        if path.stem != newest:
            path.unlink()

    async def dropped() -> bool:
        return await lease(deployment.grant_key) == "GRANT_REFUSED"

    await until(dropped)
    assert await lease(new) == ""


async def test_a_broken_grant_key_changes_nothing(deployment):
    keys = GrantKeys(deployment.folder / "grants")
    before = dict(keys.trusted)
    (deployment.folder / "grants" / "x.pem").write_text("not a key")
    await keys.follow()
    assert keys.trusted == before
    (deployment.folder / "grants" / "x.pem").unlink()
    added = deployment.trust_grant_key(Ed25519PrivateKey.generate())
    await keys.follow()
    assert set(keys.trusted) == {*before, added}


def test_no_start_with_a_broken_grant_key(deployment):
    """It is said which file it is: a replica whose key is not read could give no lease."""
    (deployment.folder / "grants" / "x.pem").write_text("not a key")
    with pytest.raises(ConfigError, match=r"x\.pem: not an Ed25519 public key"):
        GrantKeys(deployment.folder / "grants")


async def test_the_orchestrator_signs_with_the_new_key(tmp_path):
    """Its file is followed; what can't be read leaves the old one in use."""
    file = tmp_path / "grant.pem"

    def write(text: bytes) -> None:
        temporary = tmp_path / "new.pem"
        temporary.touch(mode=0o600)
        temporary.write_bytes(text)
        temporary.replace(file)

    def pem(key) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    first, second = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    write(pem(first))
    signer = orchestrator_grants.GrantSigner(file, "test", "default")
    subject = orchestrator_grants.Subject("acme", "", "a", 1, "key", 1, "rev", "att", 1, 1)

    def signed_by(private: Ed25519PrivateKey) -> bool:
        envelope = signer.sign(subject, b"x" * 32)
        return envelope.key_id == dsse_key_id(private)

    write(b"broken")
    await signer.follow()
    assert signed_by(first)
    write(pem(second))
    await signer.follow()
    assert signed_by(second)
    envelope = signer.sign(subject, b"x" * 32)
    assert dsse.verify(envelope, dsse.GRANT, {dsse_key_id(second): second.public_key()})


def dsse_key_id(private: Ed25519PrivateKey) -> str:
    return kv.public_key_id("gsk", private.public_key().public_bytes_raw())
