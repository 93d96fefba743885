"""`.ci/run`: every suite runs, what is left out is said, and nothing that did not run passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
# Writes down its arguments, and pytest's report where one is asked for.
_MAKE = """#!/bin/sh
echo "$@" >>"$CALLS"
[ "$1" != "$FAILING" ] || exit 2
for argument; do
    case $argument in PYTEST_ARGS=--junitxml=*) echo "$REPORT" >"${argument#*--junitxml=}" ;; esac
done
"""
_PASSED = '<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>'
_SKIPPED = _PASSED.replace(
    "/></testsuite>", '><skipped message="no engine"/></testcase></testsuite>'
)


def _run(folder: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Run it with a `make` that only notes its target; its status, output and the targets."""
    (folder / ".ci").mkdir()
    (folder / "bin").mkdir()
    shutil.copy(_ROOT / ".ci/run", folder / ".ci/run")
    (folder / "bin/make").write_text(_MAKE)
    (folder / "bin/make").chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    given = {"CALLS": str(calls), "FAILING": "", "REPORT": _PASSED, "BYOKEEP_CI_SKIP": ""}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [folder / ".ci/run"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path} | given | environment,
    )
    targets = [line.split()[0] for line in calls.read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, targets


def test_every_suite_of_the_makefile_runs(tmp_path):
    suites = re.findall(r"^(test[a-z-]*):", (_ROOT / "Makefile").read_text(), re.M)
    status, output, targets = _run(tmp_path)
    assert status == 0, output
    assert {*suites, "lint", "docs", "prove", "chaos", "bench"} == set(targets)
    assert "NOT RUN" not in output


def test_what_is_left_out_is_said(tmp_path):
    status, output, targets = _run(tmp_path, BYOKEEP_CI_SKIP="images chaos")
    assert status == 0, output
    assert not {"test-images", "chaos"} & set(targets)
    assert "bench" in targets
    assert "NOT RUN: images chaos" in output.splitlines()[-1]


def test_a_suite_that_there_is_not_can_not_be_left_out(tmp_path):
    status, output, targets = _run(tmp_path, BYOKEEP_CI_SKIP="image")
    assert (status, targets) == (64, [])
    assert "no suite image" in output


@pytest.mark.parametrize(
    "environment", [{"FAILING": "test-images"}, {"REPORT": _SKIPPED}], ids=["fails", "skips"]
)
def test_what_fails_or_skips_fails_it(tmp_path, environment):
    status, output, _ = _run(tmp_path, **environment)
    assert status != 0
    assert "FAILING" in environment or "a::b: no engine" in output
