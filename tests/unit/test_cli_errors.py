"""Errors of the command: exit codes, sentences, hints, JSON, no traceback."""

from __future__ import annotations

import datetime
import json

import grpc
import pytest
import typer
from byokeep.cli.base import errors
from byokeep.cli.base.errors import BY_CODE, BY_FAILURE, BY_REASON, HINTS, Exit
from byokeep.common.v1 import error_reason_pb2
from byokeep.errors import ErrorInfo
from byokeep.orchestrator.v1 import key_pb2, review_pb2

pytest_plugins = ["tests.harness.cli_fixtures"]

REASONS = {name.removeprefix("ERROR_REASON_") for name, _ in error_reason_pb2.ErrorReason.items()}


def test_tables_name_only_what_exists():
    failures = review_pb2.FailureReason.keys()
    assert set(BY_REASON) <= REASONS
    assert set(HINTS) <= REASONS
    assert {f"FAILURE_REASON_{name}" for name in BY_FAILURE} <= set(failures)
    assert set(BY_CODE) == {code.name for code in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize(
    ("code", "reason", "exit_code", "hint"),
    [
        ("INVALID_ARGUMENT", "INVALID_FIELD", Exit.INPUT, ""),
        ("NOT_FOUND", "NOT_FOUND", Exit.INPUT, ""),
        ("ABORTED", "REQUEST_ID_CONFLICT", Exit.INPUT, "--request-id"),
        ("FAILED_PRECONDITION", "NO_MODEL", Exit.INPUT, "byokeep model set"),
        ("PERMISSION_DENIED", "TENANT_NOT_ALLOWED", Exit.PERMISSION, "byokeep caller allow"),
        ("UNAUTHENTICATED", "IDENTITY_INVALID", Exit.PERMISSION, "byokeep doctor"),
        ("FAILED_PRECONDITION", "NO_ACTIVE_KEY", Exit.KEY, "byokeep key add openai"),
        ("FAILED_PRECONDITION", "KEY_NEEDS_REKEY", Exit.KEY, "byokeep key rotate key_"),
        ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE", Exit.UNAVAILABLE, "byokeep doctor"),
        ("RESOURCE_EXHAUSTED", "OVERLOADED", Exit.UNAVAILABLE, ""),
        ("INTERNAL", "INTERNAL", Exit.UNAVAILABLE, ""),
        ("DATA_LOSS", "ROW_TAMPERED", Exit.INTEGRITY, ""),
        ("FAILED_PRECONDITION", "DATABASE_ROLLED_BACK", Exit.INTEGRITY, "resume-leases"),
    ],
)
def test_each_refusal_has_its_exit_code_reason_and_hint(
    edge, byokeep, code, reason, exit_code, hint
):
    metadata = {"provider": "openai", "key": "key_" + "0" * 26}
    edge.fail("ListKeys", code, reason, "A sentence for people.", **metadata)
    ran = byokeep("key", "list")
    assert ran.code == exit_code
    assert f"error: A sentence for people. ({reason})" in ran.err
    assert hint in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    ("metadata", "hint"),
    [
        ({"user": "ann"}, "→ byokeep key add openai --user ann"),
        ({"user": "ann; rm -rf ."}, "→ byokeep key add openai\n"),
        ({"state": "PENDING"}, "→ byokeep key show key_000"),
        ({"state": "REVOKED"}, "name another with --key"),
    ],
)
def test_the_hint_fits_what_is_known(edge, byokeep, metadata, hint):
    known = {"provider": "openai", "key": "key_" + "0" * 26, **metadata}
    edge.fail("ListKeys", "FAILED_PRECONDITION", "NO_ACTIVE_KEY", "No active key.", **known)
    assert hint in byokeep("key", "list").err


@pytest.mark.parametrize("reason", ["BAD_REQUEST", "REFUSED", "CONTEXT_TOO_LONG"])
def test_what_ends_alike_each_time_is_not_to_be_retried(reason):
    assert "retry" not in errors.failure_hint(reason, "key_1", "rev_1")


def test_every_failure_of_a_review_has_a_hint_that_is_a_command():
    """The API's sentences name none: see test_service_errors."""
    for value in review_pb2.FailureReason.DESCRIPTOR.values[1:]:
        reason = value.name.removeprefix("FAILURE_REASON_")
        hint = errors.failure_hint(reason, "key_1", "rev_1")
        assert "byokeep " in hint or "key_1" in hint or "rev_1" in hint, reason
        assert "{" not in hint + errors.wait_hint(reason, "key_1")


@pytest.mark.parametrize(
    ("field", "said", "shown"),
    [
        ("input.title", "must be at most 500 characters", "--title must be at most 500"),
        (
            "input.head_commit",
            "does not match regex pattern `^([0-9a-f]{7,64})?$`",
            "--head takes 7",
        ),
        ("input.context_files[3].path", "does not match regex pattern `x`", "--context has a form"),
        (
            "caller.spiffe_id",
            "a SPIFFE ID of this deployment's trust domain expected",
            "SPIFFE_ID takes one of this deployment's own trust domain",
        ),
        ("etag", "must be at most 64 characters", "etag must be at most 64 characters"),
    ],
)
def test_a_refused_field_is_told_by_what_was_typed(edge, byokeep, field, said, shown):
    edge.fail("ListKeys", "INVALID_ARGUMENT", "INVALID_FIELD", f"{field}: {said}", field=field)
    ran = byokeep("key", "list")
    assert f"error: {shown}" in ran.err
    assert "regex" not in ran.err


def test_errors_are_json_where_output_is(edge, byokeep):
    edge.fail("ListKeys", "PERMISSION_DENIED", "TENANT_NOT_ALLOWED", "No.", tenant="demo")
    for arguments in (("key", "list", "--json"), ("--format", "json", "key", "list")):
        error = json.loads(byokeep(*arguments).err)["error"]
        assert error["reason"] == "TENANT_NOT_ALLOWED"
        assert error["code"] == "PERMISSION_DENIED"
        assert error["exit"] == 3
        assert error["metadata"] == {"tenant": "demo"}
    error = json.loads(byokeep("model", "set", "gpt-5", "--json").err)["error"]
    assert sorted(error) == ["exit", "hint", "message"]


def test_usage_errors_are_json_too(edge, byokeep):
    error = json.loads(byokeep("key", "nonsense", "--json").err)["error"]
    assert error["reason"] == "USAGE"


def test_no_error_writes_control_characters(edge, byokeep):
    edge.fail("ListKeys", "NOT_FOUND", "NOT_FOUND", "gone\x1b[2J\r\nerror: forged", field="\x1b[0m")
    ran = byokeep("key", "list", "--verbose")
    assert "\x1b" not in ran.err
    assert "\nerror: forged" not in ran.err


def test_a_service_that_is_away_is_named(edge, byokeep):
    edge.stop()
    ran = byokeep("key", "list", "--verbose")
    assert ran.code == 5
    where = f"the orchestrator at {edge.addresses['orchestrator']}"
    assert f"{where} can't be reached: the connection is refused" in ran.err
    assert "byokeep doctor" in ran.err
    assert "UNAVAILABLE" in ran.err


@pytest.mark.parametrize(
    ("arguments", "help_"),
    [
        (("review", "--diff"), "byokeep review --help"),
        (("--tenant", "demo", "review", "list", "--repo"), "byokeep review list --help"),
        (("key", "add", "openai", "--name"), "byokeep key add --help"),
        (("--tenant",), "byokeep --help"),
    ],
)
def test_an_option_without_its_value_names_the_help_that_has_it(edge, byokeep, arguments, help_):
    """Shown to fail without the walk in `usage._path`: typer gives such errors no context."""
    ran = byokeep(*arguments)
    assert ran.code == 2
    assert f"{arguments[-1]} needs a value" in ran.err
    assert f"→ {help_}\n" in ran.err


def test_a_clock_that_is_off_is_no_untrusted_key(edge, byokeep, monkeypatch):
    """Shown to fail where `verify_statement` has one error for both: it said to get trust.json
    again."""
    monkeypatch.setenv("PROVIDER_KEY", "sk-proj-" + "aB3x" * 8)
    edge.intake_from += datetime.timedelta(hours=3)
    ran = byokeep("key", "add", "openai", "--from-env", "PROVIDER_KEY")
    assert ran.code == 2
    assert "this machine's clock says" in ran.err
    assert "(CLOCK)" in ran.err
    assert "set this machine's clock" in ran.err
    assert "trust.json" not in ran.err
    assert edge.sent(key_pb2.AddKeyRequest) == []


def test_a_server_that_hangs_up_on_an_old_certificate_is_not_away(edge, byokeep):
    now = datetime.datetime.now(datetime.UTC)
    edge.ca.issue(edge.directory / "developer", spiffe_id="client/developer", not_after=now)
    ran = byokeep("key", "list")
    assert ran.code == 5
    assert "this client's certificate is valid from" in ran.err


def test_a_server_that_says_nothing_is_not_said_to_refuse_the_certificate():
    """What gRPC says of a stopped orchestrator after its 20 s: nobody looked at a certificate."""
    words = "last error: UNAVAILABLE: ipv4:127.0.0.1:1: Handshake read failed (Endpoint closing)"
    said, _ = errors.unreachable(ErrorInfo(grpc.StatusCode.UNAVAILABLE, words), None)
    assert said == "takes the connection, and says nothing on it"


def test_a_service_with_another_name_is_refused(edge, byokeep):
    edge.write_config(orchestrator=edge.addresses["keyvault"])
    ran = byokeep("key", "list")
    assert ran.code == 5
    assert "certificate" in ran.err
    assert edge.requests == []


def test_an_identity_of_another_ca_is_refused(edge, byokeep, tmp_path):
    from deploy.local.pki import CertificateAuthority

    CertificateAuthority.new("byokeep.test").issue(tmp_path / "other", spiffe_id="client/developer")
    edge.write_config(certificate=str(tmp_path / "other.pem"), key=str(tmp_path / "other.key"))
    ran = byokeep("key", "list")
    assert ran.code == 5
    assert edge.requests == []


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_review_formats_are_for_reviews(edge, byokeep, form):
    for arguments in (("--format", form, "key", "list"), ("key", "list", "--format", form)):
        ran = byokeep(*arguments)
        assert (ran.code, "for reviews only" in ran.err) == (2, True)


def test_json_and_another_format_exclude_each_other(edge, byokeep):
    assert byokeep("--json", "review", "list", "--format", "sarif").code == 2


def every_command():
    """Yield the path of each command and group, as typer knows them."""
    from byokeep.cli.app import app

    def walk(node, path):
        yield path
        for name, child in getattr(node, "commands", {}).items():
            yield from walk(child, (*path, name))

    return list(walk(typer.main.get_command(app), ()))


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_help_of_every_command_has_the_common_options_and_examples(byokeep, path):
    ran = byokeep(*path, "--help")
    assert ran.code == 0
    assert all(option in ran.out for option in ("--profile", "--tenant", "--json", "--config"))
    assert "Example" in ran.out or "Commands" in ran.out
    assert ran.err == ""


def test_every_line_of_the_issue_is_there():
    known = {" ".join(path) for path in every_command()}
    expected = {
        "key": "add list show rotate revoke destroy trail",
        "review": "show list cancel retry",
        "model": "list set",
        "tenant": "create list suspend delete set-plan",
        "caller": "allow deny list",
        "audit": "export verify",
    }
    assert {
        f"{group} {name}" for group, names in expected.items() for name in names.split()
    } <= known
    assert {"status", "doctor", "admin status"} <= known


@pytest.mark.parametrize("path", [(), ("key",), ("tenant",), ("caller",), ("audit",), ("admin",)])
def test_a_group_alone_shows_its_help_and_is_an_error(byokeep, path):
    ran = byokeep(*path)
    assert ran.code == 2
    assert "Usage" in ran.out + ran.err
    assert "Traceback" not in ran.err
