"""`byokeep review` against a fake edge over real mutual TLS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading

import pytest
from byokeep.cli.reviews import files
from byokeep.orchestrator.v1 import review_pb2, settings_pb2

pytest_plugins = ["tests.harness.cli_fixtures"]

DIFF = b"--- a/app.py\n+++ b/app.py\n@@ -1 +1 @@\n-a\n+b\n"
FINDINGS = [
    review_pb2.Finding(
        path="src/db.py",
        start_line=12,
        end_line=14,
        severity=review_pb2.SEVERITY_HIGH,
        category=review_pb2.CATEGORY_SECURITY,
        title="SQL from input",
        message="A quote in it is enough.",
        suggestion="Use a parameter.",
    ),
    review_pb2.Finding(path="src/app.py", start_line=3, end_line=3, severity=2, title="Unused"),
]
RUNNING = {"state": review_pb2.REVIEW_STATE_RUNNING, "chunks_total": 2}
COMPLETED = {
    "state": review_pb2.REVIEW_STATE_COMPLETED,
    "findings": FINDINGS,
    "finding_count": 2,
    "dropped_findings": 1,
}


def failed(reason, message="it failed"):
    return {
        "state": review_pb2.REVIEW_STATE_FAILED,
        "failure": review_pb2.FailureReason.Value(f"FAILURE_REASON_{reason}"),
        "failure_message": message,
    }


def submit(byokeep, *more):
    return byokeep("review", "--diff", "-", *more, stdin=DIFF)


def sent(edge):
    (request,) = edge.sent(review_pb2.SubmitReviewRequest)
    return request


def git(*arguments):
    return subprocess.run(
        [shutil.which("git"), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, byokeep):
    """A repository with one commit on main; the tests' directory."""
    git("init", "-b", "main", ".")
    git("remote", "add", "origin", "git@github.com:acme/shop.git")
    (tmp_path / "app.py").write_text("a = 1\n")
    git("add", "app.py")
    git("commit", "-m", "one")
    return tmp_path


def test_findings_by_file_then_a_summary(edge, byokeep):
    edge.states = [RUNNING, COMPLETED]
    ran = submit(byokeep)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines.index("src/app.py") < lines.index("src/db.py")
    assert "  src/db.py:12-14  HIGH  security  SQL from input" in lines
    assert "    → Use a parameter." in lines
    assert "2 findings: 1 high, 1 low; 1 dropped" in lines[-1]
    assert "2 calls to openai/gpt-5" in lines[-1]
    assert "running" in ran.err


def test_a_lost_stream_is_taken_up_again(edge, byokeep):
    edge.states = [RUNNING, "lost", RUNNING, COMPLETED]
    assert submit(byokeep).code == 0
    assert len(edge.sent(review_pb2.WatchReviewRequest)) == 2


@pytest.mark.parametrize(
    ("threshold", "code"),
    [("critical", 0), ("high", 1), ("medium", 1), ("low", 1), ("info", 1), (None, 0)],
)
def test_fail_on(edge, byokeep, threshold, code):
    edge.states = [COMPLETED | {"dropped_findings": 0}]
    more = ("--fail-on", threshold) if threshold else ()
    assert submit(byokeep, *more).code == code


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("KEY_REJECTED", 4),
        ("KEY_REVOKED", 4),
        ("QUOTA_EXHAUSTED", 4),
        ("PROVIDER_UNAVAILABLE", 7),
        ("AMBIGUOUS", 7),
        ("TIMEOUT", 7),
        ("INTERNAL", 7),
    ],
)
def test_a_failed_review_says_why(edge, byokeep, reason, code):
    edge.states = [failed(reason, "the reason in a sentence")]
    ran = submit(byokeep)
    assert ran.code == code
    assert "the reason in a sentence" in ran.err
    assert reason in ran.err
    assert "→ " in ran.err
    assert "no findings" not in ran.out


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("KEY_REJECTED", "byokeep key rotate key_1, then byokeep review retry rev_"),
        ("TIMEOUT", "byokeep review retry rev_"),
        ("MODEL_NOT_FOUND", "byokeep model set"),
    ],
)
def test_a_failed_review_says_what_to_do(edge, byokeep, reason, hint):
    edge.states = [failed(reason) | {"key_id": "key_1"}]
    assert hint in submit(byokeep).err


def test_failing_wins_over_fail_on(edge, byokeep):
    edge.states = [failed("TIMEOUT") | {"findings": FINDINGS}]
    assert submit(byokeep, "--fail-on", "low").code == 7


def test_json_is_a_line_for_each_change(edge, byokeep):
    edge.states = [RUNNING, COMPLETED]
    states = [line["state"] for line in submit(byokeep, "--json").lines]
    assert states == ["REVIEW_STATE_RUNNING", "REVIEW_STATE_COMPLETED"]


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_exports(edge, byokeep, form):
    edge.states = [COMPLETED]
    edge.export = '{"export": true}'
    ran = submit(byokeep, "--format", form)
    assert json.loads(ran.out) == {"export": True}
    (request,) = edge.sent(review_pb2.ExportReviewRequest)
    assert request.format == review_pb2.ExportFormat.Value(f"EXPORT_FORMAT_{form.upper()}")


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_dry_run_has_nothing_to_export(edge, byokeep, form):
    """An empty document would be taken for a review without findings."""
    ran = submit(byokeep, "--dry-run", "--format", form)
    assert (ran.code, ran.out) == (2, "")
    assert "text or json" in ran.err
    assert edge.requests == []


@pytest.mark.parametrize(
    "change", [failed("TIMEOUT"), {"state": review_pb2.REVIEW_STATE_CANCELLED}]
)
def test_a_review_that_failed_is_exported_too(edge, byokeep, change):
    """Its SARIF says executionSuccessful: false. Was shown to fail where only COMPLETED is."""
    edge.states = [change]
    edge.export = '{"export": true}'
    ran = submit(byokeep, "--format", "sarif")
    assert (ran.code, json.loads(ran.out)) == (7, {"export": True})


UNREAD = [
    review_pb2.UnreadPart(path="logo\x1b.png", reason=review_pb2.UNREAD_REASON_BINARY),
    review_pb2.UnreadPart(path="lib", reason=review_pb2.UNREAD_REASON_SUBMODULE),
]
PARTLY = COMPLETED | {"unread": UNREAD, "unread_count": 2, "dropped_findings": 0}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("", 0),
        ("--fail-on-unread", 8),
        ("--fail-on critical", 8),
        ("--fail-on critical --no-fail-on-unread", 0),
        ("--fail-on high", 1),
    ],
)
@pytest.mark.parametrize("form", ["text", "json", "sarif"])
def test_a_gate_fails_on_what_nobody_read(edge, byokeep, options, code, form):
    """Was shown to fail with a gate of findings alone."""
    edge.states = [PARTLY]
    assert submit(byokeep, *options.split(), "--format", form).code == code
    review_id = edge.add_review(**PARTLY)
    shown = byokeep("review", "show", review_id, *options.split(), "--format", form)
    assert shown.code == code


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("", 0),
        ("--fail-on critical", 8),
        ("--fail-on critical --no-fail-on-unread", 0),
        ("--fail-on high", 1),
    ],
)
def test_a_finding_that_was_dropped_passes_no_gate_in_silence(edge, byokeep, options, code):
    """A diff that talks the model into a wrong line would hide what it found."""
    edge.states = [COMPLETED]
    ran = submit(byokeep, *options.split())
    assert ran.code == code
    assert ("1 finding dropped" in ran.err) is (code == 8)


def test_what_was_read_whole_passes_the_gate(edge, byokeep):
    edge.states = [COMPLETED | {"dropped_findings": 0}]
    assert submit(byokeep, "--fail-on-unread", "--fail-on", "critical").code == 0


def test_what_nobody_read_is_named(edge, byokeep):
    lines = byokeep("review", "show", edge.add_review(**PARTLY)).out.splitlines()
    assert "read by no model: logo.png (binary file)" in lines
    assert "read by no model: lib (submodule: commits of another repository)" in lines
    assert "2 parts read by no model" in lines[-1]
    many = edge.add_review(**PARTLY | {"unread": UNREAD * 50, "unread_count": 2000})
    assert "read by no model: 1980 more" in byokeep("review", "show", many).out
    assert byokeep("review", "show", many, "--json").json["unread"][1] == {
        "path": "lib",
        "reason": "UNREAD_REASON_SUBMODULE",
    }


@pytest.mark.parametrize(("more", "code"), [((), 0), (("--fail-on-unread",), 8)])
def test_a_dry_run_names_what_nobody_would_read(edge, byokeep, more, code):
    edge.unread = UNREAD
    ran = submit(byokeep, "--dry-run", *more)
    assert ran.code == code
    assert "read by no model: logo.png (binary file)" in ran.out


@pytest.mark.parametrize("options", ["--detach --fail-on high", "--dry-run --fail-on high"])
def test_a_gate_that_nobody_waits_for_is_refused(edge, byokeep, options):
    assert submit(byokeep, *options.split()).code == 2
    assert edge.requests == []


def test_a_review_that_has_not_ended_passes_no_gate(edge, byokeep):
    """Was shown to fail: it had no findings yet, and exit 0."""
    review_id = edge.add_review(state=review_pb2.REVIEW_STATE_RUNNING)
    assert byokeep("review", "show", review_id).code == 0
    assert byokeep("review", "show", review_id, "--fail-on", "high").code == 7
    assert byokeep("review", "show", review_id, "--fail-on-unread", "--format", "sarif").code == 7


def test_dry_run_submits_nothing(edge, byokeep):
    ran = submit(byokeep, "--dry-run")
    assert ran.code == 0
    assert "2 calls to openai/gpt-5" in ran.out
    assert "skipped: moved.py" in ran.out
    assert edge.sent(review_pb2.SubmitReviewRequest) == []


def test_detach_prints_the_id(edge, byokeep):
    ran = submit(byokeep, "--detach")
    assert ran.code == 0
    assert ran.out.strip().startswith("rev_")
    assert edge.sent(review_pb2.WatchReviewRequest) == []


def test_everything_given_travels(edge, byokeep, tmp_path):
    (tmp_path / "schema.sql").write_text("create table t ();")
    (tmp_path / "guide.md").write_text("Be kind.")
    edge.states = [COMPLETED]
    more = "--repo acme/shop --pr 7 --head abcdef1 --title T --description D --context schema.sql"
    more += " --guidance guide.md --model openai/gpt-5 --user ann --request-id once-only-1"
    assert submit(byokeep, *more.split()).code == 0
    request = sent(edge)
    given = request.input
    assert request.request_id == "once-only-1"
    assert (given.repository, given.pull_request, given.head_commit) == ("acme/shop", 7, "abcdef1")
    assert (given.title, given.description, given.user) == ("T", "D", "ann")
    assert given.context_files[0].path == "schema.sql"
    assert (given.guidance, given.diff, given.model) == ("Be kind.", DIFF, "openai/gpt-5")


@pytest.fixture
def secret(tmp_path_factory):
    """A file that is not of the checkout."""
    path = tmp_path_factory.mktemp("elsewhere") / "id_ed25519"
    path.write_text("CANARY")
    return path


def test_a_files_path_is_that_in_the_checkout(edge, byokeep, checkout, monkeypatch):
    """A link may be followed where it leads to a file of the commit."""
    (checkout / "docs").mkdir()
    (checkout / "docs" / "real.md").write_text("r")
    (checkout / "link.md").symlink_to("docs/real.md")
    git("add", ".")
    git("commit", "-m", "two")
    edge.states = [COMPLETED]
    monkeypatch.chdir("docs")
    assert submit(byokeep, "--context", "real.md", "--context", "../link.md").code == 0
    files = sent(edge).input.context_files
    assert [(file.path, file.content) for file in files] == [("docs/real.md", "r")] * 2


@pytest.mark.parametrize("option", ["--context", "--guidance"])
@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("link", ["guide.md", "docs"])
def test_a_link_leads_to_nothing_that_a_pipeline_wrote(
    edge, byokeep, checkout, option, committed, link
):
    """Its author knows where a pipeline puts its tokens, and may commit a file of that name. Shown
    to fail where a link is read from the disk."""
    place = checkout / "tools"
    place.mkdir()
    (place / "guide.md").write_text("none yet\n")
    (checkout / "docs").mkdir()
    if link == "docs":
        (checkout / "docs").rmdir()
        (checkout / "docs").symlink_to("tools")
    else:
        (checkout / "docs" / "guide.md").symlink_to("../tools/guide.md")
    git("add", "docs", *(["tools"] if committed else []))
    git("commit", "-m", "a link")
    (place / "guide.md").write_text("//registry/:_authToken=CANARY\n")
    edge.states = [COMPLETED]
    ran = submit(byokeep, option, "docs/guide.md")
    if not committed:
        assert (ran.code, "leads only to what is committed" in ran.err) == (2, True), ran.err
        assert edge.requests == []
        return
    given = sent(edge).input
    assert [given.guidance, *(one.content for one in given.context_files)][-1] == "none yet\n"
    assert b"CANARY" not in given.SerializeToString()


@pytest.mark.parametrize("option", ["--context", "--guidance"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path, secret: path.symlink_to(secret), "not in"),
        (lambda path, secret: path.symlink_to("/proc/self/environ"), "not in"),
        (lambda path, secret: path.symlink_to("/dev/zero"), "not in"),
        (lambda path, secret: path.symlink_to(".git/config"), "part of .git"),
        (lambda path, secret: path.symlink_to("x"), "leads only to"),
        (lambda path, secret: os.mkfifo(path), "no regular file"),
        (lambda path, secret: path.mkdir(), "no regular file"),
    ],
)
def test_what_is_no_file_of_the_checkout_does_not_travel(
    edge, byokeep, checkout, secret, option, make, said
):
    """The author of the change may have put it there."""
    make(checkout / "x", secret)
    ran = submit(byokeep, option, "x")
    assert (ran.code, said in ran.err) == (2, True), ran.err
    assert edge.requests == []


def test_a_folder_that_is_a_link_leads_nowhere(edge, byokeep, checkout, secret):
    (checkout / "docs").symlink_to(secret.parent)
    ran = submit(byokeep, "--context", "docs/id_ed25519")
    assert (ran.code, "not in" in ran.err) == (2, True)


@pytest.mark.parametrize("part", ["docs", "docs/guide.md"])
def test_a_link_that_appears_after_the_look_is_not_followed(
    edge, byokeep, checkout, secret, monkeypatch, part
):
    """Shown to fail without O_NOFOLLOW, for the folder and for the file."""
    (checkout / "docs").mkdir()
    (checkout / "docs" / "guide.md").write_text("g")
    (secret.parent / "guide.md").write_text("CANARY")
    seen = os.path.realpath(checkout / "docs" / "guide.md")

    def swapped(_):
        shutil.move(checkout / part, checkout / "away")
        (checkout / part).symlink_to(secret.parent / part.removeprefix("docs").strip("/"))
        return seen

    monkeypatch.setattr(os.path, "realpath", swapped)
    ran = submit(byokeep, "--guidance", "docs/guide.md")
    assert (ran.code, "can't be read" in ran.err) == (2, True), ran.err
    assert edge.requests == []


def test_an_endless_diff_ends_with_a_sentence(edge, byokeep, tmp_path):
    assert "neither a file nor a pipe" in byokeep("review", "--diff", "/dev/zero").err
    os.truncate(os.open(tmp_path / "huge", os.O_CREAT | os.O_WRONLY), 2**40)
    assert "larger than 4 MiB\n  → a part of it: git" in byokeep("review", "--diff", "huge").err
    assert edge.requests == []


def test_a_pipe_into_which_nobody_writes_ends_with_a_sentence(edge, byokeep, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WRITER_MILLISECONDS", 10)
    os.mkfifo(tmp_path / "pipe")
    ran = byokeep("review", "--diff", "pipe")
    assert (ran.code, "nobody writes" in ran.err) == (2, True)


def test_a_writer_of_a_pipe_may_take_its_time(edge, byokeep, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WRITER_MILLISECONDS", 10)
    read, write = os.pipe()
    threading.Timer(0.1, lambda: (os.write(write, DIFF), os.close(write))).start()
    edge.states = [COMPLETED]
    assert byokeep("review", "--diff", f"/dev/fd/{read}").code == 0
    os.close(read)
    assert sent(edge).input.diff == DIFF


def test_working_tree_is_reviewed_by_default(edge, byokeep, checkout):
    (checkout / "app.py").write_text("a = 2\n")
    edge.states = [COMPLETED]
    assert byokeep("review").code == 0
    given = sent(edge).input
    assert b"+a = 2" in given.diff
    assert given.repository == "acme/shop"
    assert len(given.head_commit) == 40


def test_untracked_files_are_not_sent_and_that_is_said(edge, byokeep, checkout):
    (checkout / "app.py").write_text("a = 2\n")
    (checkout / ".gitignore").write_text("*.log\n")
    for name in (".env", "new.py", "x.log"):
        (checkout / name).write_text("CANARY")
    edge.states = [COMPLETED]
    ran = byokeep("review")
    assert "untracked files not reviewed" in ran.err
    assert b"CANARY" not in sent(edge).input.diff


@pytest.mark.parametrize(("more", "head"), [((), ""), (("--head", "abcdef1"), "abcdef1")])
def test_a_diff_from_a_file_is_not_of_the_commit_here(edge, byokeep, checkout, more, head):
    (checkout / "x.diff").write_bytes(DIFF)
    edge.states = [COMPLETED]
    assert byokeep("review", "--diff", "x.diff", *more).code == 0
    assert sent(edge).input.head_commit == head


def test_base_reviews_the_branch(edge, byokeep, checkout):
    git("checkout", "-b", "topic")
    (checkout / "app.py").write_text("a = 3\n")
    git("commit", "-am", "two")
    edge.states = [COMPLETED]
    assert byokeep("review", "--base", "main").code == 0
    assert b"+a = 3" in sent(edge).input.diff


def test_git_settings_do_not_change_the_diff(edge, byokeep, checkout):
    git("config", "diff.external", "echo owned #")
    git("config", "diff.noprefix", "true")
    git("config", "color.ui", "always")
    (checkout / "app.py").write_text("a = 2\n")
    edge.states = [COMPLETED]
    byokeep("review")
    assert sent(edge).input.diff.startswith(b"diff --git a/app.py b/app.py")


def _fsmonitor(checkout, program):
    git("config", "core.fsmonitor", str(program))


def _hook(checkout, program):
    (checkout / "same.py").touch()
    git("add", "same.py")
    git("commit", "-m", "same")
    os.utime(checkout / "same.py", (1, 1))  # git diff then refreshes the index
    hook = checkout / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    shutil.copy(program, hook)


def _filter(checkout, program):
    # With a name that `git -c` would cut in two.
    git("config", "filter.a=b.clean", str(program))
    git("config", "filter.a=b.required", "true")
    (checkout / ".gitattributes").write_text("*.py filter=a=b\n")


def _included_process(checkout, program):
    (checkout / "more").write_text(f'[filter "x"]\nprocess = {program}\n')
    git("config", "include.path", str(checkout / "more"))
    (checkout / ".gitattributes").write_text("*.py filter=x\n")


def _lazy_fetch(checkout, program):
    for name, value in {
        "core.repositoryFormatVersion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.promisor": "true",
        "remote.origin.url": str(checkout),
        "remote.origin.uploadpack": str(program),
    }.items():
        git("config", name, value)
    blob = git("rev-parse", "HEAD:app.py")
    (checkout / ".git" / "objects" / blob[:2] / blob[2:]).unlink()


@pytest.mark.parametrize("configure", [_fsmonitor, _hook, _filter, _included_process, _lazy_fetch])
def test_a_repositorys_configuration_runs_no_program(edge, byokeep, checkout, configure):
    """Shown to fail with the checkout's own repository instead of a private one."""
    ran, program = checkout / "ran", checkout / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    configure(checkout, program)
    (checkout / "app.py").write_text("a = 2\n")
    ran.unlink(missing_ok=True)
    edge.states = [COMPLETED]
    byokeep("review")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("git@github.com:acme/shop.git", "acme/shop"),
        ("https://github.com/acme/shop", "acme/shop"),
        ("https://user@host:8443/acme/shop.git/", "acme/shop"),
        ("ssh://git@host:22/group/sub/shop.git", "group/sub/shop"),
        ("/srv/git/shop", None),
    ],
)
def test_repository_is_read_from_the_remote(edge, byokeep, checkout, url, name):
    git("remote", "set-url", "origin", url)
    (checkout / "app.py").write_text("a = 2\n")
    edge.states = [COMPLETED]
    byokeep("review")
    assert sent(edge).input.repository == (name or checkout.name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing is changed"),
        (("--base", "main"), "nothing changed between main and HEAD"),
        (("--base", "nowhere"), "no branch, tag or commit"),
        (("--base", "--output=/tmp/x"), "branch, a tag or a commit"),
        (("--diff", "-", "--base", "main"), "exclude each other"),
        (("--diff", "missing.diff"), "can't be read"),
        (("--diff", "-"), "empty"),
        (("--request-id", "x", "--diff", "-"), "--request-id"),
        (("--diff", "app.py", "--context", "missing"), "can't be read"),
        (("--pr", "x"), "--pr takes a number from 0 to"),
        (("--fail-on", "fatal"), "info, low, medium, high, critical"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_2(edge, byokeep, checkout, arguments, said):
    ran = byokeep("review", *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert edge.sent(review_pb2.SubmitReviewRequest) == []


def test_without_a_repository_the_way_out_is_named(edge, byokeep):
    ran = byokeep("review")
    assert ran.code == 2
    assert "--diff" in ran.err


@pytest.mark.parametrize(("size", "said"), [(300_000, "larger"), (3, "UTF-8")])
def test_context_files_are_checked_by_name(edge, byokeep, tmp_path, size, said):
    (tmp_path / "blob").write_bytes(b"\xff" * size)
    ran = submit(byokeep, "--context", "blob")
    assert (ran.code, said in ran.err) == (2, True)


def test_show_list_cancel_retry(edge, byokeep):
    review_id = edge.add_review(findings=FINDINGS, finding_count=2)
    other = edge.add_review()
    assert "SQL from input" in byokeep("review", "show", review_id[:-1]).out
    for reference in (review_id, f"tenants/demo/reviews/{review_id}"):
        assert byokeep("review", "show", reference, "--json").json["findingCount"] == 2
    other_tenant = byokeep("review", "cancel", f"tenants/other/reviews/{review_id}")
    assert (other_tenant.code, "of tenant other" in other_tenant.err) == (2, True)
    assert byokeep("review", "show", review_id, "--fail-on", "high").code == 1
    listed = byokeep("review", "list", "--json").json["reviews"]
    assert [entry["name"].rsplit("/")[-1] for entry in listed] == [other, review_id]
    edge.states = [COMPLETED]
    assert byokeep("review", "retry", review_id).code == 0
    assert "cancelled" in byokeep("review", "cancel", other).out
    ran = byokeep("review", "show", other)
    assert (ran.code, "cancelled" in ran.err) == (7, True)


def waiting() -> review_pb2.ReviewWait:
    wait = review_pb2.ReviewWait(
        reason=review_pb2.FAILURE_REASON_KEY_NEEDS_REKEY,
        message="The provider rejected the key.",
    )
    wait.since.FromJsonString("2026-11-29T12:00:00Z")
    wait.next_try_time.FromJsonString("2026-11-29T12:01:00Z")
    wait.give_up_time.FromJsonString("2026-11-30T12:00:00Z")
    return wait


def test_what_a_review_waits_for_is_said_everywhere(edge, byokeep):
    """Why, since when, when it is tried again, and when it is given up."""
    queued = review_pb2.REVIEW_STATE_QUEUED
    key_id = "key_" + "1" * 26
    review_id = edge.add_review(state=queued, wait=waiting(), key_id=key_id)
    shown = byokeep("review", "show", review_id)
    assert shown.code == 0
    for part in (
        "KEY_NEEDS_REKEY",
        f"→ byokeep key rotate {key_id}",
        "Next try at",
        "fails with this at",
    ):
        assert part in shown.out
    assert "QUEUED KEY_NEEDS_REKEY" in byokeep("review", "list").out
    as_json = byokeep("review", "show", review_id, "--json").json["wait"]
    assert as_json["reason"] == "FAILURE_REASON_KEY_NEEDS_REKEY"
    assert as_json["since"] == "2026-11-29T12:00:00Z"
    edge.states = [{"state": queued, "wait": waiting()}, COMPLETED]
    followed = byokeep("review", "show", review_id, "--watch")
    assert "waits since" in followed.err
    assert followed.code == 0


@pytest.mark.parametrize(("given", "value"), [((), "INTERACTIVE"), (("batch",), "BATCH")])
def test_priority(edge, byokeep, tmp_path, given, value):
    (tmp_path / "x.diff").write_bytes(DIFF)
    edge.states = [COMPLETED]
    flags = ("--priority", *given) if given else ()
    ran = byokeep("review", "--repo", "a/b", "--diff", str(tmp_path / "x.diff"), *flags)
    assert ran.code == 0, ran.err
    assert sent(edge).priority == review_pb2.Priority.Value(f"PRIORITY_{value}")


def test_an_ambiguous_review_is_refused(edge, byokeep):
    edge.add_review()
    edge.add_review()
    ran = byokeep("review", "show", "rev_0")
    assert ran.code == 2
    assert "2 reviews" in ran.err


def test_watch_follows_a_running_review(edge, byokeep):
    review_id = edge.add_review(state=review_pb2.REVIEW_STATE_RUNNING)
    edge.states = [COMPLETED]
    ran = byokeep("review", "show", review_id, "--watch")
    assert ran.code == 0
    assert "SQL from input" in ran.out


def test_a_model_cannot_write_to_the_terminal(edge, byokeep):
    """Shown to fail: without `clean` the escape sequences are on stdout."""
    finding = review_pb2.Finding(
        path="a\x1b[2J.py", title="\x1b]52;c;ZXZpbA==\x07t", message="x\x9b31m\u202e", severity=1
    )
    edge.states = [COMPLETED | {"findings": [finding]}]
    ran = submit(byokeep)
    assert not set(ran.out) & set("\x1b\x07\x9b\u202e")
    edge.states = [COMPLETED | {"findings": [finding]}]
    assert not set(submit(byokeep, "--json").out) & set("\x1b\x07\x9b\u202e")


# --- several at once


def test_list_takes_filters_and_says_that_there_are_more(edge, byokeep):
    for _ in range(3):
        edge.add_review()
    flags = ("--state", "failed", "--failure", "rate-limited", "--repo", "a/b", "--pr", "7")
    ran = byokeep("review", "list", *flags, "--since", "2026-11-01", "--limit", "2")
    assert ran.code == 0, ran.err
    (request,) = edge.sent(review_pb2.ListReviewsRequest)
    wanted = request.filter
    assert list(wanted.states) == [review_pb2.REVIEW_STATE_FAILED]
    assert list(wanted.failures) == [review_pb2.FAILURE_REASON_RATE_LIMITED]
    assert (wanted.repository, wanted.pull_request) == ("a/b", 7)
    assert wanted.submitted_after.ToJsonString().startswith("2026-1")
    assert "there are more: --limit 20" in ran.err
    assert len(ran.out.splitlines()) == 3


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--since", "soon", "--since takes"), ("--failure", "luck", "--failure takes one of")],
)
def test_a_filter_that_is_none_is_refused_here(edge, byokeep, flag, value, said):
    ran = byokeep("review", "list", flag, value)
    assert (ran.code, said in ran.err) == (2, True)
    assert edge.sent(review_pb2.ListReviewsRequest) == []


def test_many_are_cancelled_or_retried_by_the_same_options(edge, byokeep):
    first, second = edge.add_review(), edge.add_review()
    ran = byokeep("review", "cancel", "--pr", "7")
    assert (ran.code, ran.out.split()) == (0, [first, second])
    assert "2 reviews cancelled" in ran.err
    ran = byokeep("review", "retry", "--since", "1d")
    assert (ran.code, ran.out.split()) == (7, [second])
    assert f"{first} is not: its diff is not kept any more" in ran.err


@pytest.mark.parametrize("what", ["cancel", "retry"])
@pytest.mark.parametrize("flags", [(), ("rev_1", "--pr", "7")])
def test_one_or_some_and_never_all_by_accident(edge, byokeep, what, flags):
    ran = byokeep("review", what, *flags)
    assert (ran.code, "give the id of a review, or options" in ran.err) == (2, True)


def test_delete_asks_first(edge, byokeep):
    review_id = edge.add_review()
    assert byokeep("review", "delete", review_id).code == 2
    assert edge.sent(review_pb2.DeleteReviewRequest) == []
    ran = byokeep("review", "delete", review_id, "--yes")
    assert (ran.code, ran.out.strip()) == (0, f"deleted {review_id}")


def test_a_superseded_review_names_the_newer(edge, byokeep):
    newer = "rev_" + "7" * 26
    edge.states = [
        {
            "state": review_pb2.REVIEW_STATE_CANCELLED,
            "superseded_by": f"tenants/demo/reviews/{newer}",
            "pull_request": 7,
        }
    ]
    ran = submit(byokeep, "--pr", "7")
    assert ran.code == 7
    assert f"a newer commit of pull request 7 is reviewed instead, as {newer}" in ran.err


def test_keep_goes_with_the_submission(edge, byokeep):
    edge.states = [COMPLETED]
    assert submit(byokeep, "--keep").code == 0
    assert sent(edge).keep_older


def test_how_far_it_is_is_told(edge, byokeep):
    queued = review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_QUEUED, place=4)
    leasing = review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_LEASING)
    calling = review_pb2.ReviewProgress(stage=review_pb2.REVIEW_STAGE_CALLING, chunk=2)
    edge.states = [
        {"state": review_pb2.REVIEW_STATE_QUEUED, "progress": queued},
        {"state": review_pb2.REVIEW_STATE_RUNNING, "progress": leasing},
        {"state": review_pb2.REVIEW_STATE_RUNNING, "progress": calling},
        COMPLETED,
    ]
    said = submit(byokeep).err
    for part in ("number 4 in the queue", "a runner gets the key", "the provider reads chunk 2"):
        assert part in said
    running = {"state": review_pb2.REVIEW_STATE_RUNNING, "progress": calling}
    shown = byokeep("review", "show", edge.add_review(**running))
    assert "now    the provider reads chunk 2" in shown.out


@pytest.mark.parametrize("what", ["in the queue", "Next try at", "KiB of an answer"])
def test_a_log_has_one_line_for_what_changes_all_the_time(edge, byokeep, what):
    """Was shown to fail: a log of CI had one for each look at a busy service, and for each KiB."""

    def state(number: int) -> dict[str, object]:
        if what == "in the queue":
            stage = review_pb2.REVIEW_STAGE_QUEUED
            return {"progress": review_pb2.ReviewProgress(stage=stage, place=number)}
        if what == "Next try at":
            wait = waiting()
            wait.next_try_time.seconds += number
            return {"wait": wait}
        return {"answer_bytes": 1024 * number}

    edge.states = [RUNNING, *({**RUNNING, **state(number)} for number in (9, 8, 7)), COMPLETED]
    said = submit(byokeep).err
    on_its_way = [line for line in said.splitlines() if what in line and "findings" not in line]
    assert len(on_its_way) == 1, said


def test_policies_are_shown_and_set(edge, byokeep):
    assert "ends its older reviews" in byokeep("policy", "show").out
    ran = byokeep("policy", "set", "--keep-superseded", "--retry-ambiguous")
    assert ran.code == 0, ran.err
    (request,) = edge.sent(settings_pb2.UpdateSettingsRequest)
    assert list(request.update_mask.paths) == ["keep_superseded", "retry_ambiguous"]
    assert request.settings.keep_superseded
    assert request.settings.retry_ambiguous
    assert byokeep("policy", "set").code == 2


def test_a_key_is_named_and_shown(edge, byokeep):
    edge.states = [{"state": 3, "key_id": "key_1", "key_version": 2, "key_hint": "sk-...AbCd"}]
    ran = submit(byokeep, "--key", "ci")
    assert sent(edge).input.key == "ci"
    assert "key    key_1 v2  sk-...AbCd" in ran.out
    assert submit(byokeep, "--key", "a b").code == 2


def test_a_model_in_anothers_place_says_why(edge, byokeep):
    edge.states = [
        {"state": 3, "model": "openai/b", "chosen_model": "openai/a", "model_fallback": 2}
    ]
    assert "in place of openai/a: the provider does not know that" in submit(byokeep).out


def test_a_managed_key_is_not_the_tenants_to_rotate(edge, byokeep):
    edge.states = [
        failed("KEY_REJECTED") | {"key_id": "key_1", "key_version": 1, "managed_key": True}
    ]
    ran = submit(byokeep)
    assert "key    key_1 v1  managed by the operator" in ran.out
    assert "once the operator has mended the key, byokeep review retry rev_" in ran.err
    assert "rotate" not in ran.err
