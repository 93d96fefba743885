"""Every RPC × every identity, from the descriptors; and identities that are none."""

from __future__ import annotations

import datetime

import grpc
import pytest
from byokeep import transport
from byokeep.common.v1 import options_pb2
from byokeep.errors import error_info
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2
from byokeep.runner.v1 import runner_pb2
from google.protobuf import descriptor_pool, message_factory

from deploy.local.pki import CertificateAuthority
from services.common import authz, server
from services.common.config import ConfigError
from tests.harness import keyvault as kv

# Imported for their descriptors.
FILES = (key_pb2, review_pb2, settings_pb2, tenant_pb2, runner_pb2)
SERVICES = {
    "keyvault": (
        "byokeep.keyvault.v1.CustodyService",
        "byokeep.keyvault.v1.ContentKeyService",
        "byokeep.keyvault.v1.LeaseService",
        "byokeep.keyvault.v1.AuditService",
        "byokeep.keyvault.v1.AdminService",
    ),
    "orchestrator": (
        "byokeep.orchestrator.v1.TenantService",
        "byokeep.orchestrator.v1.CallerService",
        "byokeep.orchestrator.v1.KeyService",
        "byokeep.orchestrator.v1.ReviewService",
        "byokeep.orchestrator.v1.SettingsService",
    ),
    "runner": ("byokeep.runner.v1.RunnerService",),
}
METHODS = [method for one in SERVICES.values() for name in one for method in authz.methods_of(name)]
CLASSES = {
    "orchestrator": options_pb2.CALLER_CLASS_ORCHESTRATOR,
    "runner": options_pb2.CALLER_CLASS_RUNNER,
    "auditor": options_pb2.CALLER_CLASS_AUDITOR,
    "operator": options_pb2.CALLER_CLASS_OPERATOR,
    "client": options_pb2.CALLER_CLASS_CLIENT,
}
# Stated once more, by hand: a change of the option alone must not pass unseen.
EXPECTED = {
    "byokeep.keyvault.v1.CustodyService": {"orchestrator"},
    "byokeep.keyvault.v1.ContentKeyService": {"orchestrator"},
    "byokeep.keyvault.v1.LeaseService": {"runner"},
    "byokeep.keyvault.v1.AuditService": {"auditor"},
    "byokeep.keyvault.v1.AdminService": {"operator"},
    "byokeep.orchestrator.v1.TenantService": {"client"},
    "byokeep.orchestrator.v1.CallerService": {"client"},
    "byokeep.orchestrator.v1.KeyService": {"client"},
    "byokeep.orchestrator.v1.ReviewService": {"client"},
    "byokeep.orchestrator.v1.SettingsService": {"client"},
    "byokeep.runner.v1.RunnerService": {"orchestrator"},
}


def test_authz_matrix_knows_every_service():
    """20. A service without a stated expectation fails here."""
    pool = descriptor_pool.Default()
    stated = {pool.FindServiceByName(name).full_name for name in EXPECTED}
    assert stated == {name for names in SERVICES.values() for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_authz_matrix_declared(method):
    """20. What each method declares is what was meant."""
    service = method.split("/")[1]
    declared = set(authz.declared_access(method).callers)
    assert declared == {CLASSES[name] for name in EXPECTED[service]}


async def test_authz_matrix_on_the_wire(keyvault):
    """20. Each identity is refused every keyvault method but its own class's.

    Shown to fail: with authz.check_class returning early.
    """
    for service in SERVICES["keyvault"]:
        descriptor = descriptor_pool.Default().FindServiceByName(service)
        for method in descriptor.methods:
            for name, spiffe_path in kv.IDENTITIES.items():
                allowed = name.replace("sibling", "runner") in EXPECTED[service]
                reason = await _call(keyvault, name, f"/{service}/{method.name}", method)
                refused = reason == "CALLER_NOT_ALLOWED"
                assert refused is not allowed, (method.full_name, spiffe_path)


async def _call(keyvault, identity, path, method) -> str:
    request = message_factory.GetMessageClass(method.input_type)()
    answer = message_factory.GetMessageClass(method.output_type)
    kind = "unary_stream" if method.server_streaming else "unary_unary"
    call = getattr(keyvault.channel(identity), kind)(
        path,
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )(request, timeout=5)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.RpcError as error:
        return error_info(error).reason
    return ""


def test_authz_matrix_undeclared_stops_the_start():
    """20. A method without declared callers stops the start.

    Shown to fail: with declared_access returning an empty Access.
    """
    with pytest.raises(ConfigError, match="declares no callers"):
        authz.declared_access("/grpc.health.v1.Health/Check")


async def test_authz_matrix_server_does_not_start(deployment, monkeypatch):
    """20. And it is the server that refuses, before it listens."""
    async with kv.running(deployment) as keyvault:
        monkeypatch.setattr(authz, "methods_of", lambda name: ["/grpc.health.v1.Health/Check"])
        with pytest.raises(ConfigError, match="declares no callers"):
            await server.build(deployment.settings(), keyvault.app)


OTHER_DOMAIN = "spiffe://evil.test/orchestrator"
GOOD = f"spiffe://{kv.TRUST_DOMAIN}/orchestrator"
SHAPES = {
    "no URI": {"uris": []},
    "two URIs": {"uris": [GOOD, f"spiffe://{kv.TRUST_DOMAIN}/runner/default"]},
    "other trust domain": {"uris": [OTHER_DOMAIN]},
    "not SPIFFE": {"uris": ["https://byokeep.test/orchestrator"]},
    "empty path": {"uris": [f"spiffe://{kv.TRUST_DOMAIN}"]},
    "dot segments": {"uris": [f"spiffe://{kv.TRUST_DOMAIN}/runner/../orchestrator/x%20y"]},
    "no class": {"uris": [f"spiffe://{kv.TRUST_DOMAIN}/nobody"]},
    "expired": {
        "spiffe_id": "orchestrator",
        "not_before": datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2),
        "not_after": datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1),
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_svid_shape(keyvault, deployment, shape):
    """21. A certificate that is not one valid SVID of this trust domain opens nothing.

    Shown to fail: with CallerClasses.identify ignoring the trust domain and the form.
    """
    deployment.ca.issue(deployment.folder / "odd", **shape)
    assert await _intake(keyvault, deployment.files("odd")) in _REFUSED


async def test_svid_shape_wrong_ca(keyvault, deployment):
    """21. The right name by another CA is refused at the handshake."""
    other = CertificateAuthority.new(kv.TRUST_DOMAIN)
    other.issue(deployment.folder / "forged", spiffe_id="orchestrator")
    assert await _intake(keyvault, deployment.files("forged")) == "UNAVAILABLE"


async def test_svid_shape_no_certificate(keyvault, deployment):
    """21. A client without a certificate is refused at the handshake."""
    ca = deployment.folder.joinpath("ca.pem").read_bytes()
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{keyvault.port}",
        grpc.ssl_channel_credentials(ca),
        options=transport.channel_options(kv.NAME),
    )
    async with channel:
        assert await _ask(channel) == "UNAVAILABLE"


async def test_svid_shape_good(keyvault, deployment):
    """21. And the well-formed one gets in."""
    assert await _intake(keyvault, deployment.files("orchestrator")) == "OK"


_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE")


async def _intake(keyvault, files) -> str:
    async with transport.aio_channel(f"127.0.0.1:{keyvault.port}", kv.NAME, files) as channel:
        return await _ask(channel)


async def _ask(channel) -> str:
    stub = kv.custody_pb2_grpc.CustodyServiceStub(channel)
    try:
        await stub.GetIntakeKey(
            kv.custody_pb2.GetIntakeKeyRequest(suite=kv.hpke.HYBRID_V1), timeout=5
        )
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.parametrize(
    "callers",
    ["", "boss=spiffe://byokeep.test/x", "runner=spiffe://evil.test/runner", "runner"],
)
def test_a_wrong_caller_setting_stops_the_start(callers):
    with pytest.raises(ConfigError, match="BYOKEEP_CALLERS"):
        authz.CallerClasses(callers, kv.TRUST_DOMAIN)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("runner/default", True),
        ("runner/x/default", False),
        ("runner", False),
        ("runners/a", False),
    ],
)
def test_a_star_stands_for_the_last_part_of_an_identity(path, known):
    """Grants name a runner's class by that part. Shown to fail where it stands for several."""
    classes = authz.CallerClasses(f"runner=spiffe://{kv.TRUST_DOMAIN}/runner/*", kv.TRUST_DOMAIN)
    caller = classes.identify(f"spiffe://{kv.TRUST_DOMAIN}/{path}")
    assert bool(caller.classes) is known


@pytest.mark.parametrize(
    ("role", "served"),
    [
        (
            "data",
            {
                "byokeep.keyvault.v1.CustodyService",
                "byokeep.keyvault.v1.ContentKeyService",
                "byokeep.keyvault.v1.LeaseService",
            },
        ),
        ("admin", {"byokeep.keyvault.v1.AuditService", "byokeep.keyvault.v1.AdminService"}),
    ],
)
async def test_roles_of_keyvault_are_apart(keyvault, role, served):
    """The admin role serves no lease, the data role no administration."""
    keyvault.app._role = role
    registrar = server._Registrar()
    keyvault.app.register(registrar)
    assert set(registrar.services) == served
