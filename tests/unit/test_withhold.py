"""The key in what a provider answers: every form of it, in every text of every message."""

from __future__ import annotations

import copy

import pytest
from byokeep.keyvault.v1 import lease_pb2
from byokeep.orchestrator.v1 import review_pb2
from byokeep.runner.v1 import runner_pb2
from byokeep.testing.canary import forms, found_in
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.emulator.echo import encodings
from services.common.prefix import public_prefix
from services.llm_runner.withhold import FRAGMENT, MASK, Withheld

KEYS = [
    "sk-proj-Zq3xV7nKp0LwT9yBd4HsRc8MfUa2GjEo6IvXt1QzNbW5",
    "sk-ant-api03-aB1cD2eF3gH4iJ5kL6mN7oP8qR9sT0uV-wX_yZ",
    "AIzaSyD4ea7fQ0h1J-kL_mN2pR3sT5uV8wX9yZ0",
    "AQ.Ab8RN6Kx1y2z3w4v5u6t7s8r9q0p",
    "sixteen-bytes-ok",
    # Of every character that a key may have, also those that escapes are made of.
    "sk-%41&lt;\\x41\"/\\u0041~{}|'`!#$()*+,.:;=?@[]^_0x41AB%2541",
]


def said(key, text):
    """A message with a text at every depth."""
    finding = review_pb2.Finding(path="a.py", title=text, message=f"See {text}.", suggestion=text)
    result = runner_pb2.ChunkResult(chunk_id="c" * 64, findings=[finding, finding])
    return runner_pb2.ExecuteResponse(sequence=7, chunk_result=result)


def shows(message, key):
    """The forms of the key that a message's texts hold."""
    texts = []

    def read(one):
        for field, value in one.ListFields():
            for item in value if field.is_repeated else [value]:
                if hasattr(item, "ListFields"):
                    read(item)
                elif isinstance(item, str):
                    texts.append(item)

    read(message)
    return found_in("\n".join(texts).encode(), forms(key, public_prefix(key)))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("number", range(len(encodings(KEYS[0]))))
def test_a_key_is_masked_in_every_encoding(key, number):
    """Fails with each of the three forms removed, and without undoing escapes."""
    text = encodings(key)[number]
    message = said(key, f"before {text} after")

    Withheld(key).mask(message)

    assert shows(message, key) == []
    (first, second) = message.chunk_result.findings
    assert first == second
    assert MASK in first.title
    assert MASK in first.message
    assert MASK in first.suggestion
    assert first.title.startswith("before ")
    assert first.title.endswith(" after")
    assert (first.path, message.chunk_result.chunk_id, message.sequence) == ("a.py", "c" * 64, 7)


@pytest.mark.parametrize("key", KEYS[:4])
def test_the_forms_that_a_leak_is_looked_for_in_are_masked(key):
    wanted = {
        name: form.decode()
        for name, form in forms(key, public_prefix(key)).items()
        if name != "utf-16"  # its zero bytes are dropped from every finding
    }
    message = runner_pb2.ValidationResult(models=[f"<{form}>" for form in wanted.values()])

    Withheld(key).mask(message)

    assert shows(message, key) == []
    assert all(MASK in model for model in message.models)


@pytest.mark.parametrize("key", KEYS[:4])
def test_every_long_enough_fragment_is_masked_and_no_shorter_one(key):
    """Fails with FRAGMENT 9 here, and with 7 in the module."""
    secret = key.removeprefix(public_prefix(key))
    withheld = Withheld(key)
    for length, masked in ((FRAGMENT, True), (FRAGMENT - 1, False)):
        for start in range(len(secret) - length + 1):
            outcome = runner_pb2.Outcome(message=f"see <{secret[start : start + length]}>")
            withheld.mask(outcome)
            assert (outcome.message == f"see <{MASK}>") is masked


def test_the_public_prefix_is_shown_and_nothing_else():
    (key, *_) = KEYS
    outcome = runner_pb2.Outcome(message=f"{key}, {key} and {key[:20]}")

    Withheld(key).mask(outcome)

    assert outcome.message == f"sk-proj-{MASK}, sk-proj-{MASK} and sk-proj-{MASK}"


@given(text=st.text(max_size=300), key=st.sampled_from(KEYS[:4]))
def test_other_texts_are_left_as_they_are(text, key):
    message = said(key, text)
    before = copy.deepcopy(message)

    Withheld(key).mask(message)

    assert message == before


@given(
    before=st.text(max_size=40),
    after=st.text(max_size=40),
    key=st.sampled_from(KEYS[:4]),
    number=st.integers(0, len(encodings(KEYS[0])) - 1),
)
def test_whatever_stands_around_it(before, after, key, number):
    message = said(key, before + encodings(key)[number] + after)

    Withheld(key).mask(message)

    assert shows(message, key) == []


def test_a_message_without_texts():
    report = lease_pb2.PlaintextReport(process_id=7)
    Withheld(KEYS[0]).mask(report)
    assert report == lease_pb2.PlaintextReport(process_id=7)


def test_it_shows_nothing_of_the_key():
    (key, *_) = KEYS
    assert key[8:16] not in repr(Withheld(key))
