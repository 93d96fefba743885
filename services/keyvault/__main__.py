"""`python -m services.keyvault serve | migrate | new-keyring`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

from services.common.config import load
from services.keyvault.config import Settings


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m services.keyvault",
        description="keyvault keeps customers' provider keys. Settings are BYOKEEP_* variables.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until SIGTERM")
    serve.add_argument(
        "--role",
        choices=("all", "data", "admin"),
        default="all",
        help="data: custody and leases; admin: audit, tenants' KEKs; all: both (one machine)",
    )
    commands.add_parser(
        "migrate",
        help="bring the schema up to date, make keyvault's own keys,"
        " print the clients' trust bundle (trust.json); may be repeated",
    )
    commands.add_parser("new-keyring", help="print a new keyring for backend local")
    arguments = parser.parse_args()
    if arguments.command == "new-keyring":
        from services.keyvault.kek.keyring import new_keyring

        sys.stdout.write(new_keyring() + "\n")
        return
    from services.common import server

    with server.refusing("keyvault"):
        _run(arguments, load(Settings, os.environ))


def _run(arguments: argparse.Namespace, settings: Settings) -> None:
    from services.common import logs, postgres, server

    if arguments.command == "migrate":
        from services.keyvault import migrate

        server.close_the_door()
        logs.setup("keyvault", settings.log_level)
        url = postgres.database_url(settings.database_url_file)
        asyncio.run(postgres.probe(url))
        migrate.upgrade(url)
        sys.stdout.write(json.dumps(asyncio.run(migrate.bootstrap(settings)), indent=2) + "\n")
        return
    from services.keyvault.server import App

    server.main("keyvault", settings, lambda: App(settings, arguments.role))


if __name__ == "__main__":
    main()
