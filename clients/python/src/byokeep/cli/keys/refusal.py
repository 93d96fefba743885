"""Refusing a provider key that was typed as an argument.

Arguments end up in the shell's history and in every process list, so the command
takes no key there; whatever looks like one is refused, never shown, never used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from byokeep.cli.base.errors import CliError
from byokeep.keyshape import KNOWN_PREFIX

_WHOLE = re.compile(r"(?:sk[-_]|AIza|AQ\.)[A-Za-z0-9._-]*")
_INSIDE = re.compile(rf"(?<![A-Za-z0-9])(?:{KNOWN_PREFIX}|sk_)[A-Za-z0-9._-]{{16,}}")
_RANDOM = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9])[A-Za-z0-9_-]{32,}")


def refuse_keys(arguments: Sequence[str]) -> None:
    """Raise CliError where an argument, or the value of an option, looks like a key."""
    about_keys = "key" in arguments
    for argument in arguments:
        value = argument.split("=", 1)[1] if argument.startswith("-") and "=" in argument else ""
        if any(_looks_like_key(text, about_keys) for text in (argument, value) if text):
            raise CliError(
                "an argument looks like a provider key, and a key is never taken as an argument:"
                " arguments stay in your shell's history and show in process lists",
                hint="run `byokeep key add PROVIDER` and paste it at the hidden prompt, or use"
                " --stdin or --from-env VAR; if that was a real key, replace it at its provider",
                reason="KEY_IN_ARGUMENTS",
            )


def _looks_like_key(text: str, about_keys: bool) -> bool:
    if _INSIDE.search(text):
        return True
    if _WHOLE.fullmatch(text.lstrip("-")):
        return about_keys or not Path(text).exists()
    return bool(_RANDOM.fullmatch(text)) and not Path(text).exists()
