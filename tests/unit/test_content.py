"""The format of content at rest, and that nothing else opens with it."""

from __future__ import annotations

import os

import pytest

from services.common.errors import ByokeepError
from services.keyvault import envelope
from services.orchestrator.custody.content import INPUT, ContentKey, epoch_of

RAW = bytes(range(32))
KEY = ContentKey.derive("acme", "2026-11-23", RAW)
SEALED = KEY.seal("rev_1", INPUT, b"the diff")


def reason(call, *arguments) -> str:
    try:
        call(*arguments)
    except ByokeepError as error:
        return error.reason
    return ""


def test_what_was_sealed_opens():
    assert KEY.open("rev_1", INPUT, SEALED) == b"the diff"
    assert epoch_of(SEALED) == "2026-11-23"
    assert KEY.seal("rev_1", INPUT, b"the diff") != SEALED
    assert b"diff" not in SEALED


@pytest.mark.parametrize(
    ("key", "review", "field"),
    [
        (KEY, "rev_2", INPUT),
        (KEY, "rev_1", "findings/c1"),
        (ContentKey.derive("other", "2026-11-23", RAW), "rev_1", INPUT),
        (ContentKey.derive("acme", "2026-11-24", RAW), "rev_1", INPUT),
        (ContentKey.derive("acme", "2026-11-23", os.urandom(32)), "rev_1", INPUT),
    ],
    ids=["review", "field", "tenant", "epoch", "key"],
)
def test_moved_content_does_not_open(key, review, field):
    """Shown to fail, one by one, without that part in ContentKey._binding; `epoch` and `key` also
    without the comparison of epoch and commitment."""
    assert reason(key.open, review, field, SEALED) == "ROW_TAMPERED"


def test_every_altered_byte_is_noticed():
    for place in range(len(SEALED)):
        altered = bytearray(SEALED)
        altered[place] ^= 1
        assert reason(KEY.open, "rev_1", INPUT, bytes(altered)) == "ROW_TAMPERED", place


@pytest.mark.parametrize("length", [0, 3, 4, 13, 14, 46, 58, 73])
def test_cut_content_is_noticed(length):
    assert reason(KEY.open, "rev_1", INPUT, SEALED[:length]) == "ROW_TAMPERED"
    assert reason(epoch_of, SEALED[:length]) == "ROW_TAMPERED"


def test_a_content_key_is_no_data_key():
    """The same 32 bytes: neither format opens with the other's key, nor has the other's header.

    Shown to fail with the label and the magic of the envelope in content.py.
    """
    where = envelope.Context("test", "acme", "", "openai", "key_1", 1)
    provider_key = envelope.encrypt(bytearray(RAW), b"sk-proj-0123456789abcdef", where)
    assert reason(KEY.open, "key_1", "1", provider_key) == "ROW_TAMPERED"
    with pytest.raises(envelope.EnvelopeError):
        envelope.decrypt(bytearray(RAW), SEALED, where)
    # Not even past the headers: the derived keys and commitments differ.
    assert KEY.commitment not in provider_key
    assert provider_key[4:36] != KEY.commitment


def test_a_content_key_shows_nothing_of_itself():
    assert "2026" not in repr(KEY)
    assert str(KEY.commitment) not in repr(KEY)
