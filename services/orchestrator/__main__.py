"""`python -m services.orchestrator serve|migrate`."""

from __future__ import annotations

import asyncio
import os
import sys

from services.common import config, logs, postgres, server
from services.orchestrator.config import MigrateSettings, Settings
from services.orchestrator.server import App

_USAGE = "usage: python -m services.orchestrator serve|migrate"


def main(arguments: list[str]) -> int:
    """Run a command; the environment holds its settings."""
    if arguments not in (["serve"], ["migrate"]):
        print(_USAGE, file=sys.stderr)  # noqa: T201 for a person
        return 2
    with server.refusing("orchestrator"):
        if arguments == ["migrate"]:
            # Alembic is half of what a serving process would have in memory otherwise.
            from services.orchestrator.migrate import migrate

            # Migrating takes no other setting: no certificate, no keys.
            settings = config.load(MigrateSettings, os.environ)
            logs.setup("orchestrator", "info")
            url = postgres.database_url(settings.database_url_file)
            asyncio.run(postgres.probe(url))
            migrate(url)
            return 0
        serving = config.load(Settings, os.environ)
        server.main("orchestrator", serving, lambda: App(serving))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
