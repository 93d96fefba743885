"""The diff of a change, with nothing ambient in it.

git runs on a private repository that is made here and thrown away. It has a configuration, a home
and attributes of its own; of the checkout it has the objects, the borders of a shallow clone and,
for what is not committed, the index and the work tree. So no setting of the system, the user, the
repository, an include or the environment, no attribute in the change itself, no hook, filter,
replacement or graft decides what is shown, and none of their programs runs.

Commits are compared byte by byte as they are stored, the work tree as it lies on the disk: line
ends and filters (Git LFS) are not converted, but a file that the index knows as unchanged is not
read at all.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from byokeep.cli.base.errors import CliError
from byokeep.cli.base.text import clean
from byokeep.cli.reviews import gitinfo
from byokeep.cli.reviews.gitinfo import Checkout

_CONFIG = """\
[core]
	repositoryFormatVersion = 1
	fileMode = true
	commitGraph = false
[extensions]
	objectFormat = {}
"""
# Above every .gitattributes of a tree: gitattributes(5).
_ATTRIBUTES = "* !diff -text !eol !working-tree-encoding !ident !filter\n"
# Above `ignore` in the .gitmodules of a tree: gitmodules(5). The programs that a submodule's own
# configuration names would run with less.
_DIFF = ("diff", "--ignore-submodules=dirty")
# Flags of the index that hide changes, as `ls-files -v` shows them.
_HIDING = {"--no-assume-unchanged": re.compile(rb"[a-z] "), "--no-skip-worktree": re.compile(b"S ")}
_UNTEXTUAL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# What no remote has a branch of: HEAD~1, @{u}, a commit's hash.
_RELATIVE = re.compile(r"[~^@:]|^HEAD$|^[0-9a-f]{7,64}$")
_MOST_LOOKED_AT = 100


@dataclass(frozen=True, slots=True)
class _Private:
    """A private repository (see the module) on the objects of a checkout."""

    folder: Path
    objects: Path
    tree: Path

    def git(self, *arguments: str, given: bytes = b"", limit: int = 2**20) -> bytes:
        """Return what git prints, at most one byte more than the limit. Raises CliError."""
        home = str(self.folder)
        settings = {
            "GIT_DIR": home,
            "GIT_WORK_TREE": str(self.tree),
            "GIT_OBJECT_DIRECTORY": str(self.objects),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ATTR_NOSYSTEM": "1",
            "HOME": home,
            "XDG_CONFIG_HOME": home,
        }
        done = gitinfo.run(("git", *arguments), settings, self.tree, given=given, limit=limit)
        if done.returncode:
            raise gitinfo.refused(done.stderr, self.tree)
        return done.stdout


def between(checkout: Checkout, base: str, limit: int) -> bytes:
    """Return what HEAD's commits change since the merge base with `base`. Raises CliError: git
    refuses, `base` is no single commit, or nothing is changed."""
    start, head = _commit(checkout, base), checkout.head()
    with _private(checkout) as private:
        fork = _fork(private, start, head)
        if not fork:
            raise CliError(
                f"{clean(base)} and HEAD have no commit in common here", _whole(checkout, base)
            )
        text = _diff(private, (fork, head), limit)
    if text:
        return text
    # A gate that compares a branch with itself would pass for ever.
    raise CliError(
        f"nothing changed between {clean(base)} and HEAD",
        "byokeep review without --base reviews what is not committed; --diff FILE any diff",
    )


def uncommitted(checkout: Checkout, limit: int) -> tuple[bytes, int]:
    """Return how the work tree's tracked files differ from HEAD, and how many files are neither
    tracked nor ignored by a .gitignore. Raises CliError: git refuses, or nothing is changed."""
    with _private(checkout, checkout.root) as private:
        _take_index(checkout, private)
        empty = ("hash-object", "-t", "tree", os.devnull)
        # Without a commit, everything in the index is new.
        against = checkout.head() or private.git(*empty).decode().strip()
        text = _diff(private, (against,), limit)
        others = ("ls-files", "--others", "--exclude-per-directory=.gitignore", "-z")
        untracked = private.git(*others, limit=2**26).count(b"\0")
    if text:
        return text, untracked
    raise CliError(
        "nothing is changed in the working tree (new files count once they are in `git add`)",
        "byokeep review --base main reviews the commits of a branch; --diff FILE any diff",
    )


@contextmanager
def _private(checkout: Checkout, tree: Path | None = None) -> Iterator[_Private]:
    with tempfile.TemporaryDirectory(prefix="byokeep-") as name:
        folder = Path(name)
        for part in ("objects", "refs", "info", "tree"):
            (folder / part).mkdir()
        (folder / "HEAD").write_text("ref: refs/heads/none\n")
        form = checkout.ask("rev-parse", "--show-object-format") or "sha1"
        (folder / "config").write_text(_CONFIG.format(form))
        (folder / "info" / "attributes").write_text(_ATTRIBUTES)
        shallow = checkout.path("shallow")
        if shallow.exists():
            shutil.copy(shallow, folder / "shallow")
        yield _Private(folder, checkout.path("objects"), tree or folder / "tree")


def _commit(checkout: Checkout, name: str) -> str:
    if name.startswith("-"):
        raise CliError("--base takes a branch, a tag or a commit")
    known = ("-c", "core.warnAmbiguousRefs=true", "rev-parse", "--verify", f"{name}^{{commit}}")
    done = gitinfo.run(("git", *known), {}, checkout.root)
    if done.returncode:
        theirs = f"refs/remotes/origin/{name}"
        found = checkout.ask("rev-parse", "--verify", "--quiet", theirs) is not None
        raise CliError(
            f"{clean(name)} is no branch, tag or commit of this clone",
            f"--base origin/{clean(name)}" if found else _whole(checkout, name),
        )
    if b"ambiguous" in done.stderr:
        raise CliError(
            f"{clean(name)} names several things in this repository",
            f"--base refs/heads/{clean(name)}, or the commit itself",
        )
    return done.stdout.decode().strip()


def _fork(private: _Private, start: str, head: str) -> str:
    """Return the commit where two histories part; empty where there is none here."""
    with suppress(CliError):
        return private.git("merge-base", start, head).decode().strip()
    return ""


def _whole(checkout: Checkout, base: str) -> str:
    """Return what gets a base that this clone does not have, or not with its history."""
    branch = clean(base.removeprefix("origin/"))
    every = "origin '+refs/heads/*:refs/remotes/origin/*'"
    named = f"then --base origin/{branch} (a tag: {branch})"
    then = "then again" if _RELATIVE.search(base) else named
    if checkout.path("shallow").exists():
        again = f"git fetch --tags --unshallow {every} (GitHub's checkout action: fetch-depth: 0)"
        return f"this clone is shallow: {again}, {then}"
    there = "git branch --all lists what there is"
    return f"{there}; of origin: git fetch --tags {every}, {then}"


def _take_index(checkout: Checkout, private: _Private) -> None:
    """Copy the index, and have no file in it pass as unchanged unseen."""
    index = checkout.path("index")
    for part in (index, *index.parent.glob("sharedindex.*")):
        if part.exists():
            # With its time: git compares the content of what changed in the same moment.
            shutil.copy2(part, private.folder / part.name)
    entries = private.git("ls-files", "-v", "-z", limit=2**30).split(b"\0")[:-1]
    tree = os.fsencode(private.tree)
    for clearing, hidden in _HIDING.items():
        paths = [entry[2:] for entry in entries if hidden.match(entry)]
        # What a sparse checkout leaves out is not there, and not deleted.
        there = [path for path in paths if os.path.lexists(os.path.join(tree, path))]
        if there:
            private.git("update-index", clearing, "-z", "--stdin", given=b"\0".join(there) + b"\0")


def _diff(private: _Private, sides: Sequence[str], limit: int) -> bytes:
    """Return the diff. A NUL makes a file binary for git, though all else in it is text: such a
    file is shown as text."""
    text = private.git(*_DIFF, *sides, limit=limit)
    if b"\nBinary files " not in text or len(text) > limit:
        return text
    shown = {}
    for path in _binary(private, sides)[:_MOST_LOOKED_AT]:
        one = private.git(*_DIFF, "--text", *sides, "--", f":(top,literal){path}", limit=limit)
        if _textual(one):
            shown[path] = one
    if not shown:
        return text
    others = [f":(top,exclude,literal){path}" for path in shown]
    text = private.git(*_DIFF, *sides, "--", ":(top)", *others, limit=limit)
    return text + b"".join(shown.values())


def _binary(private: _Private, sides: Sequence[str]) -> list[str]:
    """The paths that git takes for binary; a renamed one by its new name."""
    listed = private.git(*_DIFF, "--numstat", "-z", *sides, limit=2**26).split(b"\0")
    paths = []
    while len(listed) > 1:
        added, _, path = listed.pop(0).split(b"\t", 2)
        if not path:
            path = listed[1]
            del listed[:2]
        if added == b"-":
            paths.append(os.fsdecode(path))
    return paths


def _textual(diff: bytes) -> bool:
    words = diff.replace(b"\0", b"")
    if len(diff) - len(words) > len(diff) // 20 or _UNTEXTUAL.search(words):
        return False
    try:
        words.decode()
    except UnicodeDecodeError:
        return False
    return True
