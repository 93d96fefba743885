"""A key typed as an argument is refused, and shown nowhere."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.harness.cli_fixtures"]

SHAPELESS = "CANARY1canary2CANARY3canary4CANARY5x"
CANARIES = [
    "sk-proj-CANARY1canary2CANARY3canary",
    "sk-ant-api03-CANARY1canary2CANARY3",
    "AIzaCANARY1canary2CANARY3canary4CANARY5",
    "AQ.CANARY1canary2CANARY3canary4CANARY",
    SHAPELESS,
]
# Random text is only taken for a key where it stands alone.
WITHIN_TEXT = ("use {} please", "openai/{}")
POSITIONS = [
    ("key", "add", "openai", "{}"),
    ("key", "add", "{}"),
    ("key", "add", "{}", "openai"),
    ("key", "add", "openai", "--name", "{}"),
    ("key", "add", "openai", "--name={}"),
    ("key", "add", "openai", "--key", "{}"),
    ("key", "add", "openai", "--key={}"),
    ("key", "add", "openai", "--{}"),
    ("key", "add", "openai", "--from-env", "{}"),
    ("key", "add", "openai", "--user", "{}"),
    ("key", "rotate", "openai", "{}"),
    ("key", "rotate", "{}"),
    ("key", "show", "{}"),
    ("key", "{}"),
    ("{}",),
    ("--profile", "{}", "key", "list"),
    ("--tenant={}", "key", "list"),
    ("review", "--title", "use {} please"),
    ("review", "--model", "openai/{}"),
    ("review", "{}"),
    ("model", "set", "{}"),
    ("tenant", "create", "{}"),
    ("audit", "verify", "{}"),
    ("--json", "key", "add", "openai", "{}"),
]


@pytest.mark.parametrize("position", POSITIONS, ids=" ".join)
def test_canary_in_any_position_is_refused_unseen(edge, byokeep, position):
    """Shown to fail: without `refuse_keys` a name or tenant goes to the server; with typer's own
    error texts in `run` the canary is in "No such command", "unexpected extra argument" and
    "No such option"."""
    for canary in CANARIES:
        if canary == SHAPELESS and position[-1] in WITHIN_TEXT:
            continue
        ran = byokeep(*(part.format(canary) for part in position))
        assert ran.code == 2
        assert "canary" not in (ran.out + ran.err).lower()
    assert edge.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "add", "openai", "sk-xxxx"),
        ("key", "add", "sk-xxxx"),
        ("key", "add", "openai", "--name", "sk-xxxx"),
        ("key", "add", "openai", "--key", "sk-xxxx"),
        ("key", "add", "openai", "hunter2hunter2"),
        ("key", "add", "openai", "--hunter2hunter2"),
        ("key", "add", "openai", "--name", "hunter2 hunter2"),
        ("key", "add", "hunter2hunter2"),
        ("key", "add", "openai", "--from-env", "hunter2-hunter2"),
        ("key", "show", "hunter2hunter2"),
    ],
    ids=" ".join,
)
def test_short_or_shapeless_values_are_not_echoed_either(edge, byokeep, arguments):
    ran = byokeep(*arguments)
    assert ran.code == 2
    assert "sk-xxxx" not in ran.out + ran.err
    assert "hunter2" not in ran.out + ran.err


def test_the_reason_is_given(edge, byokeep):
    error = byokeep("key", "add", "openai", CANARIES[0]).err
    assert "history" in error
    assert "--stdin" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("review", "list", "--repo", "sk-tools/app"),
        ("review", "list", "--repo", "acme/sk-"),
        ("key", "list", "--tenant", "demo"),
        ("review", "--request-id", "0123456789abcdef0123456789abcdef", "--dry-run"),
    ],
    ids=" ".join,
)
def test_ordinary_values_pass(edge, byokeep, arguments):
    assert "KEY_IN_ARGUMENTS" not in byokeep(*arguments).err


def test_a_file_that_is_there_is_not_a_key(edge, byokeep, tmp_path):
    (tmp_path / "Change2026ReviewedByAnnAndBob1234567").write_text("--- a/x\n")
    ran = byokeep("review", "--dry-run", "--diff", "Change2026ReviewedByAnnAndBob1234567")
    assert ran.code == 0
