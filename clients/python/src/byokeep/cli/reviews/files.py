"""Files that a review is given, read to a bound.

Who wrote the change that is reviewed may have written the files of the checkout too: a symbolic
link to a private key or to `/proc/self/environ` must not travel to a model, nor one to what a
pipeline has written into the checkout (`.npmrc`, `.env`).
"""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path

from byokeep.cli.base.errors import CliError
from byokeep.cli.reviews import gitinfo

_CHUNK = 65_536
# Long enough for whoever was started beside this command to open the pipe.
_WRITER_MILLISECONDS = 10_000
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def of_checkout(path: Path, limit: int) -> tuple[str, bytes]:
    """Return a file's path in the checkout, or the working directory where there is none, and its
    content, at most one byte more than `limit`. What a link leads to is read from the commit that
    is checked out.

    Raises:
        CliError: it is not there, no regular file, not in the checkout, or a part of `.git`.
    """
    root = gitinfo.root() or Path.cwd()
    linked = _through_link(path, root)
    full = Path(os.path.realpath(path))
    if not full.is_relative_to(root):
        raise CliError(
            f"{path} is not in {root}: only files of the checkout travel",
            "copy it there, or run the command where it is",
        )
    inside = full.relative_to(root)
    if any(part.lower() == ".git" for part in inside.parts):
        raise CliError(f"{path} is a part of .git, which may hold credentials")
    if linked:
        return inside.as_posix(), _committed(path, inside, limit)
    try:
        return inside.as_posix(), _beneath(root, inside, limit)
    except OSError as error:
        reason = error.strerror
    raise CliError(f"{path} can't be read: {reason}")


def any_file(path: str, limit: int) -> bytes:
    """Return what a file or a pipe holds, at most one byte more than `limit`.

    Raises:
        CliError: it can't be read, is neither, or nobody writes into the pipe.
    """
    try:
        descriptor = os.open(path, _FLAGS)
        try:
            mode = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise CliError(f"{path} is neither a file nor a pipe")
            return _read(descriptor, limit, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror
    raise CliError(f"{path} can't be read: {reason}")


def _through_link(path: Path, root: Path) -> bool:
    """Whether a part of a path is a symbolic link that lies in the checkout."""
    full = Path.cwd() / path
    return any(
        part.is_symlink() and Path(os.path.realpath(part.parent)).is_relative_to(root)
        for part in (full, *full.parents)
    )


def _committed(path: Path, inside: Path, limit: int) -> bytes:
    checkout = gitinfo.checkout()
    if checkout is not None:
        show = ("git", "cat-file", "blob", f"HEAD:{inside.as_posix()}")
        done = gitinfo.run(show, {}, checkout.root, limit=limit)
        if done.returncode == 0:
            return done.stdout
    raise CliError(
        f"{path} is a link to {inside}, and a link leads only to what is committed",
        "name the file itself",
    )


def _beneath(root: Path, inside: Path, limit: int) -> bytes:
    """Read a file below a folder. No part of its path may be a symbolic link by now."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in inside.parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = below
        descriptor = os.open(inside.name or ".", _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CliError(f"{inside.as_posix()} is no regular file")
        return _read(descriptor, limit, inside.as_posix())
    finally:
        os.close(descriptor)


def _read(descriptor: int, limit: int, path: str) -> bytes:
    data = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) <= limit:
        silent = not poll.poll(_WRITER_MILLISECONDS)
        try:
            more = os.read(descriptor, min(_CHUNK, limit + 1 - len(data)))
        except BlockingIOError:
            continue  # there is a writer, and it takes its time
        if not more and silent:
            raise CliError(f"{path} is a pipe into which nobody writes")
        if not more:
            break
        data += more
    return data
