"""Keeps a key out of every text that leaves its child.

A provider's answer is a stranger's text: an endpoint that echoes, or a diff that has the key in
it, puts it into findings and model ids. Each run of eight or more of the key's secret
characters is masked where it stands, as it is or in a form that a reader undoes at sight:
reversed, with blanks between, hex (also with separators), base64 (at any offset, both alphabets),
and percent, JSON, Python and HTML escapes.
"""

from __future__ import annotations

import base64
import html
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from services.common.prefix import public_prefix

MASK: Final = "***"
FRAGMENT: Final = 8
"""Fewer of a key's characters in one piece give nothing away that matters: its hint has four."""

_GROUP: Final = 6  # of any eight bytes, base64 encodes six in a row to these eight characters
_ESCAPE: Final = re.compile(
    r"%[0-9A-Fa-f]{2}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\[\"\\/]|&(?:#\w{1,7}|\w{1,8});"
)
_BORDER: Final = "\x7f"  # stands between two texts, and in no key
_UNSEEN: Final = re.compile(r"[^\x21-\x7f]+")
_NOT_HEX: Final = re.compile(r"0x(?=[0-9a-f]{2})|[^0-9a-f\x7f]+")
_NOT_BASE64: Final = re.compile(r"[^0-9A-Za-z+/\x7f]+")
_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_STANDARD: Final = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True)
class _Form:
    """A way to write a key: every piece of it, in a text that is folded and without the rest."""

    pieces: list[str]
    fold: dict[int, int]
    rest: re.Pattern[str]


class Withheld:
    """A key that no message may hold."""

    __slots__ = ("_forms",)

    def __init__(self, key: str) -> None:
        """Know the key in all its forms."""
        secret = key.removeprefix(public_prefix(key))
        if len(secret) < FRAGMENT:
            secret = key
        pieces = [secret[at : at + FRAGMENT] for at in range(len(secret) - FRAGMENT + 1)]
        groups = [secret[at : at + _GROUP] for at in range(len(secret) - _GROUP + 1)]
        self._forms = (
            _Form(pieces + [one[::-1] for one in pieces], {}, _UNSEEN),
            _Form([one.encode().hex() for one in pieces], _LOWER, _NOT_HEX),
            _Form(
                [base64.b64encode(one.encode()).decode() for one in groups],
                _STANDARD,
                _NOT_BASE64,
            ),
        )

    def __repr__(self) -> str:
        """Nothing of the key."""
        return "<a key that is withheld>"

    def mask(self, message: Message) -> None:
        """Mask the key in every text of a message that holds it."""
        if self._is_in(_BORDER.join(_texts(message))):
            _change(message, self._masked)

    def _is_in(self, text: str) -> bool:
        for written in {text, _ESCAPE.sub(lambda escape: _undone(escape[0]), text)}:
            for form in self._forms:
                seen = form.rest.sub("", written.translate(form.fold))
                if any(piece in seen for piece in form.pieces):
                    return True
        return False

    def _masked(self, text: str) -> str:
        hits = bytearray(len(text))
        for spans in (_characters(text, undo=False), _characters(text, undo=True)):
            written = "".join(character for character, _, _ in spans)
            for form in self._forms:
                seen = written.translate(form.fold)
                rest = {at for one in form.rest.finditer(seen) for at in range(*one.span())}
                places = [at for at in range(len(seen)) if at not in rest]
                seen = "".join(seen[at] for at in places)
                for piece in form.pieces:
                    for at in _all(seen, piece):
                        start = spans[places[at]][1]
                        end = spans[places[at + len(piece) - 1]][2]
                        hits[start:end] = b"\1" * (end - start)
        shown = [
            character if not hit else MASK if at == 0 or not hits[at - 1] else ""
            for at, (character, hit) in enumerate(zip(text, hits, strict=True))
        ]
        return "".join(shown)


def _characters(text: str, *, undo: bool) -> list[tuple[str, int, int]]:
    """Every character of a text and where it stands, with what is escaped undone or not."""
    found = []
    at = 0
    for escape in _ESCAPE.finditer(text) if undo else ():
        found += [(text[place], place, place + 1) for place in range(at, escape.start())]
        at = escape.end()
        found.append((_undone(escape[0]), escape.start(), at))
    return found + [(text[place], place, place + 1) for place in range(at, len(text))]


def _undone(escape: str) -> str:
    """The one character that an escape stands for."""
    if escape[0] == "&":
        character = html.unescape(escape)
        return character if len(character) == 1 else "\0"
    if escape[0] == "%" or escape[1] in "ux":
        return chr(int(escape.lstrip("%\\ux"), 16))
    return escape[1]


def _all(text: str, piece: str) -> Iterator[int]:
    at = text.find(piece)
    while at >= 0:
        yield at
        at = text.find(piece, at + 1)


def _texts(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        for one in value if field.is_repeated else (value,):
            if isinstance(one, Message):
                yield from _texts(one)
            elif field.type == FieldDescriptor.TYPE_STRING:
                yield one


def _change(message: Message, change: Callable[[str], str]) -> None:
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                _change(one, change)
        elif field.type != FieldDescriptor.TYPE_STRING:
            continue
        elif field.is_repeated:
            value[:] = [change(one) for one in value]
        else:
            setattr(message, field.name, change(value))
