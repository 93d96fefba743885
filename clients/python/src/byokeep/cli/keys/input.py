"""Reading a provider key: a hidden prompt, standard input, or an environment variable."""

from __future__ import annotations

import getpass
import os
import re
import sys

from byokeep.cli.base.errors import CliError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# What no provider's key looks like: the only ones with neither lower case nor a hyphen.
_NAMEABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# More than any key: enough to say that it is too long.
_MOST_BYTES = 4096


def read_key(provider: str, *, stdin: bool, from_env: str | None) -> str:
    """Return the key's text as given, without one newline at the end of standard input.

    Raises:
        CliError: there is nothing to read, or no terminal to ask on.
    """
    if stdin and from_env is not None:
        raise CliError("--stdin and --from-env exclude each other")
    if from_env is not None:
        return _from_environment(from_env)
    return _from_stdin() if stdin else _from_prompt(provider)


def _from_environment(variable: str) -> str:
    # The value given by mistake for the name must not be shown.
    if not _VARIABLE.fullmatch(variable):
        raise CliError(
            "--from-env takes the name of a variable, such as OPENAI_API_KEY, not its value"
        )
    if not (value := os.environ.get(variable)):
        named = f": {variable}" if _NAMEABLE.fullmatch(variable) else ""
        raise CliError(f"--from-env names a variable that is not set or empty{named}")
    return value


def _from_stdin() -> str:
    raw = sys.stdin.buffer.read(_MOST_BYTES)
    text = raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw
    if not text:
        raise CliError("there is no key on standard input")
    return text.decode(errors="replace")


def _from_prompt(provider: str) -> str:
    if not sys.stdin.isatty():
        raise CliError(
            "there is no terminal to ask for the key on",
            "--stdin reads it from standard input, --from-env VAR from a variable",
        )
    text = getpass.getpass(f"API key of {provider} (not shown): ", stream=sys.stderr)
    if not text:
        raise CliError("no key was typed")
    return text
