"""`python -m services.orchestrator serve|migrate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.common import config, server
from services.orchestrator.config import Settings, database_url
from services.orchestrator.server import App

_USAGE = "usage: python -m services.orchestrator serve|migrate"


def main(arguments: list[str]) -> int:
    """Run a command; the environment holds its settings."""
    if arguments not in (["serve"], ["migrate"]):
        print(_USAGE, file=sys.stderr)  # noqa: T201 for a person
        return 2
    try:
        if arguments == ["migrate"]:
            # Alembic is half of what a serving process would have in memory otherwise.
            from services.orchestrator.migrate import migrate

            migrate(database_url(_url_file()))
            return 0
        settings = config.load(Settings, os.environ)
    except config.ConfigError as error:
        print(f"orchestrator does not start:\n{error}", file=sys.stderr)  # noqa: T201
        return server.EXIT_CONFIG
    server.main("orchestrator", settings, lambda: App(settings))
    return 0


def _url_file() -> Path:
    # Migrating takes no other setting: no certificate, no keys.
    name = "BYOKEEP_DATABASE_URL_FILE"
    if not os.environ.get(name):
        raise config.ConfigError(f"{name} is not set: 0600 file with a postgresql:// URL")
    return Path(os.environ[name])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
