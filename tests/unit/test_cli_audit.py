"""`byokeep audit export` and `verify`."""

from __future__ import annotations

import datetime
import json
import time

import pytest

from tests.harness.chain import SigningKey

pytest_plugins = ["tests.harness.cli_fixtures"]


@pytest.fixture
def exported(edge, byokeep, tmp_path):
    for _ in range(5):
        edge.chain.add("LEASED", key_id="key_" + "0" * 26)
    ran = byokeep("audit", "export", "-o", "chain.jsonl")
    assert ran.code == 0
    assert "5 events" in ran.err
    return tmp_path / "chain.jsonl"


def test_an_export_verifies_offline(edge, byokeep, exported):
    edge.stop()
    ran = byokeep("audit", "verify", "chain.jsonl")
    assert ran.code == 0
    assert "holds" in ran.out
    assert byokeep("audit", "verify", "chain.jsonl", "--json").json["events"] == 5


def test_trust_bundle_may_be_given_without_any_profile(edge, byokeep, exported, monkeypatch):
    monkeypatch.setenv("BYOKEEP_CONFIG", "nowhere")
    trust = str(edge.directory / "trust.json")
    assert byokeep("audit", "verify", "chain.jsonl", "--trust", trust).code == 0
    assert byokeep("audit", "verify", "chain.jsonl").code == 2


def test_standard_output_and_input(edge, byokeep, exported):
    text = byokeep("audit", "export").out
    assert text.splitlines()[:-1] == exported.read_text().splitlines()[:-1]
    assert byokeep("audit", "verify", "-", stdin=text.encode()).code == 0


def test_a_broken_link_is_named_and_exits_6(byokeep, exported):
    lines = exported.read_text().splitlines()
    lines[2] = lines[2].replace('"hash": "', '"hash": "AAAA')
    exported.write_text("\n".join(lines))
    ran = byokeep("audit", "verify", "chain.jsonl")
    assert ran.code == 6
    assert "link 3" in ran.err
    error = json.loads(byokeep("audit", "verify", "chain.jsonl", "--json").err)["error"]
    assert error["metadata"]["sequence"] == "3"


def test_a_shorter_chain_is_found_against_an_older_head(edge, byokeep, exported, tmp_path):
    (tmp_path / "older.jsonl").write_text(exported.read_text().splitlines()[-1])
    grown = byokeep("audit", "verify", "chain.jsonl", "--against", "older.jsonl")
    assert grown.code == 0
    assert "link 5" in grown.out
    del edge.chain.links[3:]
    byokeep("audit", "export", "-o", "short.jsonl")
    assert byokeep("audit", "verify", "short.jsonl").code == 0
    ran = byokeep("audit", "verify", "short.jsonl", "--against", "older.jsonl")
    assert ran.code == 6
    assert "link 4" in ran.err


def test_a_failed_export_leaves_the_older_file_alone(edge, byokeep, exported):
    before = exported.read_text()
    edge.fail("ExportEvents", "PERMISSION_DENIED", "CALLER_NOT_ALLOWED", "not an auditor")
    assert byokeep("audit", "export", "-o", "chain.jsonl").code == 3
    assert exported.read_text() == before
    assert [path.name for path in exported.parent.glob("*.part")] == []


def test_an_export_is_written_through_no_link(edge, byokeep, exported):
    """Shown to fail with a scratch file of a name that can be foreseen."""
    folder = exported.parent
    mine = folder / "authorized_keys"
    mine.write_text("mine")
    (folder / ".other.jsonl.part").symlink_to(mine)
    (folder / "other.jsonl").symlink_to(mine)
    assert byokeep("audit", "export", "-o", "other.jsonl").code == 0
    assert mine.read_text() == "mine"
    assert not (folder / "other.jsonl").is_symlink()
    assert byokeep("audit", "verify", "other.jsonl").code == 0


def test_an_export_without_a_head_is_an_error(edge, byokeep, monkeypatch):
    monkeypatch.setattr(type(edge.chain), "head", lambda self: None)
    assert byokeep("audit", "export").code == 5


@pytest.mark.parametrize("text", ["", "PK\x03\x04", '{"name": "x"}\n', "[]\n"])
def test_another_file_is_not_taken_for_a_broken_export(byokeep, exported, tmp_path, text):
    (tmp_path / "other").write_text(text)
    for arguments, what in (
        (("other",), "other is not an audit export"),
        (("chain.jsonl", "--against", "other"), "other is not an older export"),
    ):
        ran = byokeep("audit", "verify", *arguments)
        assert ran.code == 2
        assert what in ran.err


def test_a_file_of_another_chain_is_named(edge, byokeep, exported):
    edge.chain.name = "system"
    edge.chain.events.clear()
    edge.chain.links.clear()
    edge.chain.add("LEASED")
    byokeep("audit", "export", "--chain", "system", "-o", "system.jsonl")
    ran = byokeep("audit", "verify", "chain.jsonl", "--against", "system.jsonl")
    assert ran.code == 6
    assert "chain.jsonl can't be held against system.jsonl: that is of system" in ran.err


def test_an_export_whose_first_line_is_gone_is_broken(byokeep, exported):
    exported.write_text("garbage\n" + exported.read_text().split("\n", 1)[1])
    assert byokeep("audit", "verify", "chain.jsonl").code == 6


def test_empty_lines_cost_no_more_than_others(byokeep, exported):
    """A megabyte of them took 40 minutes.

    Shown to fail: with `\\s*` in _RECORD, which takes every empty line up to the next text anew.
    """
    exported.write_bytes(b"\n" * (1 << 20) + exported.read_bytes())
    assert byokeep("audit", "verify", "chain.jsonl").code == 0
    exported.write_bytes(b"\n" * (1 << 20))
    assert byokeep("audit", "verify", "chain.jsonl").code == 2


@pytest.mark.parametrize(
    "last",
    [
        '{"event": ' + "[" * 100_000,
        '{"head": 5}',
        '{"head": {"\\ud800": "x"}}',
        '{"head": {"keyId": "\\ud800"}}',
        '{"head": {"payload": [[]]}}',
    ],
    ids=["deep", "number", "surrogate", "surrogate value", "list"],
)
def test_what_can_t_be_parsed_is_a_broken_export(byokeep, exported, tmp_path, last):
    """Shown to fail: exit 5, with RecursionError not caught in _record, or only ParseError in
    `end`."""
    lines = exported.read_text().splitlines()
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines[:-1], last, ""]))
    for arguments in (("broken.jsonl",), ("chain.jsonl", "--against", "broken.jsonl")):
        ran = byokeep("audit", "verify", *arguments)
        assert ran.code == 6
        assert "does not hold" in ran.err


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("at", [datetime.datetime.min, datetime.datetime.max])
def test_a_time_that_the_local_zone_can_t_say(edge, byokeep, monkeypatch, zone, at):
    """The first year is not over west of Greenwich, the last one is east of it.

    Shown to fail: with OverflowError not caught in `moment`.
    """
    edge.chain.add("LEASED", at=at.replace(microsecond=0), key_id="key_" + "0" * 26)
    assert byokeep("audit", "export", "-o", "odd.jsonl").code == 0
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        ran = byokeep("audit", "verify", "odd.jsonl")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert ran.code == 0
    assert f"{at.year}-" in ran.out


def test_a_checkpoint_is_kept_and_held_against_a_later_export(edge, byokeep, exported, tmp_path):
    saved = byokeep("audit", "checkpoint", "--save", "held.json")
    assert saved.code == 0
    (tmp_path / "note").write_text(byokeep("audit", "checkpoint").out)
    edge.chain.log.others(3)
    edge.chain.add("LEASED", key_id="key_" + "0" * 26)
    for held in ("held.json", "note"):
        assert byokeep("audit", "export", "--since", held, "-o", "newer.jsonl").code == 0
        ran = byokeep("audit", "verify", "newer.jsonl", "--against", held)
        assert ran.code == 0
        assert "not rewritten" in ran.out
    assert byokeep("audit", "verify", "newer.jsonl", "--json").json["logSize"] > 3
    # What is older than the checkpoint does not pass for the newest.
    ran = byokeep("audit", "verify", "chain.jsonl", "--against", "note")
    assert ran.code == 6
    assert "may be missing" in ran.err
    assert "not shown" in byokeep("audit", "verify", "chain.jsonl").out


def test_checkpoints_are_listed(edge, byokeep, exported):
    ran = byokeep("audit", "checkpoint", "--list")
    assert ran.out.startswith("byokeep/test/audit\n1\n")
    listed = byokeep("audit", "checkpoint", "--list", "--json")
    assert listed.lines[0]["checkpoint"] == ran.out


def test_a_file_without_a_checkpoint_is_nothing_to_start_from(byokeep, exported, tmp_path):
    (tmp_path / "other").write_text("nothing\n")
    assert byokeep("audit", "export", "--since", "other").code == 2


def test_a_key_that_is_not_pinned_is_named_and_is_no_tampering(edge, byokeep, exported):
    """Shown to fail: with UnpinnedKeyError treated as any VerificationError."""
    edge.chain.key = SigningKey("alk")
    exporting = byokeep("audit", "export", "-o", "newer.jsonl")
    assert exporting.code == 0
    assert edge.chain.key.key_id in exporting.err
    for ran in (
        byokeep("audit", "verify", "newer.jsonl", "--json"),
        byokeep("audit", "verify", "chain.jsonl", "--against", "newer.jsonl", "--json"),
        byokeep("audit", "checkpoint", "--json"),
    ):
        assert ran.code == 6
        error = json.loads(ran.err.splitlines()[-1])["error"]
        assert error["reason"] == "AUDIT_KEY_UNKNOWN"
        assert error["metadata"] == {"key": edge.chain.key.key_id}
        assert "trust.json from your operator" in error["hint"]
        assert ran.out == ""


def test_doctor_sees_an_audit_key_that_is_not_pinned(edge, byokeep):
    def audit_key() -> dict:
        checks = byokeep("doctor", "--json").json["checks"]
        return next(one for one in checks if one["what"] == "audit log key")

    assert audit_key()["ok"] is True
    edge.chain.key = SigningKey("alk")
    assert audit_key()["ok"] is False
    assert edge.chain.key.key_id in audit_key()["found"]


def test_what_was_written_is_said_as_json(edge, byokeep, exported):
    said = byokeep("audit", "export", "-o", "chain.jsonl", "--json").json
    assert (said["output"], said["events"]) == ("chain.jsonl", 5)
    assert (said["head"]["sequence"], said["head"]["chain"]) == ("5", edge.chain.name)
    saved = byokeep("audit", "checkpoint", "--save", "held.json", "--json").json
    assert saved["output"] == "held.json"
    assert saved["logSize"] == int(saved["head"]["logSize"])


@pytest.mark.parametrize(
    "arguments", [("export", "-o", "{}"), ("checkpoint", "--save", "{}")], ids=lambda one: one[0]
)
@pytest.mark.parametrize(
    ("place", "said"), [("nope/x", "No such file"), (".", "is a folder")], ids=["gone", "folder"]
)
def test_a_place_that_can_t_be_written(edge, byokeep, arguments, place, said):
    """It is said before keyvault is asked for anything."""
    ran = byokeep("audit", *(one.format(place) for one in arguments))
    assert ran.code == 2
    assert said in ran.err
    assert place in ran.err
    assert not edge.requests
