"""What may leave a service: logs, errors, audit."""

from __future__ import annotations

import json
import logging

import grpc
import pytest
from byokeep import dsse, transport
from byokeep.errors import error_info
from byokeep.keyvault.v1 import audit_pb2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common import logs
from services.common.secret import Secret
from services.keyvault.event import GENESIS, link_hash
from tests.harness import keyvault as kv
from tests.harness.keyvault import refusal, try_lease

CANARY = "sk-CANARY-0123456789-canary"


async def test_error_text(keyvault, capfd, monkeypatch):
    """32. A handler that raises the canary: INTERNAL with a fixed text, and a clean log.

    Shown to fail: with _Call._refusal answering str(error), and with logs.describe
    adding the exception's text.
    """
    logs.setup("test", "debug")

    def broken(*args, **kwargs):
        raise RuntimeError(f"{CANARY} {args}")

    monkeypatch.setattr(keyvault.app._custody, "page", broken)
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.custody.ListKeys(kv.custody_pb2.ListKeysRequest(parent="tenants/acme"))
    info = error_info(error.value)
    assert (info.code, info.message) == (
        grpc.StatusCode.INTERNAL,
        "internal error; the service's log has more",
    )
    written = capfd.readouterr().err
    assert "unforeseen_error" in written
    assert "RuntimeError" in written
    assert "CANARY" not in written + str(error.value)


async def test_error_text_validation(keyvault):
    """32. A broken rule names the field and the rule, never the value."""
    with pytest.raises(grpc.RpcError) as error:
        await keyvault.custody.GetKey(kv.custody_pb2.GetKeyRequest(name=CANARY))
    info = error_info(error.value)
    assert (info.reason, info.metadata["field"]) == ("INVALID_FIELD", "name")
    assert "CANARY" not in str(error.value)


def test_error_text_of_libraries(capfd):
    """32. A library's log line is its template: its arguments are not shown.

    Shown to fail: with record.getMessage() in the formatter.
    """
    logs.setup("test", "info")
    logging.getLogger("a.library").warning("HTTP Request: %s", CANARY)
    written = capfd.readouterr().err
    assert "CANARY" not in written
    # gRPC's own threads may write beside it.
    lines = [line for line in written.splitlines() if "HTTP Request" in line]
    assert [json.loads(line)["event"] for line in lines] == ["HTTP Request: %s"]


def test_a_secret_shows_nothing():
    with Secret(bytearray(CANARY.encode())) as secret:
        assert "CANARY" not in f"{secret!r} {secret}"
        with pytest.raises(TypeError):
            __import__("pickle").dumps(secret)
        buffer = secret.reveal()
    assert buffer == bytes(len(CANARY))


async def test_audit_fail_closed(keyvault):
    """35. The audit event can't be written: no key is released, and nothing is half-done.

    Shown to fail: with the event written in a transaction of its own, after the commit.
    """
    key = await keyvault.add_active()
    await keyvault.sql("ALTER TABLE event ADD CONSTRAINT full_disk CHECK (false) NOT VALID")
    assert await try_lease(keyvault, key) == "AUDIT_UNAVAILABLE"
    assert await keyvault.sql("SELECT count(*) FROM lease") == [(0,)]
    await keyvault.sql("ALTER TABLE event DROP CONSTRAINT full_disk")
    assert await try_lease(keyvault, key) == ""


async def _export(keyvault):
    stream = keyvault.audit.ExportEvents(audit_pb2.ExportEventsRequest(parent="tenants/acme"))
    return [message async for message in stream]


async def test_audit_export_is_whole_and_signed(keyvault):
    """35. An export is a chain from the start to a signed head."""
    await keyvault.add_active()
    *events, last = await _export(keyvault)
    previous = GENESIS
    for item in events:
        assert item.event.previous_hash == previous
        previous = link_hash(previous, item.event.body)
        assert item.event.hash == previous
    pinned = {
        key_id: Ed25519PublicKey.from_public_bytes(kv.base64.b64decode(raw))
        for key_id, raw in keyvault.audit_keys.items()
    }
    head = audit_pb2.ChainHead.FromString(dsse.verify(last.head, dsse.CHAIN_HEAD, pinned))
    assert (head.sequence, head.hash) == (len(events), previous)


async def test_denial_flood(keyvault, deployment):
    """49. 100,000 denials: the audit log grows by a bound, tenants' chains not at all.

    Counted in the process that would write them; a thousand go over the wire as well.
    Shown to fail: with Denials.note writing one event each.
    """
    before = await keyvault.events()
    stub = kv.custody_pb2_grpc.CustodyServiceStub(keyvault.channel("runner"))
    request = kv.custody_pb2.ListKeysRequest(parent="tenants/acme")
    for _ in range(1_000):
        assert await refusal(stub.ListKeys(request)) == "CALLER_NOT_ALLOWED"
    for number in range(99_000):
        keyvault.app.denied(f"spiffe://byokeep.test/x/{number}", "/a/b", "CALLER_NOT_ALLOWED")
    await keyvault.app._denials.flush(0.0, everything=True)
    events = await keyvault.events("system")
    assert sum(event.count for event in events) == 100_000
    assert len(events) < 300
    assert await keyvault.events() == before


async def test_server_keeps_its_last_good_certificate(keyvault, deployment, capfd):
    """A broken certificate file is an alarm; the server goes on with the last good one."""
    logs.setup("test", "info")
    good = deployment.folder.joinpath("server.pem").read_bytes()
    deployment.folder.joinpath("server.pem").write_text("broken")
    files = deployment.files("orchestrator")
    async with transport.aio_channel(f"127.0.0.1:{keyvault.port}", kv.NAME, files) as channel:
        stub = kv.custody_pb2_grpc.CustodyServiceStub(channel)
        await stub.ListKeys(kv.custody_pb2.ListKeysRequest(parent="tenants/acme"))
    assert "certificate_reload_failed" in capfd.readouterr().err
    deployment.folder.joinpath("server.pem").write_bytes(good)
