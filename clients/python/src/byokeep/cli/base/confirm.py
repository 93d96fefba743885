"""Asking before what can't be undone."""

from __future__ import annotations

import sys

import typer

from byokeep.cli.base.errors import CliError


def confirm_by_name(name: str, what: str, *, yes: bool) -> None:
    """Ask for a name to be typed. Raises CliError where it is not that name, or nobody is there."""
    if yes:
        return
    _need_terminal()
    if typer.prompt(f"To {what}, type its name", err=True) != name:
        raise CliError("that is another name; nothing was done", reason="DECLINED")


def confirm(question: str, *, yes: bool) -> None:
    """Ask yes or no. Raises CliError where the answer is no, or nobody is there to give it."""
    if yes:
        return
    _need_terminal()
    if not typer.confirm(question, err=True):
        raise CliError("nothing was done", reason="DECLINED")


def _need_terminal() -> None:
    if not sys.stdin.isatty():
        raise CliError("this asks for a confirmation, and there is no terminal", "add --yes")
