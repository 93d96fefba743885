"""`byokeep status` and `byokeep doctor`."""

from __future__ import annotations

import datetime
import functools
import sys

import pytest
from byokeep.orchestrator.v1 import tenant_pb2

from tests.harness.chain import SigningKey
from tests.harness.fake_edge import NAMES

DAY = datetime.timedelta(days=1)

pytest_plugins = ["tests.harness.cli_fixtures"]


def checks(ran):
    return {check["what"].split(":")[0].split()[0]: check for check in ran.json["checks"]}


def test_status(edge, byokeep):
    edge.add_key()
    out = byokeep("status").out
    assert "spiffe://byokeep.test/client/developer" in out
    assert "openai default ACTIVE sk-...AbCd" in out
    told = byokeep("status", "--json").json
    assert (told["tenant"], told["tenantState"]) == ("demo", "ACTIVE")


@pytest.mark.parametrize(
    ("state", "says", "way_out"),
    [
        ("SUSPENDED", "demo: suspended", "byokeep tenant suspend demo --resume"),
        ("DELETED", "demo: deleted", "its name is not given twice"),
        (
            None,
            "demo: no role for it, or there is none",
            "byokeep caller allow spiffe://byokeep.test/client/developer --role ROLE --tenant demo;"
            " or byokeep tenant create demo",
        ),
        ("MISSING", "demo: there is no tenant of that name", "byokeep tenant create demo"),
    ],
)
def test_a_tenant_out_of_service_is_shown_with_the_way_out(edge, byokeep, state, says, way_out):
    """Shown to fail where `tenant_state` says ACTIVE whatever was listed."""
    if state in (None, "MISSING"):
        del edge.tenants["tenants/demo"]
        if state:
            edge.fail("ListCallers", "NOT_FOUND", "NOT_FOUND", "no such tenant", resource="tenant")
        else:
            edge.denied.add("ListCallers")
    else:
        number = tenant_pb2.TenantState.Value(f"TENANT_STATE_{state}")
        edge.tenants["tenants/demo"].state = number
    if state in ("MISSING", "DELETED"):
        # As the orchestrator answers operators.
        edge.fail("ListKeys", "FAILED_PRECONDITION", "WRONG_STATE", "the tenant is deleted")
    for command in ("status", "doctor"):
        out = " ".join(byokeep(command).out.split())
        assert says in out
        assert way_out in out
        assert "✓ leases" not in out
    assert byokeep("status").code == 0
    assert byokeep("doctor").code == 5
    assert byokeep("status", "--json").json["tenantState"] == state


def test_status_without_rights_at_keyvault(edge, byokeep):
    edge.denied.add("GetStatus")
    assert byokeep("status").code == 0
    assert byokeep("status", "--json").json["keyvault"] is None


def test_doctor_finds_nothing(edge, byokeep):
    ran = byokeep("doctor")
    assert ran.code == 0
    assert "all is well" in ran.out
    assert "✗" not in ran.out


def test_doctor_shows_roles_that_are_lacking(edge, byokeep):
    edge.denied |= {"DryRunReview", "GetStatus"}
    ran = byokeep("doctor")
    assert ran.code == 0
    assert "· submitter: review: no" in ran.out
    assert "· operator at keyvault: no" in ran.out
    assert "✓ auditor at keyvault: yes" in ran.out


def _key_open(edge):
    (edge.directory / "developer.key").chmod(0o644)


def _garbage(edge):
    (edge.directory / "developer.pem").write_text("garbage")


def _expired(edge):
    now = datetime.datetime.now(datetime.UTC)
    edge.ca.issue(edge.directory / "developer", spiffe_id="c", not_after=now)


def _of_tomorrow(edge):
    now = datetime.datetime.now(datetime.UTC)
    edge.ca.issue(edge.directory / "developer", spiffe_id="c", not_before=now + DAY)


def _server_of(edge, **life):
    dns = NAMES["orchestrator"]
    issue, edge.ca.issue = edge.ca.issue, functools.partial(edge.ca.issue, **life)
    edge.serve("orchestrator", dns, edge._add_orchestrator)
    edge.ca.issue = issue
    edge.write_config()


def _server_expired(edge):
    _server_of(edge, not_after=datetime.datetime.now(datetime.UTC))


def _server_of_tomorrow(edge):
    _server_of(edge, not_before=datetime.datetime.now(datetime.UTC) + DAY)


def _nameless(edge):
    edge.ca.issue(edge.directory / "developer", uris=[])


def _key_of_another(edge):
    edge.ca.issue(edge.directory / "other", spiffe_id="c")
    (edge.directory / "other.key").rename(edge.directory / "developer.key")


def _away(edge):
    edge.write_config(orchestrator="127.0.0.1:1")


def _nowhere(edge):
    edge.write_config(orchestrator="nowhere.invalid:443")


def _misnamed(edge):
    edge.write_config(orchestrator=edge.addresses["keyvault"])


def _unpinned(edge):
    edge.intake = SigningKey("isk")


def _clock(edge):
    edge.intake_from += datetime.timedelta(hours=3)


def _stranger(edge):
    edge.tenants.clear()


@pytest.mark.parametrize(
    ("breakage", "what", "found"),
    [
        (_key_open, "identity", "others than its owner"),
        (_garbage, "identity", "developer.pem is not PEM"),
        (_expired, "certificate", "until"),
        (_nameless, "certificate", "no SPIFFE ID"),
        (_key_of_another, "certificate", "another certificate"),
        (_of_tomorrow, "certificate", "valid from"),
        (_server_expired, "orchestrator", "has expired by this machine's clock"),
        (_server_of_tomorrow, "orchestrator", "not valid yet by this machine's clock"),
        (_away, "orchestrator", "the connection is refused"),
        (_nowhere, "orchestrator", "does not resolve"),
        (_misnamed, "orchestrator", "another service"),
        (_unpinned, "intake", "not trusted"),
        (_clock, "clock", "this machine's clock says"),
        (_stranger, "tenant", "no role"),
    ],
)
def test_doctor_names_what_is_wrong_and_what_to_do(edge, byokeep, breakage, what, found):
    breakage(edge)
    ran = byokeep("doctor", "--json")
    check = checks(ran)[what]
    assert check["ok"] is False
    assert found in check["found"]
    assert check["remedy"]
    assert ran.code == 5


def test_doctor_without_a_configuration(byokeep, monkeypatch, tmp_path):
    monkeypatch.delenv("BYOKEEP_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    ran = byokeep("doctor")
    assert ran.code == 5
    assert "there is no configuration" in ran.out


def test_doctor_without_a_keyvault_address(edge, byokeep):
    edge.write_config(vault=False)
    assert "no address" in byokeep("doctor").out
