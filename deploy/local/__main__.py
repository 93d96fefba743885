"""`python -m deploy.local`: keep a byokeep stack on this machine, or show it once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from deploy.local import background, demo
from deploy.local.processes import StackError
from deploy.local.state import State, default_root

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a stack and leave it running")
    up.add_argument("--foreground", action="store_true", help="stay; Ctrl-C stops the stack")
    up.add_argument(
        "--port",
        action="append",
        default=[],
        type=_port,
        metavar="NAME=NUMBER",
        help="listen there, not on a free port: keyvault, orchestrator, runner, emulator,"
        " emulator-control, and SERVICE-health, SERVICE-metrics",
    )
    down = commands.add_parser("down", help="stop the stack; its data stays")
    status = commands.add_parser("status", help="say which processes run and serve")
    clean = commands.add_parser("clean", help="stop the stack and erase its folder")
    run = commands.add_parser("run", help="show byokeep on a throwaway stack, and stop it")
    run.add_argument("--diff", type=Path, help="review this diff instead of the one shipped")
    run.add_argument("--provider", default="openai", choices=["openai", "anthropic", "gemini"])
    prove = commands.add_parser(
        "prove", help="attack a throwaway stack; exit 1 if one gets through"
    )
    prove.add_argument("--only", action="append", default=[], metavar="NAME", help="this attack")
    prove.add_argument("--list", action="store_true", help="say what attacks there are")
    for command in (up, down, status, clean):
        command.add_argument(
            "--state", type=Path, default=None, help="its folder (default: BYOKEEP_STATE)"
        )
    for command in (up, clean):
        command.add_argument(
            "--config",
            type=Path,
            default=None,
            help="the profile to write or erase (default: where .venv/bin/byokeep finds it, or in"
            " the stack's folder where that is chosen)",
        )
    for command in (up, run):
        command.add_argument(
            "--live", action="store_true", help="real provider hosts; keys are real and cost money"
        )
    return parser.parse_args(argv)


def _port(text: str) -> tuple[str, int]:
    name, separator, number = text.rpartition("=")
    if not separator or not number.isdecimal() or not 0 < int(number) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER")
    return name, int(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    # One is enough: a second must not break off the orderly stop.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _config(arguments: argparse.Namespace, root: Path) -> Path:
    if arguments.config:
        return Path(arguments.config).absolute()
    # A second stack leaves the profile of the checkout's own alone.
    chosen = arguments.state or os.environ.get("BYOKEEP_STATE")
    return State(root).config if chosen else background.CHECKOUT_CONFIG


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "run":
        return demo.run(arguments.diff, provider=arguments.provider, live=arguments.live)
    if arguments.command == "prove":
        return _prove(arguments)
    root = arguments.state.absolute() if arguments.state else default_root()
    match arguments.command:
        case "up" if arguments.foreground:
            return background.serve(
                root, _config(arguments, root), live=arguments.live, ports=dict(arguments.port)
            )
        case "up":
            return background.up(
                root, _config(arguments, root), live=arguments.live, ports=dict(arguments.port)
            )
        case "down":
            return background.down(root)
        case "status":
            return background.status(root)
        case _:
            return background.clean(root, _config(arguments, root))


def _prove(arguments: argparse.Namespace) -> int:
    # Loaded here: it needs gRPC and every client, which the other commands don't.
    from deploy.local.prove import run as prove

    return prove.listing() if arguments.list else prove.run(arguments.only)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = _arguments(argv)
    try:
        return _dispatch(arguments)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything is stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    os.umask(0o077)
    for each in _SIGNALS:
        signal.signal(each, _interrupt)
    sys.exit(main())
