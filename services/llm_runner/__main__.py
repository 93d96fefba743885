"""`python -m services.llm_runner serve`: the zygote first, then everything that loads grpc."""

from __future__ import annotations

import argparse
import os
import sys

from services.llm_runner.spawner import Spawner


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; 1 where the zygote was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m services.llm_runner",
        description="Runs review and validation attempts in one-shot child processes.",
        epilog="Settings are BYOKEEP_* environment variables; docs/decisions/0001 lists them.",
    )
    parser.add_argument("command", choices=["serve"])
    parser.parse_args(argv)
    spawner = Spawner(os.environ)

    from services.common import server
    from services.llm_runner import config
    from services.llm_runner.server import App

    with server.refusing("llm_runner"):
        settings = config.load(os.environ)
    app = App(settings, spawner)
    server.main("llm_runner", settings, lambda: app)
    return 1 if app.zygote_lost else 0


if __name__ == "__main__":
    sys.exit(main())
