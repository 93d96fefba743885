"""Requirement 47, the client: it seals to a pinned and present intake key of its own, or not."""

from __future__ import annotations

import datetime

import byokeep as client
import pytest
from byokeep import hpke, sealing
from byokeep.orchestrator.v1 import key_pb2

from tests.harness.chain import SigningKey

pytest_plugins = ["tests.harness.cli_fixtures"]

KEY = "sk-proj-" + "CANARY7x" * 4


def unpinned(edge):
    edge.intake = SigningKey("isk")


def foreign(edge):
    edge.intake_deployment = "another"


def over(edge):
    edge.intake_from -= datetime.timedelta(hours=2)


def not_yet(edge):
    edge.intake_from += datetime.timedelta(hours=2)


def weaker(edge):
    edge.intake_suite = hpke.X25519_V1


UNTRUSTED = [unpinned, foreign, weaker]
# Of a pinned key and this deployment, and not for now: a clock is off, or the relay is stale.
NOT_FOR_NOW = [over, not_yet]


@pytest.mark.parametrize("change", [*UNTRUSTED, *NOT_FOR_NOW])
def test_intake_untrusted_refuses_to_seal(edge, change):
    """Shown to fail, each by taking out its protection: the lookup of the pinned key in
    `dsse.verify`, the deployment and the window in `sealing.verify_statement`, the suite in
    `Connection.seal`."""
    change(edge)
    with (
        client.connect() as connection,
        pytest.raises(sealing.UntrustedIntakeKeyError, match=r"refused|clock says") as caught,
    ):
        connection.seal("openai", KEY, "key_" + "0" * 26, "add", "request-1")
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [(change, 6, "INTAKE_UNTRUSTED") for change in UNTRUSTED]
    + [(change, 2, "CLOCK") for change in NOT_FOR_NOW],
)
def test_intake_untrusted_is_named_and_sends_nothing(
    edge, byokeep, change, code, reason, monkeypatch
):
    change(edge)
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    ran = byokeep("key", "add", "openai", "--from-env", "PROVIDER_KEY")
    assert ran.code == code
    assert reason in ran.err
    assert "nothing was sealed" in ran.err
    assert edge.sent(key_pb2.AddKeyRequest) == []
    assert "CANARY" not in ran.out + ran.err


def test_intake_trusted_is_sealed_to(edge):
    """The control: the same call, with nothing changed, seals what keyvault opens."""
    with client.connect() as connection:
        sealed = connection.seal("openai", KEY, "key_" + "0" * 26, "add", "request-1")
    context = sealing.SealContext("demo", "", "openai", "key_" + "0" * 26, "add", "request-1")
    info = context.info("test", sealed.intake_key_id)
    assert edge.private.open(sealed.ciphertext, info) == KEY.encode()
