"""Signed notes and checkpoints, against published vectors."""

from __future__ import annotations

import base64

import pytest
from byokeep import checkpoint
from byokeep.checkpoint import Checkpoint, NoteError, open_checkpoint, open_note
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# golang.org/x/mod/sumdb/note, note_test.go.
_PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
_TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
_PETER_SIGNED = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpR"
    "Zb6KE6RyyBwJnAM=\n"
)
_ENOCH_SIGNED = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33"
    "WWd1RvMc+QQ=\n"
)
_ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
TRUSTED = {"alk_1": KEY.public_key()}
ORIGIN = "byokeep/test/audit"


def verifier(text: str) -> tuple[str, str, Ed25519PublicKey]:
    name, key_id, encoded = text.split("+", 2)
    raw = base64.b64decode(encoded)
    assert raw[:1] == b"\x01"
    return name, key_id, Ed25519PublicKey.from_public_bytes(raw[1:])


def note(text: str, key: Ed25519PrivateKey = KEY, name: str = ORIGIN) -> str:
    public = key.public_key().public_bytes_raw()
    return checkpoint.signed(text, name, public, key.sign(text.encode()))


@pytest.mark.parametrize(
    ("vector", "signature"), [(_PETER, _PETER_SIGNED), (_ENOCH, _ENOCH_SIGNED)]
)
def test_published_notes_open(vector, signature):
    name, key_id, key = verifier(vector)
    assert checkpoint.note_key_id(name, key.public_bytes_raw()).hex() == key_id
    assert open_note(f"{_TEXT}\n{signature}", name, [key]) == _TEXT
    # Signatures of unknown keys beside it are ignored.
    assert open_note(f"{_TEXT}\n{_PETER_SIGNED}{_ENOCH_SIGNED}", name, [key]) == _TEXT


def test_our_notes_are_made_as_published_ones():
    name, _, key = verifier(_PETER)
    raw = base64.b64decode(_PETER_SIGNED.split(" ")[2])
    made = checkpoint.signed(_TEXT, name, key.public_bytes_raw(), raw[4:])
    assert made == f"{_TEXT}\n{_PETER_SIGNED}"


@pytest.mark.parametrize(
    "bad",
    [
        _TEXT,
        _TEXT + "\n",
        f"{_TEXT}\n{_PETER_SIGNED[:-1]}",
        f"\x01{_TEXT}\n{_PETER_SIGNED}",
        f"{_TEXT}\n{_PETER_SIGNED.replace('PeterNeumann', 'Bad Name')}",
        f"{_TEXT}\n{_PETER_SIGNED}Unexpected line.\n",
        f"{_TEXT}\n{_PETER_SIGNED * 101}",
        f"{_TEXT}\n{_PETER_SIGNED[:60]}ABCD{_PETER_SIGNED[60:]}",
        f"{_TEXT.replace('answer', 'Answer')}\n{_PETER_SIGNED}",
        f"{_TEXT}\n{_ENOCH_SIGNED}",
        f"{_TEXT}\n{_PETER_SIGNED.replace('x08g', 'xxxx')}",
        f"{_TEXT}\n{_PETER_SIGNED.replace('PeterNeumann', 'CarmenSandiego')}",
    ],
)
def test_other_notes_do_not(bad):
    """Shown to fail: with the signature's verification removed from `open_note`."""
    name, _, key = verifier(_PETER)
    with pytest.raises(NoteError):
        open_note(bad, name, [key])


def test_the_text_of_a_published_checkpoint():
    """https://c2sp.org/tlog-checkpoint"""
    text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    parsed = checkpoint.parse(text)
    assert (parsed.origin, parsed.size) == ("example.com/behind-the-sofa", 20852163)
    assert parsed.text() == text
    assert checkpoint.parse(text + "an extension\n") == parsed


@pytest.mark.parametrize(
    "text",
    [
        "a\n1\n",
        "a\n01\n" + "A" * 43 + "=\n",
        "a\n-1\n" + "A" * 43 + "=\n",
        "a\n1\nAAAA\n",
        "\n1\n" + "A" * 43 + "=\n",
        "a\n1\n" + "A" * 43 + "=\n\nb\n",
        "a\n1\n" + "A" * 42 + "B=\n",
    ],
)
def test_what_is_no_checkpoint(text):
    with pytest.raises(NoteError):
        checkpoint.parse(text)


def test_a_checkpoint_of_another_log_or_key():
    made = Checkpoint(ORIGIN, 3, bytes(32))
    assert open_checkpoint(note(made.text()), "test", TRUSTED) == made
    with pytest.raises(NoteError, match="no trusted key"):
        open_checkpoint(note(made.text()), "other", TRUSTED)
    other = Checkpoint("byokeep/other/audit", 3, bytes(32))
    with pytest.raises(NoteError, match="another log"):
        open_checkpoint(note(other.text()), "test", TRUSTED)
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(NoteError, match="no trusted key"):
        open_checkpoint(note(made.text(), stranger), "test", TRUSTED)
