"""Backend aws_kms against moto's KMS server, over HTTP."""

from __future__ import annotations

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from moto.server import ThreadedMotoServer

from services.common.config import ConfigError
from services.keyvault.kek import (
    KekMissingError,
    KekUnavailableError,
    RewrapFailed,
    Rewrapped,
    UnwrapError,
)
from services.keyvault.kek.aws_kms import client
from services.keyvault.kek.aws_kms.backend import KmsBackend
from services.keyvault.ledger import ALL
from tests.harness import keyvault as kv
from tests.security.test_rewrap import kek_versions, rewrap, rotate

TENANT, OTHER = "tenant/acme", "tenant/other"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server._server.server_port}"
    server.stop()


@pytest.fixture
def environment(server, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL_KMS": server,
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }.items():
        monkeypatch.setenv(name, value)
    # moto loads its KMS at the first call, on a machine that may be busy.
    monkeypatch.setattr(client, "_CALL_SECONDS", 40)
    monkeypatch.setattr(client, "_DEADLINE_SECONDS", 80.0)
    return monkeypatch


@pytest.fixture
async def backend(environment, request):
    # A deployment for each test: moto's keys outlive it.
    backend = KmsBackend(request.node.name.replace("[", "_")[:60], 7)
    yield backend
    await backend.close()


async def test_data_keys(backend):
    assert await backend.create(TENANT)
    assert not await backend.create(TENANT)
    data_key = await backend.generate_data_key(TENANT)
    assert data_key.kek_version == 1
    clear = bytes(data_key.plaintext.reveal())
    assert len(clear) == 32
    with await backend.unwrap(TENANT, data_key.wrapped) as opened:
        assert bytes(opened.reveal()) == clear


async def test_another_tenants_data_key_does_not_open(backend):
    """Neither under the other's name, nor with the version that names another KMS key."""
    await backend.create(TENANT)
    await backend.create(OTHER)
    wrapped = (await backend.generate_data_key(TENANT)).wrapped
    with pytest.raises(UnwrapError):
        await backend.unwrap(OTHER, wrapped)
    with pytest.raises(UnwrapError):
        await backend.unwrap(TENANT, b"x")
    with pytest.raises(KekMissingError):
        await backend.unwrap(TENANT, (9).to_bytes(4, "big") + wrapped[4:])


async def test_rotate_rewrap_trim(backend):
    await backend.create(TENANT)
    first = await backend.generate_data_key(TENANT)
    assert await backend.rotate(TENANT) == 2
    assert await backend.newest(TENANT) == 2
    assert (await backend.generate_data_key(TENANT)).kek_version == 2
    bad = first.wrapped[:-1] + bytes([first.wrapped[-1] ^ 1])
    # moto does not look at SourceKeyId, so a version that is gone can't be tried here.
    done, failed = await backend.rewrap(TENANT, [first.wrapped, bad])
    assert isinstance(done, Rewrapped)
    assert done.kek_version == 2
    assert failed == RewrapFailed("ROW_TAMPERED")
    for _ in range(2):
        await backend.trim(TENANT, 2)
    with pytest.raises(KekMissingError):
        await backend.unwrap(TENANT, first.wrapped)
    with await backend.unwrap(TENANT, done.wrapped) as opened:
        assert bytes(opened.reveal()) == bytes(first.plaintext.reveal())


async def test_destroy_schedules_deletion(backend):
    """Delayed: the KMS keys wait for their end, and their aliases are gone at once."""
    await backend.create(TENANT)
    await backend.rotate(TENANT)
    wrapped = (await backend.generate_data_key(TENANT)).wrapped
    for _ in range(2):
        await backend.destroy(TENANT)
    assert backend.shred == "delayed"
    for call in (backend.newest, backend.generate_data_key, backend.rotate):
        with pytest.raises(KekMissingError):
            await call(TENANT)
    with pytest.raises(KekMissingError):
        await backend.unwrap(TENANT, wrapped)
    kms = boto3.client("kms")
    states = [
        kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"] for key in kms.list_keys()["Keys"]
    ]
    ours = [one for one in states if f" {backend._deployment} {TENANT} " in one["Description"]]
    assert [one["KeyState"] for one in ours] == ["PendingDeletion"] * 2
    assert await backend.create(TENANT)


async def test_a_rotation_that_died_half_way_is_taken_up(backend):
    await backend.create(TENANT)
    made = await backend._make(TENANT, 2)
    assert await backend.newest(TENANT) == 1
    assert await backend.rotate(TENANT) == 2
    assert (await backend._client.described(backend._alias(TENANT)))[0] == made


async def test_health(backend, environment):
    assert (await backend.health()).state == "uninitialized"
    await backend.create("system")
    assert (await backend.health()).ok
    environment.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    unreachable = KmsBackend("nowhere", 7)
    with pytest.raises(KekUnavailableError):
        await unreachable.generate_data_key(TENANT)
    assert (await unreachable.health()).state == "unreachable"
    await unreachable.close()


async def test_health_is_not_asked_every_second(backend, monkeypatch):
    """KMS bills each call, and keyvault asks every second; a call that fails ends the peace.

    Shown to fail: without `well_until` looked at; without it put back by a failure.
    """
    await backend.create("system")
    described, calls = backend._client._kms.describe_key, []

    def describe_key(**parameters):
        calls.append(1)
        return described(**parameters)

    def fails(**parameters):
        raise EndpointConnectionError(endpoint_url="test")

    monkeypatch.setattr(backend._client._kms, "describe_key", describe_key)
    assert [(await backend.health()).ok for _ in range(5)] == [True] * 5
    assert len(calls) == 1
    monkeypatch.setattr(backend._client._kms, "describe_key", fails)
    monkeypatch.setattr(backend._client._kms, "decrypt", fails)
    assert (await backend.health()).ok
    with pytest.raises(KekUnavailableError):
        await backend.unwrap("system", bytes(64))
    assert (await backend.health()).state == "unreachable"
    monkeypatch.setattr(backend._client._kms, "describe_key", describe_key)
    assert (await backend.health()).ok


def test_settings_that_kms_does_not_take(environment):
    with pytest.raises(ConfigError, match="DEPLOYMENT"):
        KmsBackend("with space", 7)


async def test_keyvault_moves_to_kms(keyvault_database_url, tmp_path, environment):
    """A whole keyvault: keys under local, moved to KMS, leased there, rotated and trimmed."""
    deployment = kv.Deployment(tmp_path, keyvault_database_url)
    async with kv.running(deployment) as keyvault:
        await keyvault.create_tenant()
        key = await keyvault.add_active()
    settings = {"kek_backend": "aws_kms", "kek_backends_read": "local"}
    async with kv.running(deployment, **settings) as keyvault:
        assert await kv.try_lease(keyvault, key) == ""
        assert (await rewrap(keyvault)).done == 1
        assert await kv.try_lease(keyvault, key) == ""
        (stored,) = (await keyvault.app.ledger.read("acme", ALL)).every_key()
        assert [(one.kek_backend, one.kek_version) for one in stored.versions] == [("aws_kms", 1)]
        # Without trim the old KEK stays.
        assert await kek_versions(keyvault) == [1]
        assert await rotate(keyvault) == 2
        assert (await rewrap(keyvault)).done == 1
        second = await keyvault.add_active(name="second")
        assert await kv.try_lease(keyvault, second) == ""
