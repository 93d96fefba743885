"""What a review is given: read from files, standard input and git."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from byokeep.cli import checked, gitinfo
from byokeep.cli.errors import CliError
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


def build(given: Given) -> review_pb2.ReviewInput:
    """Return the input of a review.

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
    in_repository = gitinfo.inside_repository()
    # A diff from elsewhere need not be of the commit that is checked out here.
    here = in_repository and given.diff is None
    head = given.head or (gitinfo.head_commit() if here else "")
    return review_pb2.ReviewInput(
        repository=given.repo or gitinfo.repository(),
        pull_request=given.pr,
        head_commit=head,
        title=given.title,
        description=given.description,
        diff=_diff(given, in_repository),
        context_files=[
            review_pb2.ContextFile(path=_label(path), content=_text(path, _CONTEXT_BYTES))
            for path in given.context
        ],
        guidance=_text(given.guidance, _GUIDANCE_BYTES) if given.guidance else "",
        model=given.model,
        user=given.user,
    )


def _diff(given: Given, in_repository: bool) -> bytes:
    if given.diff == "-":
        text = sys.stdin.buffer.read(_DIFF_BYTES + 1)
        if not text:
            raise CliError("standard input is empty: there is no diff to review")
    elif given.diff is not None:
        text = _bytes(Path(given.diff))
        if not text:
            raise CliError(f"{given.diff} is empty: there is no diff to review")
    elif in_repository:
        text = gitinfo.diff(given.base)
    else:
        raise CliError(
            "there is no diff: this is not a git repository, and --diff is not given",
            "byokeep review --diff FILE, or git diff | byokeep review --diff -",
        )
    if len(text) > _DIFF_BYTES:
        raise CliError(f"the diff is larger than {_DIFF_BYTES // 2**20} MiB", "review a part of it")
    return text


def _text(path: Path, limit: int) -> str:
    raw = _bytes(path)
    if len(raw) > limit:
        raise CliError(f"{path} is larger than {limit // 1024} KiB")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    raise CliError(f"{path} is not UTF-8 text")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CliError(f"{path} can't be read: {error.strerror}") from None


def _label(path: Path) -> str:
    # Where a file lies on this machine is nobody's business.
    here = Path.cwd()
    full = (here / path).resolve()
    return (full.relative_to(here) if full.is_relative_to(here) else Path(full.name)).as_posix()
