"""What is taken for a provider's key, and what is named and refused before it goes anywhere."""

from __future__ import annotations

import json
import random
import string
import time
from pathlib import Path

import pytest
from byokeep import keyshape
from byokeep.common.v1 import error_reason_pb2
from byokeep.keyshape import KeyFormatError, check_key

PUBLISHED = Path(__file__).parents[2] / "docs" / "vectors" / "key-shapes-v1.json"
CASES = json.loads(PUBLISHED.read_text())["cases"]
KEY = "sk-proj-" + "Ab3x" * 10


def text_of(case):
    return "".join(
        part if isinstance(part, str) else part["repeat"] * part["times"] for part in case["parts"]
    )


def refusal(provider, text):
    try:
        check_key(provider, text)
    except KeyFormatError as error:
        return error
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['why']}, {case['provider']}")
def test_the_published_cases_hold(case):
    """Shown to fail: with any form or issuer taken out of the tables."""
    refused = refusal(case["provider"], text_of(case))
    assert (refused and refused.rule, refused and refused.reason) == (case["rule"], case["reason"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['why']}, {case['provider']}")
def test_a_refusal_echoes_nothing_and_has_a_reason_of_the_list(case):
    if refused := refusal(case["provider"], text_of(case)):
        said = str(refused) + repr(refused)
        assert not any(piece in said for piece in ("Ab3x", "0123abcd", "ABCD2345"))
        assert error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{refused.reason}")


def test_keys_as_providers_issue_them_pass():
    """No rule may fall on a key by chance: at random, many of each shape."""
    dice = random.Random(7)
    letters = string.ascii_letters + string.digits
    shapes = {
        ("openai", "sk-proj-"): (letters + "_-", 156),
        ("openai", "sk-"): (letters, 48),
        ("anthropic", "sk-ant-api03-"): (letters + "_-", 95),
        ("gemini", "AIza"): (letters + "_-", 35),
        ("gemini", "AQ."): (letters + "_-", 50),
        ("openai", ""): (letters + "+/", 86),
    }
    for (provider, prefix), (signs, length) in shapes.items():
        for _ in range(500):
            check_key(provider, prefix + "".join(dice.choices(signs, k=length)))


def test_every_rule_has_a_published_case():
    rules = {case["rule"] for case in CASES}
    assert rules == {None, *keyshape._FORMS, *(f"issuer:{issuer}" for issuer in keyshape._ISSUERS)}


def test_another_providers_key_names_both():
    assert str(refusal("openai", "sk-ant-api03-" + "a" * 30)) == (
        "this looks like a key of Anthropic, not of OpenAI: OpenAI is not shown it"
    )


@pytest.mark.parametrize("whole", ['"', "'", "`", "Bearer ", "\n", " ", "/", "\t"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_nothing_is_stripped(whole, place):
    text = whole + KEY if place == "before" else KEY + whole
    assert refusal("openai", text) is not None or (whole, place) == ("/", "after")


@pytest.mark.parametrize("sign", ["-", ".", "a", "_", "=", " ", "\\", "export ", "key", "{"])
def test_a_megabyte_of_anything_is_judged_at_once(sign):
    """A pattern that backtracks over all of a text would take minutes of an intake process.

    Shown to fail: with the patterns asked about the whole text."""
    started = time.process_time()
    refusal("openai", sign * (1_000_000 // len(sign)))
    assert time.process_time() - started < 2
