"""The command `byokeep`: a client like any other (extra `cli`)."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command and exit; docs of the exit codes: `byokeep --help`."""
    from byokeep.cli import interrupt
    from byokeep.cli.app import run

    interrupt.install()

    sys.exit(run(sys.argv[1:]))
