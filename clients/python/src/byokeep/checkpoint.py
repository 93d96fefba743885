"""Checkpoints of the audit log: C2SP tlog-checkpoint, as signed notes.

Sources: https://c2sp.org/signed-note and https://c2sp.org/tlog-checkpoint. A note's key
id is SHA-256(key name ‖ "\\n" ‖ 0x01 ‖ public key)[:4] for Ed25519; the key's name
is the log's origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_ED25519 = b"\x01"
_DASH = "\u2014 "
_MAX_SIGNATURES = 64
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class NoteError(Exception):
    """A note is malformed, or no trusted key signed it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's identity, the number of its leaves, and the root over them."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the note text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def origin_of(deployment: str) -> str:
    """Return the origin of a deployment's audit log."""
    return f"byokeep/{deployment}/audit"


def note_key_id(name: str, public_key: bytes) -> bytes:
    """Return the four bytes that stand before an Ed25519 key's signatures."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:4]


def signed(text: str, name: str, public_key: bytes, signature: bytes) -> str:
    """Return the note of a text and an Ed25519 key's signature over it."""
    raw = base64.b64encode(note_key_id(name, public_key) + signature).decode()
    return f"{text}\n{_DASH}{name} {raw}\n"


def open_note(note: str, name: str, trusted: Iterable[Ed25519PublicKey]) -> str:
    """Return the text of a note that a trusted key of this name signed.

    Signatures of unknown keys (witnesses, retired keys) are ignored.

    Raises:
        NoteError: malformed; a trusted key's signature that does not verify; none at all.
    """
    text, signatures = _split(note)
    keys = {note_key_id(name, key.public_bytes_raw()): key for key in trusted}
    verified = False
    for signer, key_id, signature in signatures:
        key = keys.get(key_id) if signer == name else None
        if key is None:
            continue
        try:
            key.verify(signature, text.encode())
        except InvalidSignature:
            raise NoteError("the note's signature does not verify") from None
        verified = True
    if not verified:
        raise NoteError("no trusted key signed the note")
    return text


def open_checkpoint(
    note: str, deployment: str, trusted: Mapping[str, Ed25519PublicKey]
) -> Checkpoint:
    """Return the checkpoint of a deployment's audit log that a trusted key signed.

    Raises:
        NoteError: see `open_note`; or the text is not a checkpoint of that log.
    """
    origin = origin_of(deployment)
    checkpoint = parse(open_note(note, origin, trusted.values()))
    if checkpoint.origin != origin:
        raise NoteError("the checkpoint is of another log")
    return checkpoint


def parse(text: str) -> Checkpoint:
    """Return what a checkpoint's text says; extension lines are ignored. Raises NoteError."""
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] or not all(lines[:-1]) or not _SIZE.fullmatch(lines[1]):
        raise NoteError("the note is not a checkpoint")
    root = _decode(lines[2])
    if len(root) != 32:
        raise NoteError("the note is not a checkpoint")
    return Checkpoint(lines[0], int(lines[1]), root)


def _split(note: str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    text, blank, tail = note.rpartition("\n\n")
    lines = tail.split("\n")
    if not blank or lines[-1] or len(lines) < 2 or _CONTROL.search(note):
        raise NoteError("the note is malformed")
    if len(lines) - 1 > _MAX_SIGNATURES:
        raise NoteError("the note has too many signatures")
    return text + "\n", [_signature(line) for line in lines[:-1]]


def _signature(line: str) -> tuple[str, bytes, bytes]:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not name or "+" in name or name.split() != [name]:
        raise NoteError("the note is malformed")
    raw = _decode(encoded)
    if len(raw) < 5:
        raise NoteError("the note is malformed")
    return name, raw[:4], raw[4:]


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise NoteError("the note is malformed") from None
    # One encoding only, so that no bit of a note can change unseen.
    if base64.b64encode(raw).decode() != text:
        raise NoteError("the note is malformed")
    return raw
