"""`make run`: byokeep as a user sees it, on a stack that is gone afterwards.

The lines shown are the command's real ones, run in this process to spare its start.
"""

from __future__ import annotations

import gc
import os
import secrets
import shlex
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.local.background import show
from deploy.local.processes import StackError
from deploy.local.state import throwaway_state
from deploy.local.supervisor import LocalStack
from services.common.diff import DiffError, parse

SHIPPED_DIFF = Path(__file__).with_name("demo.diff")
_SHIPPED_LABELS = ("--repo", "acme/shop", "--title", "Orders: export")
_VARIABLE = "DEMO_PROVIDER_KEY"
_PLAUSIBLE = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
_LIVE_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
}


def run(diff: Path | None, *, provider: str, live: bool) -> int:
    """Show a whole round; return 0, or the exit code of the first line that failed.

    Raises StackError if the stack doesn't start or there is no key to use.
    """
    started = time.monotonic()
    chosen = diff or _nearest(SHIPPED_DIFF)
    if not chosen.is_file():
        raise StackError(f"DIFF: there is no file {chosen}")
    try:
        parse(chosen.read_bytes())
    except (DiffError, OSError) as error:
        raise StackError(f"DIFF: {chosen} can't be reviewed: {error}") from None
    variable = _key_variable(provider, live=live)
    with throwaway_state(in_memory=True) as state:
        print(f"starting a throwaway stack in {state.root}")
        _warm_up()
        stack = LocalStack(state, live=live, report=show)
        try:
            stack.start()
            os.environ["BYOKEEP_CONFIG"] = str(state.config)
            print(f"\n$ export BYOKEEP_CONFIG={shlex.quote(str(state.config))}")
            status = _play(_lines(provider, variable, chosen, state.run / "audit.jsonl"))
        finally:
            stack.stop(discard=True)
    print(f"\neverything is stopped and erased; {time.monotonic() - started:.1f} s in all")
    return status


def _lines(provider: str, variable: str, diff: Path, export: Path) -> list[Sequence[str]]:
    labels = _SHIPPED_LABELS if diff.samefile(SHIPPED_DIFF) else ()
    return [
        ("key", "add", provider, "--from-env", variable),
        ("review", *labels, "--diff", str(diff)),
        ("key", "trail", provider),
        ("audit", "export", "--output", str(export)),
        ("audit", "verify", str(export)),
    ]


def _play(lines: Sequence[Sequence[str]]) -> int:
    for line in lines:
        print(f"\n$ byokeep {shlex.join(line)}", flush=True)
        status = _byokeep(line)
        if status != 0:
            print(f"exit code {status}", flush=True)
            return status
    return 0


def _byokeep(line: Sequence[str]) -> int:
    from byokeep.cli.app import run as byokeep

    return byokeep(line)


def _key_variable(provider: str, *, live: bool) -> str:
    """The variable that holds the key: the user's own with ``live``, else a random one
    of the provider's shape, which only the emulator takes."""
    if not live:
        os.environ[_VARIABLE] = _PLAUSIBLE[provider] + secrets.token_hex(20)
        return _VARIABLE
    variable = _LIVE_VARIABLES[provider]
    if not os.environ.get(variable):
        raise StackError(f"LIVE=1 uses your own key: set {variable}, or leave LIVE out")
    return variable


def _nearest(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _warm_up() -> None:
    """Load the command while the processes start; the main thread waits for them anyway."""
    threading.Thread(target=_load, daemon=True).start()


def _load() -> None:
    gc.disable()  # as in `warm`
    import byokeep.cli.app  # noqa: F401

    gc.enable()
