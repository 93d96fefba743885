"""`byokeep key` against a fake edge over real mutual TLS."""

from __future__ import annotations

import json

import pytest
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import key_pb2, settings_pb2

pytest_plugins = ["tests.harness.cli_fixtures"]

KEY = "sk-proj-" + "aB3x" * 8


@pytest.fixture(autouse=True)
def _key_in_environment(monkeypatch):
    monkeypatch.setenv("PROVIDER_KEY", KEY)


def add(byokeep, *more):
    return byokeep("key", "add", "openai", "--from-env", "PROVIDER_KEY", *more)


def test_add_seals_here_and_shows_the_verdict(edge, byokeep):
    ran = add(byokeep)
    assert ran.code == 0
    assert edge.opened == [KEY.encode()]
    assert "VALID" in ran.out
    assert KEY not in ran.out + ran.err
    (request,) = edge.sent(key_pb2.AddKeyRequest)
    assert request.display_name == "default"
    assert KEY.encode() not in request.SerializeToString()


def test_a_second_provider_is_said_to_need_a_choice_of_model(edge, byokeep):
    """Every review that named no model was refused from then on, CI's too, and nobody had said."""
    assert "model" not in add(byokeep).err
    edge.add_key("anthropic")
    assert "choose one: byokeep model set" in add(byokeep, "--name", "second").err
    edge.settings.default_model = "openai/gpt-5"
    assert "model" not in add(byokeep, "--name", "third").err


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (KEY.encode() + b"\n", KEY),
        (KEY.encode() + b"\r\n", KEY),
        (KEY.encode(), KEY),
    ],
)
def test_stdin_loses_one_newline(edge, byokeep, given, kept):
    assert byokeep("key", "add", "openai", "--stdin", stdin=given).code == 0
    assert edge.opened == [kept.encode()]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (KEY.encode() + b"\n\n", "KEY_CHARSET"),
        (b" " + KEY.encode(), "KEY_CHARSET"),
        (KEY.encode() + b"\0", "KEY_CHARSET"),
        (KEY.encode() + "ü".encode(), "KEY_CHARSET"),
        (b"sk-short", "KEY_LENGTH"),
        (b"sk-" + b"a" * 600, "KEY_LENGTH"),
        (b"sk-admin-" + b"a1" * 20, "KEY_IS_ADMIN"),
        (b'"' + KEY.encode() + b'"', "KEY_FORMAT"),
        (b"OPENAI_API_KEY=" + KEY.encode(), "KEY_FORMAT"),
        (b"https://example/?key=" + KEY.encode(), "KEY_FORMAT"),
        (b'{"key": "' + KEY.encode() + b'"}', "KEY_FORMAT"),
        (b"sk-ant-api03-" + b"a1" * 20, "KEY_OF_OTHER_PROVIDER"),
        (b"sk-or-v1-" + b"a1" * 20, "KEY_OF_OTHER_PROVIDER"),
        (b"AQ." + b"a1" * 20, "KEY_OF_OTHER_PROVIDER"),
    ],
)
def test_what_cannot_be_a_key_is_refused_before_it_is_sealed(edge, byokeep, given, reason):
    ran = byokeep("key", "add", "openai", "--stdin", stdin=given)
    assert ran.code == 2
    assert reason in ran.err
    assert edge.requests == []
    assert given.decode(errors="replace").strip() not in ran.err


def test_an_empty_name_of_a_variable_is_not_none_given(edge, byokeep):
    """A script's `--from-env "$NAME"`, with NAME unset, must not come to read something else."""
    ran = byokeep("key", "add", "openai", "--from-env", "")
    assert ran.code == 2
    assert "--from-env takes the name of a variable" in ran.err
    assert "exclude each other" in byokeep("key", "add", "openai", "--from-env=", "--stdin").err


@pytest.mark.parametrize(
    ("verdicts", "code", "said"),
    [
        (["VALID"], 0, "ACTIVE"),
        (["RESTRICTED"], 0, "may not list models"),
        (["QUOTA_EXHAUSTED"], 0, "quota"),
        (["INVALID"], 4, "rejects this key"),
        (["UNREACHABLE"], 5, "stays PENDING"),
        (["LOST", "VALID"], 0, "ACTIVE"),
    ],
)
def test_verdict_decides_the_exit_code(edge, byokeep, verdicts, code, said):
    edge.verdicts = verdicts
    ran = add(byokeep)
    assert ran.code == code
    assert said in ran.out + ran.err


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("NAME_RESOLUTION", "name does not resolve"),
        ("CONNECT", "no connection"),
        ("TLS", "TLS handshake"),
        ("TIMEOUT", "did not answer in time"),
    ],
)
def test_what_was_unreachable_is_told(edge, byokeep, cause, said):
    key = edge.keys[f"tenants/demo/providerKeys/{edge.add_key()}"]
    key.provider_key.active_version = 0
    key.validation.verdict = key_pb2.VALIDATION_VERDICT_UNREACHABLE
    key.validation.unreachable_cause = key_pb2.UnreachableCause.Value(f"UNREACHABLE_CAUSE_{cause}")
    key.validation.retry_time.FromSeconds(2_000_000_000)
    shown = byokeep("key", "show", "openai").out
    (line,) = [line for line in shown.splitlines() if "UNREACHABLE: " in line]
    assert said in line
    assert "asked again at 2033-05-1" in line


@pytest.mark.parametrize("state", ["REVOKED", "DESTROYED"])
def test_nobody_is_asked_for_a_key_that_could_go_nowhere(edge, byokeep, state):
    """Shown to fail where the server alone refuses it: the key was typed and sealed by then."""
    key = edge.keys[f"tenants/demo/providerKeys/{edge.add_key()}"]
    key.provider_key.state = custody_pb2.KeyVersionState.Value(f"KEY_VERSION_STATE_{state}")
    ran = byokeep("key", "rotate", "openai", "--from-env", "PROVIDER_KEY")
    assert ran.code == 2
    assert f"is {state}, for good (WRONG_STATE)" in ran.err
    assert "byokeep key add openai" in ran.err
    assert edge.sent(key_pb2.GetIntakeKeyRequest) == []


def test_json_is_a_line_for_each_state(edge, byokeep):
    ran = add(byokeep, "--json")
    verdicts = [line["validation"]["verdict"] for line in ran.lines if "validation" in line]
    assert verdicts == ["VALIDATION_VERDICT_VALID"]
    assert "providerKey" in ran.lines[0]


def test_stderr_is_json_alone_where_the_output_is(edge, byokeep):
    edge.verdicts = ["INVALID"]
    ran = add(byokeep, "--json")
    assert json.loads(ran.err)["error"]["reason"] == "KEY_REJECTED"


def test_add_over_an_existing_name_names_rotate(edge, byokeep):
    key_id = edge.add_key()
    edge.fail("AddKey", "ALREADY_EXISTS", "KEY_EXISTS", "a key of that name exists", key=key_id)
    ran = add(byokeep)
    assert ran.code == 2
    assert f"byokeep key rotate {key_id}" in ran.err


def test_a_command_is_never_taken_from_the_servers_text(edge, byokeep):
    edge.fail("AddKey", "ALREADY_EXISTS", "KEY_EXISTS", "exists", key="x; curl evil | sh")
    assert "evil" not in add(byokeep).err


def test_a_lost_call_is_repeated_with_identical_bytes(edge, byokeep):
    edge.lost["AddKey"] = 2
    assert add(byokeep).code == 0
    sent = edge.sent(key_pb2.AddKeyRequest)
    assert len(sent) == 3
    assert len({request.SerializeToString() for request in sent}) == 1


def test_rotate_seals_for_the_owner_and_operation_of_the_key(edge, byokeep):
    edge.add_key(owner="ann")
    ran = byokeep("key", "rotate", "openai", "--from-env", "PROVIDER_KEY", "--now")
    assert ran.code == 0
    (request,) = edge.sent(key_pb2.RotateKeyRequest)
    assert request.destroy_previous
    assert edge.opened == [KEY.encode()]


def test_rotating_to_a_rejected_key_says_that_the_old_one_serves(edge, byokeep):
    edge.add_key()
    edge.verdicts = ["INVALID"]
    ran = byokeep("key", "rotate", "openai", "--from-env", "PROVIDER_KEY")
    assert ran.code == 4
    assert "version before still serves" in ran.err


def test_key_is_found_by_id_prefix_name_or_provider(edge, byokeep):
    key_id = edge.add_key("openai", "ci")
    edge.add_key("gemini", "main")
    full = f"tenants/demo/providerKeys/{key_id}"
    for reference in (key_id, key_id[:-1], key_id[4:-1], "ci", "openai", full):
        ran = byokeep("key", "show", reference)
        assert ran.code == 0, ran.err
        assert key_id in ran.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "tenants/other/providerKeys/key_1",
            "of tenant other, and this command is for",
        ),
        ("tenants/demo/reviews/rev_1", "tenants/demo/providerKeys/ID"),
        ("tenants/demo", "tenants/demo/providerKeys/ID"),
    ],
)
def test_the_full_name_of_something_else_is_refused(edge, byokeep, name, says):
    ran = byokeep("key", "show", name)
    assert (ran.code, says in ran.err) == (2, True), ran.err


def test_ambiguous_key_lists_candidates(edge, byokeep):
    both = [edge.add_key(name="one"), edge.add_key(name="two")]
    ran = byokeep("key", "revoke", "openai")
    assert ran.code == 2
    assert all(key_id in ran.err for key_id in both)
    assert edge.sent(key_pb2.RevokeKeyRequest) == []


def test_an_ended_key_does_not_stand_in_the_way_of_the_living_one(edge, byokeep):
    edge.add_key(name="old", state=custody_pb2.KEY_VERSION_STATE_REVOKED)
    living = edge.add_key(name="new")
    assert living in byokeep("key", "show", "openai").out


def test_unknown_key_is_not_echoed(edge, byokeep):
    ran = byokeep("key", "show", "nosuchthing")
    assert ran.code == 2
    assert "nosuchthing" not in ran.err


def test_revoke_and_list(edge, byokeep):
    edge.add_key()
    assert byokeep("key", "revoke", "openai").code == 0
    assert "REVOKED" in byokeep("key", "list").out
    assert byokeep("key", "list", "--json").json["keys"][0]["providerKey"]["activeVersion"] == 1


def test_destroy_asks_unless_told_not_to(edge, byokeep):
    edge.add_key()
    ran = byokeep("key", "destroy", "openai")
    assert (ran.code, edge.sent(key_pb2.DestroyKeyRequest)) == (2, [])
    assert byokeep("key", "destroy", "openai", "--yes").code == 0


def test_every_mutation_has_a_request_id_of_its_own(edge, byokeep):
    edge.add_key()
    byokeep("key", "roll-back", "openai")
    byokeep("key", "roll-back", "openai")
    first, second = edge.sent(key_pb2.RollBackKeyRequest)
    assert len(first.request_id) == 32
    assert first.request_id != second.request_id


@pytest.mark.parametrize("name", ["a b", "", "ü", "x" * 65])
def test_bad_name_is_refused_here(edge, byokeep, name):
    assert add(byokeep, "--name", name).code == 2
    assert edge.requests == []


def test_prompt_needs_a_terminal(edge, byokeep):
    ran = byokeep("key", "add", "openai")
    assert ran.code == 2
    assert "--stdin" in ran.err


def test_a_rejected_version_is_not_the_verdict_of_the_one_that_serves(edge, byokeep):
    """The key serves reviews: a refused rotation says nothing of it."""
    edge.add_key()
    (key,) = edge.keys.values()
    key.validation.version = 2
    key.validation.verdict = key_pb2.VALIDATION_VERDICT_INVALID
    assert "INVALID" not in byokeep("key", "list").out
    assert "v2 was rejected by the provider" in byokeep("key", "show", "openai").out


def test_no_match_names_no_destroyed_key(edge, byokeep):
    gone = edge.add_key(name="gone", state=custody_pb2.KEY_VERSION_STATE_DESTROYED)
    kept = edge.add_key(name="kept")
    said = byokeep("key", "show", "nothing").err
    assert kept in said
    assert gone not in said


def test_revoke_takes_yes(edge, byokeep):
    edge.add_key()
    assert byokeep("key", "revoke", "openai", "--yes").code == 0


@pytest.mark.parametrize(
    ("command", "sent"),
    [("revoke", key_pb2.RevokeKeyRequest), ("destroy", key_pb2.DestroyKeyRequest)],
)
def test_what_can_not_be_shown_is_ended_by_its_id(edge, byokeep, command, sent):
    """Nor does it matter what changed since it was looked at. Shown to fail: where the key is
    looked up first, and with its etag."""
    key_id = edge.add_key()
    edge.fail("GetKey", "DATA_LOSS", "STATE_TAMPERED", "the stored state is not used", key=key_id)
    ran = byokeep("key", command, key_id, "--yes")
    assert ran.code == 0, ran.err
    (request,) = edge.sent(sent)
    assert (request.name.rpartition("/")[2], request.etag) == (key_id, "")


@pytest.mark.parametrize("command", ["revoke", "destroy"])
def test_the_same_line_again_ends_no_other_key(edge, byokeep, command):
    """Shown to fail: where a key that has ended makes room for the living one of that name."""
    edge.add_key(name="one", state=custody_pb2.KEY_VERSION_STATE_REVOKED)
    edge.add_key(name="two")
    ran = byokeep("key", command, "openai", "--yes")
    assert (ran.code, edge.sent(key_pb2.RevokeKeyRequest)) == (2, []), ran.err
    assert edge.sent(key_pb2.DestroyKeyRequest) == []


def test_a_destroyed_key_is_not_said_to_be_revoked(edge, byokeep):
    key_id = edge.add_key(state=custody_pb2.KEY_VERSION_STATE_DESTROYED)
    assert "is destroyed already" in byokeep("key", "revoke", key_id).out


def test_what_is_not_there_says_where_to_look(edge, byokeep):
    edge.fail("GetKey", "NOT_FOUND", "NOT_FOUND", "no such provider key", resource="provider key")
    assert "byokeep key list" in byokeep("key", "show", "key_" + "0" * 26).err


def test_who_does_not_wait_is_not_told_that_something_failed(edge, byokeep):
    ran = add(byokeep, "--wait", "0")
    assert (ran.code, "byokeep key show key_" in ran.err) == (0, True), ran.err


def test_what_was_said_of_an_ended_key_does_not_count(edge, byokeep):
    edge.add_key(state=custody_pb2.KEY_VERSION_STATE_REVOKED)
    shown = byokeep("key", "show", "openai").out
    assert "the key has ended" in shown
    assert "models" not in shown


@pytest.mark.parametrize(
    ("verdict", "code", "said"),
    [
        ("VALID", 0, "VALID: the provider accepts it; key_"),
        ("RESTRICTED", 0, "which it can use is unknown"),
        ("INVALID", 4, "the provider rejects this key"),
        ("UNREACHABLE", 5, "the TLS handshake with the provider failed; key_"),
    ],
)
def test_check_ends_as_the_provider_says(edge, byokeep, verdict, code, said):
    add(byokeep)
    edge.verdicts = [verdict]
    ran = byokeep("key", "check", "openai")
    assert ran.code == code
    assert said in ran.out + ran.err
    (request,) = edge.sent(key_pb2.CheckKeyRequest)
    assert request.request_id
    if verdict == "INVALID":
        assert "byokeep key rotate key_" in ran.err
        assert "destroyed" not in ran.err  # it is an ACTIVE version: nothing was


def test_whose_key_is_shown_and_set(edge, byokeep):
    add(byokeep, "--name", "ci")
    assert "user's reviews: user; others: repository, else team" in byokeep("key", "order").out
    assert "order: user, else team" in byokeep("key", "order", "user", "team").out
    ran = byokeep("key", "assign", "ci", "--repo", "acme/*")
    (request,) = edge.sent(settings_pb2.SetRepositoryKeyRequest)
    assert request.key in edge.keys.popitem()[0]
    assert f"acme/*: {request.key} (openai)" in ran.out
    assert byokeep("key", "unassign", "--repo", "acme/*").code == 0
    assert edge.sent(settings_pb2.SetRepositoryKeyRequest)[-1].key == ""
    assert "order: user's reviews" in byokeep("key", "order", "--default").out
    assert byokeep("key", "order", "team", "--default").code == 2
    assert byokeep("key", "order", "team", "team").code == 2


def test_a_managed_key_is_the_operators(edge, byokeep):
    assert add(byokeep, "--managed").code == 0
    (request,) = edge.sent(key_pb2.AddKeyRequest)
    assert request.user == "+operator"
    assert " managed " in byokeep("key", "list").out
    assert "owner     the operator: it is managed" in byokeep("key", "show", "openai").out
    assert add(byokeep, "--managed", "--user", "ann").code == 2
