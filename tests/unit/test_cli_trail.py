"""`byokeep key trail`: recorded and reported, merged and drawn."""

from __future__ import annotations

import datetime

import pytest
from byokeep import ids
from byokeep.cli.keys.history import merge
from byokeep.keyvault.v1 import audit_pb2, grant_pb2, lease_pb2
from byokeep.orchestrator.v1 import key_pb2

from tests.harness.chain import START, Chain

pytest_plugins = ["tests.harness.cli_fixtures"]


def at(milliseconds):
    return START + datetime.timedelta(milliseconds=milliseconds)


class Life:
    """A key's chain and uses, built step by step; times are milliseconds."""

    def __init__(self, chain=None, key_id="key_" + "0" * 26):
        self.chain, self.key_id, self.uses = chain or Chain(), key_id, []

    def event(self, kind, when, **values):
        self.chain.add(kind, at(when), key_id=self.key_id, key_version=1, **values)
        return self

    def lease(self, opened, closed=None, *, released=None, leased=None, expired=None, **values):
        lease, attempt = ids.new_id("lea"), ids.new_id("att")
        purpose = grant_pb2.LEASE_PURPOSE_REVIEW
        self.event(
            "LEASED", opened - 5 if leased is None else leased, lease_id=lease,
            attempt_id=attempt, purpose=purpose, review_id="rev_1", caller="spiffe://t/runner/a",
        )  # fmt: skip
        use = key_pb2.KeyUse(
            attempt_id=attempt, number=1, lease_id=lease, process_id=opened, label="acme/shop#7",
            state="COMPLETED", calls_started=2,
        )  # fmt: skip
        use.open_time.FromDatetime(at(opened))
        if closed is not None:
            use.close_time.FromDatetime(at(closed))
        self.uses.append(use)
        if released is not None:
            outcome = values.pop("outcome", lease_pb2.LEASE_OUTCOME_COMPLETED)
            self.event("RELEASED", released, lease_id=lease, outcome=outcome, **values)
        if expired is not None:
            self.event("LEASE_EXPIRED", expired, lease_id=lease)
        return self

    def merged(self):
        return merge(self.chain.events, self.uses)


def test_recorded_and_reported_are_merged_in_order():
    entries, summary = (
        Life().event("STAGED", 0).lease(100, 312, released=320).event("PROMOTED", 400).merged()
    )
    assert [(entry.source, entry.data["type"]) for entry in entries] == [
        ("recorded", "STAGED"),
        ("recorded", "LEASED"),
        ("reported", "OPENED"),
        ("reported", "CLOSED"),
        ("recorded", "RELEASED"),
        ("recorded", "PROMOTED"),
    ]
    assert summary.plaintext_ms == 212
    assert (summary.processes, summary.alive, summary.live_leases) == (1, 0, 0)
    assert (summary.staged, summary.leased) == (1, 1)


def test_a_runner_with_another_clock_is_not_drawn_before_its_lease():
    entries, _ = Life().lease(100, 200, leased=5_000, released=5_100).merged()
    assert [entry.data["type"] for entry in entries] == ["LEASED", "OPENED", "CLOSED", "RELEASED"]


def test_leases_that_overlap_are_told_apart():
    _, summary = Life().lease(100, 400, released=410).lease(200, 300, released=310).merged()
    assert (summary.processes, summary.plaintext_ms) == (2, 400)


@pytest.mark.parametrize(
    ("life", "alive", "unknown", "live"),
    [
        (Life().lease(100, 200, released=210), 0, 0, 0),
        (Life().lease(100), 1, 0, 1),
        (Life().lease(100, released=300), 0, 1, 0),
        (Life().lease(100, expired=900), 0, 1, 0),
        (Life().event("LEASED", 0, lease_id="lea_1"), 1, 0, 1),
    ],
)
def test_what_still_lives_is_counted(life, alive, unknown, live):
    summary = life.merged()[1]
    assert (summary.alive, summary.end_unknown, summary.live_leases) == (alive, unknown, live)


def test_the_report_in_the_chain_counts_where_the_orchestrator_has_none():
    life = Life().lease(100, 200, released=210)
    report = lease_pb2.PlaintextReport(process_id=77)
    report.open_time.FromDatetime(at(100))
    report.close_time.FromDatetime(at(150))
    life.chain.events[-1].report.CopyFrom(report)
    life.uses.clear()
    entries, summary = life.merged()
    assert summary.plaintext_ms == 50
    assert any("process 77 is gone" in entry.title for entry in entries)


def test_unknown_event_types_are_shown_and_not_dropped():
    life = Life()
    life.chain.events.append(audit_pb2.AuditEvent(type=99))
    assert life.merged()[0][0].data["type"] == "UNKNOWN_99"


@pytest.fixture
def lived(edge):
    key_id = edge.add_key()
    life = Life(edge.chain, key_id)
    life.event("STAGED", 0, actor="ann").lease(100, 300, released=320)
    life.lease(1_000, 1_212, released=1_230, outcome=lease_pb2.LEASE_OUTCOME_KEY_REJECTED)
    edge.uses = life.uses
    return edge


def test_drawn_for_people(lived, byokeep):
    out = byokeep("key", "trail", "openai").out
    assert "recorded  v1 sealed, opened once, stored" in out
    assert "reported  process 1000 is gone (COMPLETED); plaintext existed 212 ms" in out
    assert "acme/shop#7" in out
    assert "2 provider calls started" in out
    # As admin revoke-lease takes it.
    assert all(f"lease {use.lease_id} released" in out for use in lived.uses)
    assert (
        "plaintext existed in 2 processes for 412 ms in all; none is alive; leases live now: 0"
        in out
    )
    assert all(line[0] in "●○│ " for line in out.splitlines()[1:-4])


def test_as_ndjson(lived, byokeep):
    lines = byokeep("key", "trail", "openai", "--json").lines
    assert [line["source"] for line in lines[:-1]].count("reported") == 4
    assert lines[-1]["summary"]["plaintext_ms"] == 412
    assert lines[0]["event"]["type"] == "AUDIT_EVENT_TYPE_STAGED"


def test_without_rights_at_keyvault_reports_are_shown_as_what_they_are(lived, byokeep):
    lived.denied.add("ListEvents")
    ran = byokeep("key", "trail", "openai")
    assert ran.code == 0
    assert "not an auditor" in ran.err
    assert "recorded  " not in ran.out
    assert "leases live now: unknown" in ran.out


def test_without_a_keyvault_address(lived, byokeep):
    lived.write_config(vault=False)
    ran = byokeep("key", "trail", "openai")
    assert (ran.code, "no keyvault address" in ran.err) == (0, True)


def test_an_unused_key(edge, byokeep):
    edge.add_key()
    ran = byokeep("key", "trail", "openai")
    assert ran.code == 0
    assert "plaintext existed in 0 processes" in ran.out


def test_a_tenant_without_keys_is_offered_to_add_one(edge, byokeep):
    ran = byokeep("key", "trail", "anthropic")
    assert ran.code == 2
    assert "tenant demo has no key" in ran.err
    assert "→ byokeep key add anthropic\n" in ran.err
