"""The folder that holds a stack: made for it, checked before use, safe to erase."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .processes import StackError

CHECKOUT = Path(__file__).resolve().parents[2]
_MARKER = ".byokeep-state"
# An empty cluster is 60 MiB, and a burst of writes may bring its log to a few hundred.
_STACK_BYTES = 1024**3


class State:
    """Where everything of one stack is."""

    def __init__(self, root: Path) -> None:
        """``root`` is absolute; see `open_state`."""
        self.root = root
        self.logs = root / "logs"
        self.secrets = root / "secrets"
        self.pki = root / "pki"
        self.client = root / "client"
        self.run = root / "run"
        self.grant_keys = root / "grant-keys"
        self.postgres = root / "postgres"
        self.config = self.client / "config.toml"
        self.trust = self.client / "trust.json"
        self.description = root / "stack.json"

    def make_folders(self) -> None:
        """Make the folders inside, closed to others."""
        for folder in (
            self.logs,
            self.secrets,
            self.pki,
            self.client,
            self.run,
            self.grant_keys,
        ):
            folder.mkdir(mode=0o700, exist_ok=True)

    def lock(self) -> int | None:
        """Take the lock that a running supervisor holds; None if it is taken.

        The lock ends with the process, so it can't be stale.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor

    def holder(self) -> int | None:
        """Process id of the running supervisor, or None."""
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(os.read(descriptor, 32) or b"0") or None
            finally:
                os.close(descriptor)
        return None

    def erase(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self.root, ignore_errors=True)


def default_root() -> Path:
    """`BYOKEEP_STATE`, or a folder under /var/tmp for this user and this checkout."""
    configured = os.environ.get("BYOKEEP_STATE")
    if configured:
        return Path(configured).absolute()
    digest = hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:8]
    return Path("/var/tmp") / f"byokeep-{os.geteuid()}-{digest}"  # noqa: S108 - see open_state


def open_state(root: Path) -> State:
    """Make the folder if missing, and check that it is ours to fill, and later to erase.

    Raises StackError if it is a symbolic link, another user's, writable by others, or
    holds something that isn't a stack.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    check(root)
    if not (root / _MARKER).exists():
        if any(root.iterdir()):
            raise StackError(
                f"{root} holds something that is not a byokeep stack; "
                "choose another folder with BYOKEEP_STATE"
            )
        (root / _MARKER).write_text("A byokeep development stack. `make clean` erases this.\n")
    if os.geteuid() == 0:
        root.chmod(0o711)  # PostgreSQL's system user has to pass through
    state = State(root)
    state.make_folders()
    return state


def check(root: Path) -> None:
    """Refuse a folder that somebody else could have made or can change.

    Raises StackError, which says what is wrong with it.
    """
    status = root.lstat()
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
        raise StackError(f"{root} is not a folder (a symbolic link is not followed)")
    if status.st_uid != os.geteuid():
        raise StackError(f"{root} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StackError(f"{root} is writable by others; chmod go-w it, or choose another folder")


def existing_state(root: Path) -> State | None:
    """The stack in this folder, or None if there is none. Raises StackError as `check`."""
    if not os.path.lexists(root):
        return None
    check(root)
    return State(root) if (root / _MARKER).exists() else None


@contextlib.contextmanager
def throwaway_state(*, in_memory: bool = False) -> Iterator[State]:
    """A stack's folder that is erased at the end.

    ``in_memory``: where there is room, so that its keys never reach a disk. Durable
    writes cost nothing there: not for measurements.
    """
    base = (memory_folder() if in_memory else None) or _reachable_temporary()
    root = Path(tempfile.mkdtemp(prefix="byokeep-", dir=base))
    try:
        yield open_state(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def memory_folder(room: int = _STACK_BYTES) -> Path | None:
    """A folder in memory with this many bytes to spare; None where there is none."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder there
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < room:
        return None
    return memory


def _reachable_temporary() -> Path:
    temporary = Path(tempfile.gettempdir())
    steps = [temporary, *temporary.parents]
    if os.geteuid() != 0 or all(step.stat().st_mode & stat.S_IXOTH for step in steps):
        return temporary
    return Path("/var/tmp")  # noqa: S108 - as above
