"""What `byokeep review` says where git can't or won't show a change, and what mends it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest_plugins = ["tests.harness.cli_fixtures"]


@pytest.fixture(autouse=True)
def _own_git(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Ann")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "ann@acme.example")


def git(folder: Path, *arguments: str) -> None:
    command = (shutil.which("git"), *arguments)
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture
def origin(tmp_path) -> Path:
    """A repository whose branch `feature` has a commit that `main` has not."""
    folder = tmp_path / "origin"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for branch, text in (("main", "1"), ("main", "2"), ("feature", "3")):
        if branch == "feature":
            git(folder, "checkout", "-q", "-b", "feature")
        (folder / "file").write_text(text)
        git(folder, "add", "file")
        git(folder, "commit", "-q", "-m", text)
    return folder


@pytest.mark.parametrize("depth", [("--depth=1",), ("--depth=1", "--no-single-branch"), ()])
@pytest.mark.parametrize("base", ["main", "origin/main"])
def test_a_clone_without_the_base_is_told_the_commands_that_get_it(
    edge, byokeep, monkeypatch, origin, tmp_path, depth, base
):
    """And they do. A CI's checkout is shallow."""
    clone = ("clone", "-q", *depth, "--branch=feature", f"file://{origin}", "clone")
    git(tmp_path, *clone)
    monkeypatch.chdir(tmp_path / "clone")
    if not depth:
        git(tmp_path / "clone", "remote", "set-branches", "origin", "feature")
        git(tmp_path / "clone", "update-ref", "-d", "refs/remotes/origin/main")
    ran = byokeep("review", "--base", base, "--dry-run")
    while ran.code:
        assert ran.code == 2
        assert ("shallow" in ran.err) is bool(depth) or "→ --base origin/main" in ran.err
        if fetch := re.search(r"(git fetch .*?')[ ,]", ran.err):
            subprocess.run(["/bin/sh", "-c", fetch[1]], check=True, capture_output=True)
        told = re.search(r"--base (origin/\w+)", ran.err)
        assert (fetch, told[1]) != (None, base)
        base = told[1]
        ran = byokeep("review", "--base", base, "--dry-run")
    assert edge.requests[-1].input.diff.startswith(b"diff --git a/file b/file")


@pytest.mark.parametrize("base", ["HEAD~1", "v1"])
def test_what_is_no_branch_is_to_be_tried_again_as_it_is(
    edge, byokeep, monkeypatch, origin, tmp_path, base
):
    """Was shown to fail with `--base origin/HEAD~1`, and with tags that are not fetched."""
    git(origin, "tag", "v1", "main")
    git(tmp_path, "clone", "-q", "--depth=1", "--branch=feature", f"file://{origin}", "clone")
    monkeypatch.chdir(tmp_path / "clone")
    ran = byokeep("review", "--base", base, "--dry-run")
    fetch, said = re.search(r"(git fetch .*?') .*(, then .*)", ran.err).groups()
    assert said == (", then again" if base == "HEAD~1" else ", then --base origin/v1 (a tag: v1)")
    subprocess.run(["/bin/sh", "-c", fetch], check=True, capture_output=True)
    assert byokeep("review", "--base", base, "--dry-run").code == 0


def test_a_checkout_of_others_is_refused_in_gits_words(edge, byokeep, monkeypatch, origin):
    """Shown to fail where git's last line, which is advice, is taken for its reason."""
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(origin, 4321, 4321)
    os.chown(origin / ".git", 4321, 4321)
    monkeypatch.chdir(origin)
    ran = byokeep("review", "--base", "main", "--dry-run")
    assert ran.code == 2
    assert f"git refuses: fatal: detected dubious ownership in repository at '{origin}'" in ran.err
    mends = re.search(r"→ (git config .*?), if you trust", ran.err)
    subprocess.run(["/bin/sh", "-c", mends[1]], check=True)
    assert byokeep("review", "--base", "main", "--dry-run").code == 0


def test_a_diff_from_elsewhere_needs_no_git(edge, byokeep, monkeypatch, origin, tmp_path):
    (tmp_path / "change.diff").write_text("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(origin)
    assert byokeep("review", "--diff", str(tmp_path / "change.diff"), "--dry-run").code == 0
    ran = byokeep("review", "--base", "main", "--dry-run")
    assert ran.code == 2
    assert "there is no git to read this checkout with" in ran.err
    assert "install git" in ran.err
