"""Text from servers, made fit for a terminal."""

from __future__ import annotations

import unicodedata

from byokeep.loglines import disarmed

# Cc: controls, among them ESC and CSI; Cf: bidirectional overrides and other invisibles.
_UNFIT = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def count(number: int, one: str, many: str = "") -> str:
    """Return `1 call`, `2 calls`; `many` where the plural is more than an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def clean(text: str, *, lines: bool = False) -> str:
    """Return text without control and invisible characters; with `lines`, newlines stay.

    What came from a server, a model or a diff could otherwise move the cursor, hide
    findings, write to the clipboard, or command the CI run whose log it is printed to.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(
            character
            if unicodedata.category(character) not in _UNFIT or (lines and character == "\n")
            else " " * (character == "\n")
            for character in text.replace("\t", "    ")
        )
    return disarmed(text)
