"""What a review is given: read from files, standard input and git."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from byokeep.cli.base import checked
from byokeep.cli.base.errors import A_PART, CliError
from byokeep.cli.base.text import count
from byokeep.cli.reviews import files, gitdiff, gitinfo
from byokeep.orchestrator.v1 import review_pb2

# Limits of the contract (review.proto), checked here for the name of the file.
_CONTEXT_BYTES = 262_144
_CONTEXT_FILES = 20
_GUIDANCE_BYTES = 65_536
# The largest that any deployment takes; more is not worth reading.
_DIFF_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Given:
    """The options of `byokeep review` that say what is to be reviewed."""

    diff: str | None
    base: str | None
    repo: str | None
    pr: int
    head: str | None
    title: str
    description: str
    context: list[Path]
    guidance: Path | None
    model: str
    user: str
    key: str


def build(given: Given, note: Callable[[str], None]) -> review_pb2.ReviewInput:
    """Return the input of a review; tell `note` what of the work tree is not in it.

    Raises:
        CliError: nothing to review, a file can't be read, is not text or is too large.
    """
    if given.diff is not None and given.base is not None:
        raise CliError("--diff and --base exclude each other")
    if len(given.context) > _CONTEXT_FILES:
        raise CliError(f"at most {_CONTEXT_FILES} --context files are taken")
    if given.repo is not None:
        checked.repository(given.repo)
    if given.model:
        checked.model(given.model)
    checked.user(given.user)
    if given.key:
        checked.key_reference(given.key)
    # A diff from elsewhere needs no checkout, and is not of the commit that is checked out here.
    checkout = gitinfo.checkout() if given.diff is None else None
    return review_pb2.ReviewInput(
        repository=given.repo or _repository(checkout),
        pull_request=given.pr,
        head_commit=given.head or (checkout.head() if checkout else ""),
        title=given.title,
        description=given.description,
        diff=_diff(given, checkout, note),
        context_files=[_context(path) for path in given.context],
        guidance=_text(given.guidance, _GUIDANCE_BYTES)[1] if given.guidance else "",
        model=given.model,
        user=given.user,
        key=given.key,
    )


def _repository(checkout: gitinfo.Checkout | None) -> str:
    if checkout is None:
        with contextlib.suppress(CliError):
            checkout = gitinfo.checkout()
    return checkout.repository() if checkout else gitinfo.label(Path.cwd().name)


def _diff(given: Given, checkout: gitinfo.Checkout | None, note: Callable[[str], None]) -> bytes:
    if given.diff is not None:
        text = _given_diff(given.diff)
    elif checkout is None and gitinfo.root() is not None:
        raise CliError(
            "there is no git to read this checkout with",
            "install git, or make the diff elsewhere: byokeep review --diff FILE",
        )
    elif checkout is None:
        raise CliError(
            "there is no diff: this is not a git repository, and --diff is not given",
            "byokeep review --diff FILE, or git diff | byokeep review --diff -",
        )
    elif given.base is not None:
        text = gitdiff.between(checkout, given.base, _DIFF_BYTES)
    else:
        text, untracked = gitdiff.uncommitted(checkout, _DIFF_BYTES)
        if untracked:
            note(f"{count(untracked, 'untracked file')} not reviewed; `git add -N FILE` adds one")
    if len(text) > _DIFF_BYTES:
        raise CliError(f"the diff is larger than {_DIFF_BYTES // 2**20} MiB", A_PART)
    return text


def _given_diff(name: str) -> bytes:
    if name == "-":
        text = sys.stdin.buffer.read(_DIFF_BYTES + 1)
        if not text:
            # Whoever should have made it may have failed.
            raise CliError("standard input is empty: there is no diff to review")
        return text
    text = files.any_file(name, _DIFF_BYTES)
    if not text:
        raise CliError(f"{name} is empty: there is no diff to review")
    return text


def _context(path: Path) -> review_pb2.ContextFile:
    inside, content = _text(path, _CONTEXT_BYTES)
    return review_pb2.ContextFile(path=inside, content=content)


def _text(path: Path, limit: int) -> tuple[str, str]:
    inside, raw = files.of_checkout(path, limit)
    if len(raw) > limit:
        raise CliError(f"{path} is larger than {limit // 1024} KiB")
    try:
        return inside, raw.decode()
    except UnicodeDecodeError:
        pass
    raise CliError(f"{path} is not UTF-8 text")
