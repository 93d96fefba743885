"""Vault's audit log against leases, line by line, and `byokeep admin reconcile-vault`."""

from __future__ import annotations

import datetime
import json

import pytest
from byokeep.keyvault.v1 import audit_pb2
from byokeep.vaultlog import Chains, VaultLogError, read, unexplained

pytest_plugins = ["tests.harness.cli_fixtures"]

NOW = datetime.datetime(2026, 11, 23, 16, 33, 32, 697179, tzinfo=datetime.UTC)


def entry(path="transit/decrypt/byokeep-tenant-acme", lease="lea_1", **changes) -> str:
    line = {
        "time": "2026-11-23T16:33:32.697179868Z",
        "type": "response",
        "auth": {"accessor": "hmac-sha256:a"},
        "request": {"path": path, "remote_address": "10.0.0.1", "headers": {}},
        "response": {"data": {"plaintext": "hmac-sha256:b"}},
    }
    if lease:
        line["request"]["headers"] = {"x-byokeep-lease": [lease]}
    return json.dumps({**line, **changes})


def leased(lease="lea_1", tenant="acme", time=NOW, kind="LEASED") -> audit_pb2.AuditEvent:
    event = audit_pb2.AuditEvent(
        type=audit_pb2.AuditEventType.Value(f"AUDIT_EVENT_TYPE_{kind}"),
        chain=f"tenants/{tenant}",
        lease_id=lease,
    )
    event.event_time.FromDatetime(time)
    return event


def found(lines, *events) -> list[str]:
    chains = Chains()
    for event in events:
        chains.add(event)
    accesses = read(lines, mount="transit", prefix="byokeep-")
    return [finding.what for finding in unexplained(accesses, chains)]


def test_a_lease_explains_one_opening():
    """Shown to fail without `used` in `_fault`."""
    assert found([entry()], leased()) == []
    assert found([entry(), entry()], leased()) == ["a lease is named that opened a data key before"]


def test_openings_without_a_lease():
    """Shown to fail without the comparison of tenants in `_fault`."""
    unknown = "a lease is named that the tenant's chain does not have"
    assert found([entry(lease="")], leased()) == ["no lease is named"]
    assert found([entry(lease="lea_2")], leased()) == [unknown]
    assert found([entry()], leased(tenant="globex")) == [unknown]
    late = leased(time=NOW - datetime.timedelta(minutes=5))
    assert found([entry()], late)[0].startswith("the lease it names was given at another time")
    batch = entry(response={"data": {"batch_results": [{}, {}, {}]}})
    assert found([batch], leased())[0].startswith("3 data keys were opened at once")


def test_openings_of_one_namespace():
    """Each namespace has its own keys, of the same names.

    Shown to fail with `_in` always true."""
    request = json.loads(entry(lease=""))["request"]
    theirs = entry(request={**request, "namespace": {"id": "x", "path": "teams/other/"}})
    ours = entry(request={**request, "namespace": {"id": "y", "path": "teams/byokeep/"}})
    root = entry(request={**request, "namespace": {"id": "root"}})

    def openings(namespace: str | None) -> int:
        lines = [theirs, ours, root, entry()]
        read_ones = read(lines, mount="transit", prefix="byokeep-", namespace=namespace)
        return len(list(read_ones))

    assert [openings(one) for one in ("teams/byokeep", "/teams/other/", "", None)] == [1, 1, 2, 4]


def test_moves_between_backends_need_the_chains_word():
    move = entry(lease="move_key_1")
    later = leased(lease="", time=NOW + datetime.timedelta(minutes=3), kind="REWRAPPED")
    assert found([move], later) == []
    assert len(found([move], leased())) == 1
    earlier = leased(lease="", time=NOW - datetime.timedelta(minutes=3), kind="REWRAPPED")
    assert len(found([move], earlier)) == 1


def test_a_key_taken_out_of_vault():
    for path in (
        "transit/export/encryption-key/byokeep-tenant-acme",
        "transit/backup/byokeep-system",
    ):
        assert found([entry(path, response={"data": {"keys": {}}})]) == [
            "a key-encryption key was taken out of Vault"
        ]
        assert found([entry(path, response={"data": {"error": "x"}})]) == []


def test_what_is_no_opening():
    lines = [
        entry(lease="", type="request"),
        entry(lease="", error="permission denied"),
        entry(lease="", response={"data": {"error": "hmac-sha256:c"}}),
        entry("transit/rewrap/byokeep-tenant-acme", ""),
        entry("transit/decrypt/another", ""),
        entry("other/decrypt/byokeep-tenant-acme", ""),
        entry("transit/decrypt/byokeep-intake-ink_1", ""),
        entry("transit/decrypt/byokeep-system", ""),
        "",
    ]
    assert found(lines) == []


def test_a_tenant_whose_name_ends_in_a_hyphen():
    line = entry("transit/decrypt/byokeep-tenant-acme-_")
    assert found([line], leased(tenant="acme-")) == []


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"a": 1}', '{"type": "response"}', "plain text", "[" * 100_000],
    ids=["open", "list", "other", "bare", "text", "deep"],
)
def test_another_file_is_refused(line):
    with pytest.raises(VaultLogError, match="line 2"):
        found([entry(), line], leased())


def test_the_command_exits_6_and_names_the_opening(edge, byokeep, tmp_path):
    moment = datetime.datetime.now(datetime.UTC)
    edge.chain.add("LEASED", at=moment, lease_id="lea_1")
    now = moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    path = f"transit/decrypt/byokeep-tenant-{edge.chain.name.removeprefix('tenants/')}"
    log = tmp_path / "vault.log"
    log.write_text(entry(path, time=now) + "\n")
    assert byokeep("admin", "reconcile-vault", "vault.log").code == 0
    log.write_text(entry(path, time=now) + "\n" + entry(path, "lea_9", time=now) + "\n")
    ran = byokeep("admin", "reconcile-vault", "vault.log")
    assert ran.code == 6
    assert "lea_9" in ran.out
    assert len(byokeep("admin", "reconcile-vault", "vault.log", "--json").json["unexplained"]) == 1
    byokeep("audit", "export", "-o", "acme.jsonl")
    assert byokeep("admin", "reconcile-vault", "vault.log", "--export", "acme.jsonl").code == 6
    for record in ("[" * 100_000, '{"event": {"body": "/w=="}}'):
        (tmp_path / "other.jsonl").write_text(record)
        ran = byokeep("admin", "reconcile-vault", "vault.log", "--export", "other.jsonl")
        assert ran.code == 2
        assert "not an audit export" in ran.err
    log.write_text("not a log\n")
    assert byokeep("admin", "reconcile-vault", "vault.log").code == 2
    assert byokeep("admin", "reconcile-vault", "nowhere").code == 2


@pytest.mark.parametrize("text", ["", entry("transit/decrypt/byokeep-system") + "\n"])
def test_an_empty_log_proves_nothing(edge, byokeep, tmp_path, text):
    """Shown to fail: without the look at what keyvault has, it passed for a log without faults."""
    (tmp_path / "vault.log").write_text(text)
    ran = byokeep("admin", "reconcile-vault", "vault.log")
    assert ran.code == 0
    assert "nothing was compared" in ran.err
    edge.chain.add("LEASED", lease_id="lea_1")
    byokeep("audit", "export", "-o", "acme.jsonl")
    for arguments in ((), ("--export", "acme.jsonl")):
        ran = byokeep("admin", "reconcile-vault", "vault.log", *arguments)
        assert ran.code == 6
        assert "VAULT_LOG_EMPTY" in ran.err
        assert "nothing was compared" in ran.err
