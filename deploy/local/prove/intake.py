"""The way in: recorded seals replayed, intake keys that somebody else made."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from byokeep import dsse, hpke, sealing
from byokeep.client import Connection
from byokeep.ids import new_id, public_key_id
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2
from byokeep.profile import Endpoint, load_profile
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.local.material import DEPLOYMENT, SERVER_NAMES
from deploy.local.prove.access import SECONDS
from deploy.local.prove.attack import GotThroughError, Group, refused
from deploy.local.prove.attacker import Attacker, fresh_key

GROUP = Group("The way in: seals and intake keys")
_RELAY = "a customer's sealed key, and the orchestrator's certificate"


def _replayed(attacker: Attacker, **sealed_for: str) -> str:
    """Present a seal as something else than it was sealed for."""

    def seal(
        key: str, context: sealing.SealContext, statement: custody_pb2.IntakeStatement
    ) -> custody_pb2.SealedKey:
        info = dataclasses.replace(context, **sealed_for).info(
            statement.deployment, statement.intake_key_id
        )
        return custody_pb2.SealedKey(
            intake_key_id=statement.intake_key_id,
            suite=statement.suite,
            ciphertext=hpke.seal(statement.suite, statement.public_key, key.encode(), info),
        )

    request = attacker.stage_request(attacker.new_tenant(), fresh_key(), seal=seal)
    return refused(lambda: attacker.custody.StageKey(request, timeout=SECONDS), "SEAL_INVALID")


@GROUP.attack("the very bytes that one tenant sent, for another", holds=_RELAY)
def seal_for_another_tenant(attacker: Attacker) -> str:
    """Accepted once, where they belong; then replayed."""
    tenant, other = attacker.new_tenant(), attacker.new_tenant()
    request = attacker.stage_request(tenant, fresh_key())
    attacker.custody.StageKey(request, timeout=SECONDS)
    request.name = request.name.replace(tenant, other)
    return refused(lambda: attacker.custody.StageKey(request, timeout=SECONDS), "SEAL_INVALID")


@GROUP.attack("a seal of another owner", holds=_RELAY)
def seal_of_another_owner(attacker: Attacker) -> str:
    """An engineer's own key as the whole tenant's."""
    return _replayed(attacker, owner="ann")


@GROUP.attack("a seal for another provider", holds=_RELAY)
def seal_for_another_provider(attacker: Attacker) -> str:
    """The key would be shown to a stranger."""
    return _replayed(attacker, provider="gemini")


@GROUP.attack("a seal for another operation", holds=_RELAY)
def seal_for_another_operation(attacker: Attacker) -> str:
    """A rotation as a new key."""
    return _replayed(attacker, operation="rotate")


@GROUP.attack("an intake key of his own, planted by SQL", holds="PostgreSQL's superuser")
def intake_key_planted(attacker: Attacker) -> str:
    """Clients would seal to him, with keyvault's signature under it."""
    attacker.statement()
    before = attacker.sql("SELECT key_id, public FROM intake_key")
    mine = hpke.PrivateKey.generate(sealing.SUITE).public_bytes
    attacker.sql("UPDATE intake_key SET public = %s", mine)
    try:
        request = custody_pb2.GetIntakeKeyRequest(suite=sealing.SUITE)
        how = refused(
            lambda: attacker.custody.GetIntakeKey(request, timeout=SECONDS), "ROW_TAMPERED"
        )
    finally:
        for key_id, public in before:
            attacker.sql("UPDATE intake_key SET public = %s WHERE key_id = %s", public, key_id)
    attacker.statement()
    return f"{how}: keyvault does not sign it"


@GROUP.attack(
    "an intake key of his own, under his own signature",
    holds="the orchestrator's address, certificate and key",
)
def intake_statement_forged(attacker: Attacker) -> str:
    """A compromised orchestrator answers the client; the client's pins are what is left."""
    with _rogue_orchestrator(attacker) as connection:
        try:
            connection.seal("openai", fresh_key(), new_id("key"), "add", new_id("req"))
        except sealing.UntrustedIntakeKeyError as error:
            return f"the client seals nothing: {error}"
    raise GotThroughError("the client sealed its key to the attacker's")


def _forged(request: key_pb2.GetIntakeKeyRequest, context: object) -> key_pb2.GetIntakeKeyResponse:
    """Answer with a key of the attacker's, and a signature that he could make."""
    del context
    signer = Ed25519PrivateKey.generate()
    now = datetime.datetime.now(datetime.UTC)
    statement = custody_pb2.IntakeStatement(
        deployment=DEPLOYMENT,
        suite=request.suite,
        intake_key_id=new_id("ink"),
        public_key=hpke.PrivateKey.generate(request.suite).public_bytes,
    )
    statement.not_before.FromDatetime(now)
    statement.not_after.FromDatetime(now + datetime.timedelta(minutes=30))
    key_id = public_key_id("isk", signer.public_key().public_bytes_raw())
    envelope = dsse.sign(dsse.INTAKE_KEY, statement.SerializeToString(), key_id, signer)
    return key_pb2.GetIntakeKeyResponse(statement=envelope)


@contextmanager
def _rogue_orchestrator(attacker: Attacker) -> Iterator[Connection]:
    """Serve in the orchestrator's stead; yield a client that was led there."""
    own = attacker.identity("orchestrator")
    credentials = grpc.ssl_server_credentials(
        [(own.key.read_bytes(), own.certificate.read_bytes())],
        (attacker.state.pki / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    server = grpc.server(ThreadPoolExecutor(1))
    method = grpc.unary_unary_rpc_method_handler(
        _forged,
        request_deserializer=key_pb2.GetIntakeKeyRequest.FromString,
        response_serializer=key_pb2.GetIntakeKeyResponse.SerializeToString,
    )
    service = key_pb2.DESCRIPTOR.services_by_name["KeyService"].full_name
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"GetIntakeKey": method})]
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    led_astray = dataclasses.replace(
        load_profile("demo", attacker.state.config),
        orchestrator=Endpoint(f"127.0.0.1:{port}", SERVER_NAMES["orchestrator"]),
    )
    try:
        with Connection(led_astray, led_astray.tenant) as connection:
            yield connection
    finally:
        server.stop(None)
