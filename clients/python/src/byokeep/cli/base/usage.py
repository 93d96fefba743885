"""Usage errors of typer, retold without echoing what was typed.

An argument at the wrong place may be a key: names of options and the choices of a
parameter are shown, values never.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from byokeep.cli.base.errors import CliError

_OPTION = re.compile(r"--?[a-z][a-z-]{0,20}")


def from_usage(error: Exception, command: Any, arguments: Sequence[str]) -> CliError:
    """Return a usage error as an error to show; `command` is the whole one, called with
    `arguments`."""
    kind = type(error).__name__
    context = getattr(error, "ctx", None)
    path = context.command_path if context else _path(command, arguments)
    return CliError(_sentence(kind, error, path), f"{path} --help", reason="USAGE")


def _path(command: Any, arguments: Sequence[str]) -> str:
    # typer does not say on which level an option's value was missing.
    path = ["byokeep"]
    for argument in arguments:
        if found := getattr(command, "commands", {}).get(argument):
            command = found
            path.append(argument)
    return " ".join(path)


def _sentence(kind: str, error: Any, path: str) -> str:
    if kind == "NoSuchOption":
        return f"{path} has no {_named('such option', error.option_name)}{_near(error)}"
    if kind == "BadOptionUsage":
        option = _named("the option", error.option_name)
        return (
            f"{option} takes no value"
            if "does not take" in str(error)
            else f"{option} needs a value"
        )
    parameter = getattr(error, "param", None)
    if parameter is None:
        return _without_parameter(error, path)
    name = _parameter(parameter)
    one_of = _choices(parameter)
    if kind == "MissingParameter":
        return f"{name} is missing{one_of}"
    return f"{name} " + (_number(parameter) or f"has a value that it can't have{one_of}")


def _without_parameter(error: Any, path: str) -> str:
    if "No such command" in str(error):
        commands = getattr(getattr(error.ctx, "command", None), "commands", {})
        return f"{path} has no such command; it has: {', '.join(commands)}"
    if "unexpected extra argument" in str(error):
        sentence = f"{path} got an argument too many (not shown, in case it is a secret)"
        if path.startswith("byokeep key"):
            sentence += "; a key is never an argument: it would stay in your shell's history"
        return sentence
    return f"{path} was called in a wrong way"


def _choices(parameter: Any) -> str:
    # typer up to 0.28 keeps them in the type, from 0.29 on in a descriptor.
    for holder in ("type_descriptor", "type"):
        if choices := getattr(getattr(parameter, holder, None), "choices", None):
            return f": one of {', '.join(str(choice) for choice in choices)}"
    return ""


def _number(parameter: Any) -> str:
    for holder in ("type_descriptor", "type"):
        kind = getattr(parameter, holder, None)
        if not any(word in getattr(kind, "name", "") for word in ("int", "float")):
            continue
        low, high = getattr(kind, "min", None), getattr(kind, "max", None)
        if low is not None and high is not None:
            return f"takes a number from {low:,} to {high:,}"
        return f"takes a number from {low:,} on" if low is not None else "takes a number"
    return ""


def _parameter(parameter: Any) -> str:
    options = [text for text in getattr(parameter, "opts", ()) if text.startswith("--")]
    return str(options[0] if options else parameter.metavar or parameter.name.upper())


def _named(what: str, option: str) -> str:
    return f"{what} {option}" if _OPTION.fullmatch(option) else what


def _near(error: Any) -> str:
    near = ", ".join(error.possibilities or ())
    return f"; there is {near}" if near else ""
