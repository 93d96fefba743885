"""What git knows of the checkout around the working directory: its root, repository and commits."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from byokeep.cli.base.errors import CliError
from byokeep.cli.base.text import clean

_SECONDS = 60
# host:owner/name, or scheme://[user@]host[:port]/owner/name
_REMOTE = re.compile(r"(?:[a-z+]+://[^/]+/|[^/:]+:)(?P<path>.+?)(?:\.git)?/*")
_UNFIT = re.compile(r"[^A-Za-z0-9._/-]+")
_SETTINGS = {
    # No transport, which a partial clone's lazy fetch would run, no prompt and no lock.
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout; `root` is its folder without symbolic links."""

    root: Path

    def ask(self, *arguments: str) -> str | None:
        """Return a line that git prints of the checkout; None where git has no answer."""
        done = run(("git", *arguments), {}, self.root)
        return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else None

    def path(self, name: str) -> Path:
        """Return where git keeps a part of the repository, such as `objects`."""
        return self.root / (self.ask("rev-parse", "--git-path", name) or name)

    def head(self) -> str:
        """Return the commit that is checked out; empty where there is none."""
        return self.ask("rev-parse", "--verify", "--quiet", "HEAD^{commit}") or ""

    def repository(self) -> str:
        """Return owner/name of the remote `origin`, else the name of the folder."""
        matched = _REMOTE.fullmatch(self.ask("remote", "get-url", "origin") or "")
        return label(matched["path"] if matched else self.root.name)


def label(name: str) -> str:
    """Return a name as the contract takes repositories' names."""
    return _UNFIT.sub("-", name).strip("/-")[-200:] or "repository"


def root() -> Path | None:
    """Return the first folder from the working directory upwards that has a `.git`."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), None)


def checkout() -> Checkout | None:
    """Return the checkout around the working directory; None where there is none, or no git.

    Raises:
        CliError: git refuses it, or its own configuration moves the work tree.
    """
    folder = root()
    if folder is None or shutil.which("git") is None:
        return None
    done = run(("git", "rev-parse", "--show-toplevel"), {}, folder)
    if done.returncode:
        raise refused(done.stderr, folder)
    tree = Path(os.fsdecode(done.stdout).removesuffix("\n"))
    if tree != folder:
        raise CliError(
            f"the checkout's own configuration moves its work tree from {clean(str(folder))} to"
            f" {clean(str(tree))}",
            "git config --unset core.worktree, if you trust the checkout",
        )
    return Checkout(folder)


def refused(stderr: bytes, folder: Path) -> CliError:
    """Return the error for what git refuses to do in a folder: what it says, and what mends it."""
    said = stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
    # Before its reason are warnings, and after it is advice.
    reason = next((line for line in said if line.startswith(("fatal: ", "error: "))), said[-1])
    hint = ""
    if "dubious ownership" in reason:
        trusted = shlex.quote(str(folder))
        hint = f"git config --global --add safe.directory {trusted}, if you trust who owns it"
    if "unable to read" in reason:
        hint = "a partial clone lacks it: git fetch --refetch --no-filter origin"
    return CliError(f"git refuses: {clean(reason)}", hint)


def run(
    command: Sequence[str],
    settings: dict[str, str],
    folder: Path,
    *,
    given: bytes = b"",
    limit: int = 2**20,
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder; of the caller's environment it gets nothing that is git's.

    Its output is read to `limit` bytes; it is killed where there is more, or after a minute.
    """
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment | _SETTINGS | settings,
            cwd=folder,
        )
        assert process.stdout is not None  # noqa: S101 for the type checker
        watchdog = threading.Timer(_SECONDS, process.kill)
        watchdog.start()
        with process:
            stdout = process.stdout.read(limit + 1)
            if len(stdout) > limit:
                process.kill()
        if not watchdog.is_alive() and process.returncode < 0:
            raise CliError(f"git did not answer within {_SECONDS} seconds")
        watchdog.cancel()
        stderr.seek(0)
        code = 0 if len(stdout) > limit else process.returncode
        return subprocess.CompletedProcess(command, code, stdout, stderr.read(limit))
