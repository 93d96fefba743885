"""What a model wrote commands no CI run whose log it is printed to."""

from __future__ import annotations

import json
import re

import pytest
from byokeep.cli.base.output import Output, message_dict
from byokeep.cli.reviews.output import print_review
from byokeep.loglines import disarmed
from byokeep.orchestrator.v1.review_pb2 import Finding, Review

from services.orchestrator.compute import exports

# As actions/runner's ActionCommand reads a line, and Azure's and TeamCity's agents.
COMMAND = re.compile(r"^\s*::|##\w*\[", re.MULTILINE)
WORDS = "::error file=a.py::forged\n  ::stop-commands::x\nend ##[error]y ##vso[task.setvariable]z"
REVIEW = Review(
    name="tenants/acme/reviews/rev_1",
    repository="::set-output name=a::b",
    model="openai/m",
    findings=[
        Finding(
            path="::set-output name=approved::true",
            start_line=1,
            title="##[error]forged",
            message=WORDS + "\n" + "a" * 76 + "::debug::x" + "a" * 410 + "::debug::x",
            suggestion=WORDS,
        )
    ],
)


@pytest.mark.parametrize("line", ["::error::x", " ::x", "a\n::x", "##[x", "##vso[x", ":::x"])
def test_no_line_is_a_command(line):
    assert COMMAND.search(line)
    assert not COMMAND.search(disarmed(line))


@pytest.mark.parametrize("text", ["std::vector", "## Heading", "x = y[::2]", "#[derive]"])
def test_what_is_none_is_left_alone(text):
    assert disarmed(text) == text


@pytest.mark.parametrize("force", ["", "1"])
def test_a_printed_review_has_no_command(capsys, monkeypatch, force):
    """Shown to fail where `clean` does not disarm, and where long lines are wrapped in a pipe,
    be it that FORCE_COLOR has rich take it for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", force)
    monkeypatch.setenv("COLUMNS", "80")
    print_review(Output(), REVIEW)
    printed = capsys.readouterr().out
    assert "forged" in printed
    assert not COMMAND.search(printed)


def test_a_review_as_json_has_no_command_and_loses_nothing(capsys):
    """Shown to fail with JSON as the library writes it."""
    wanted = message_dict(REVIEW)
    Output(as_json=True).json(wanted)
    Output(as_json=True).json_line(wanted)
    printed = capsys.readouterr().out
    assert not COMMAND.search(printed)
    whole, line = printed[: printed.rindex("\n{")], printed[printed.rindex("\n{") :]
    assert json.loads(whole) == json.loads(line) == wanted


def test_an_exported_text_has_no_command():
    """Shown to fail where `text` does not disarm."""
    exported, _ = exports.text(REVIEW)
    assert "forged" in exported
    assert not COMMAND.search(exported)
