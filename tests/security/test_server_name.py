"""Requirement 24: a client refuses a valid certificate of another service."""

from __future__ import annotations

import asyncio

import byokeep as client
import grpc
import pytest
from byokeep.orchestrator.v1 import tenant_pb2, tenant_pb2_grpc
from byokeep.transport import TlsFiles, aio_channel

from tests.harness.fake_edge import NAMES

pytest_plugins = ["tests.harness.cli_fixtures"]

REQUEST = tenant_pb2.ListTenantsRequest()


@pytest.fixture
def impostor(edge):
    """The orchestrator's API, presented with a certificate of each name: name → address."""
    return lambda dns: edge.serve(f"impostor-{dns}", dns, edge._add_orchestrator)


WRONG = [NAMES["keyvault"], "runner.byokeep.internal", "orchestrator.byokeep.internal.evil.test"]


@pytest.mark.parametrize("dns", WRONG)
def test_server_name_of_another_service_is_refused(edge, impostor, dns):
    """Shown to fail: with `grpc.ssl_target_name_override` set to the name that the server presents
    instead of the profile's, the impostor is answered."""
    edge.write_config(orchestrator=impostor(dns))
    with client.connect() as connection, pytest.raises(grpc.RpcError) as caught:
        connection.tenants.ListTenants(REQUEST)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert edge.requests == []


@pytest.mark.parametrize("dns", WRONG)
async def test_server_name_is_checked_by_the_services_channel(edge, impostor, dns):
    assert await asyncio.to_thread(lambda: impostor(dns))
    address = edge.addresses[f"impostor-{dns}"]
    (edge.directory / "ca.pem").write_text(edge.ca.pem)
    files = TlsFiles(
        edge.directory / "developer.pem",
        edge.directory / "developer.key",
        edge.directory / "ca.pem",
    )
    async with aio_channel(address, NAMES["orchestrator"], files) as channel:
        with pytest.raises(grpc.RpcError):
            await tenant_pb2_grpc.TenantServiceStub(channel).ListTenants(REQUEST, timeout=10)
    assert edge.requests == []


def test_server_name_of_keyvault_is_checked_too(edge):
    edge.write_config(keyvault=edge.addresses["orchestrator"])
    with client.connect() as connection, pytest.raises(grpc.RpcError) as caught:
        connection.admin.GetStatus(client_status())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_server_name_that_is_expected_is_accepted(edge, impostor):
    """The control: the same server is answered by a client that expects its name."""
    edge.write_config(orchestrator=impostor(WRONG[0]), orchestrator_name=WRONG[0])
    with client.connect() as connection:
        assert connection.tenants.ListTenants(REQUEST).tenants


def test_server_name_needs_the_right_ca(edge, impostor):
    from deploy.local.pki import CertificateAuthority

    edge.ca = CertificateAuthority.new("byokeep.test")
    edge.write_config(orchestrator=impostor(NAMES["orchestrator"]))
    with client.connect() as connection, pytest.raises(grpc.RpcError) as caught:
        connection.tenants.ListTenants(REQUEST)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert edge.requests == []


def client_status():
    from byokeep.keyvault.v1 import admin_pb2

    return admin_pb2.GetStatusRequest()
