"""The command `byokeep`: a client like any other (extra `cli`)."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command and exit; docs of the exit codes: `byokeep --help`."""
    from byokeep.cli.app import run
    from byokeep.cli.base import interrupt

    # What the caller has closed is None here, and its number free for the next socket.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    interrupt.install()

    sys.exit(run(sys.argv[1:]))
