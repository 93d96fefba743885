"""Text of others in the log of a CI run, which takes some of its lines for commands."""

from __future__ import annotations

import re

# GitHub: `::name …::…` at the start of a line, blanks before it or not, and `##[name]…` anywhere
# (actions/runner, ActionCommand.cs). Azure Pipelines and TeamCity: `##vso[…`, `##teamcity[…`.
_COMMAND = re.compile(r"(?<!\S):(?=:)|##(?=\w*\[)")


def disarmed(text: str) -> str:
    """Return text of which no line is a command: an invisible space (U+200B) breaks its mark."""
    return _COMMAND.sub("\\g<0>\u200b", text)
