"""What git knows of the change that is to be reviewed: diff, repository, head commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from byokeep.cli.errors import CliError
from byokeep.cli.text import clean

_SECONDS = 60
# host:owner/name, or scheme://[user@]host[:port]/owner/name
_REMOTE = re.compile(r"(?:[a-z+]+://[^/]+/|[^/:]+:)(?P<path>.+?)(?:\.git)?/*")
_UNFIT = re.compile(r"[^A-Za-z0-9._/-]+")
# A repository's configuration can name programs for git to run; see also `_environment`.
_INERT = ("--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_SCOPES = ("--local", "--worktree")
_FILTERS = r"^filter\..*\.(clean|process|required)$"
# Settings of a user's or a repository's git must not change what is reviewed, or run programs.
_PLAIN = (
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--submodule=short",
    "--ignore-submodules=dirty",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--unified=3",
)


def inside_repository() -> bool:
    """Return whether git is here, and the working directory is in a working tree."""
    if shutil.which("git") is None:
        return False
    return _git("rev-parse", "--is-inside-work-tree") == b"true\n"


def head_commit() -> str:
    """Return the commit that is checked out; empty where there is none."""
    return (_git("rev-parse", "--verify", "--quiet", "HEAD") or b"").decode().strip()


def repository() -> str:
    """Return owner/name of the remote `origin`, else the name of the directory."""
    url = (_git("remote", "get-url", "origin") or b"").decode(errors="replace").strip()
    top = (_git("rev-parse", "--show-toplevel") or b"").decode(errors="replace").strip()
    matched = _REMOTE.fullmatch(url)
    name = matched["path"] if matched else Path(top or Path.cwd()).name
    return _UNFIT.sub("-", name).strip("/-")[-200:] or "repository"


def diff(base: str | None) -> bytes:
    """Return what changed since the merge base with `base`; without it, what is not committed.

    Raises:
        CliError: git refuses, or nothing changed.
    """
    if base is not None and base.startswith("-"):
        raise CliError("--base takes a branch, a tag or a commit")
    # Without a commit, everything in the index is new.
    against = f"{base}...HEAD" if base else "HEAD" if head_commit() else "--cached"
    text = _git("diff", *_PLAIN, against, "--", strict=True, without=_own_filters())
    if text:
        return text
    if base:
        raise CliError(
            f"nothing changed between {clean(base)} and HEAD",
            "byokeep review without --base reviews what is not committed; --diff FILE any diff",
        )
    raise CliError(
        "nothing is changed in the working tree (new files count once they are in `git add`)",
        "byokeep review --base main reviews the commits of a branch; --diff FILE any diff",
    )


def _own_filters() -> list[str]:
    """The settings of filters that the repository defines itself: those of the user, such as
    an installed Git LFS, stay."""
    found: list[str] = []
    for scope in _SCOPES:
        listed = _git(
            "config", scope, "--includes", "--null", "--name-only", "--get-regexp", _FILTERS
        )
        found += os.fsdecode(listed or b"").split("\0")[:-1]
    return found


def _git(*arguments: str, strict: bool = False, without: Sequence[str] = ()) -> bytes | None:
    done = _run(("git", *_INERT, *arguments), _environment(without))
    if done.returncode == 0:
        return done.stdout
    if strict:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CliError(f"git refuses: {said[-1] if said else 'no reason given'}")
    return None


def _environment(without: Sequence[str]) -> dict[str, str]:
    """No transport, which a partial clone's lazy fetch would run, no prompt, no lock, and
    nothing in the settings `without`."""
    environment = {
        **os.environ,
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
    }
    # Not `-c`, which splits at the first "=", and a filter's name may have one.
    first = int(environment.get("GIT_CONFIG_COUNT") or 0)
    for number, name in enumerate(without, first):
        environment[f"GIT_CONFIG_KEY_{number}"] = name
        environment[f"GIT_CONFIG_VALUE_{number}"] = ""
    return {**environment, "GIT_CONFIG_COUNT": str(first + len(without))}


def _run(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, capture_output=True, timeout=_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        pass
    raise CliError(f"git did not answer within {_SECONDS} seconds")
