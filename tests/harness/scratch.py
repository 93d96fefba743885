"""Where tests put a PostgreSQL of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from deploy.local.state import memory_folder

# What a whole run of the tests may fill.
_ROOM = 4 * 1024**3


def folder() -> Path:
    """Make a folder in memory if there is room: a database is hundreds of files, and hundreds of
    tests have one each. Else below /tmp, for pytest's own folders are closed to the system
    user that PostgreSQL runs as where the tests run as root. The caller removes it."""
    return Path(tempfile.mkdtemp(prefix="byokeep-test-", dir=memory_folder(_ROOM) or "/tmp"))
