"""Takes out of a Python image what a service never runs: every program but Python, shells, package
managers, their data and settings. Runs inside the image that is being built, on Python alone."""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import sys
import sysconfig
from pathlib import Path

_PROGRAMS = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
_UNUSED = (
    *("/boot", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/usr/games", "/usr/include"),
    *("/usr/lib/apt", "/usr/lib/dpkg", "/usr/lib/init", "/usr/lib/systemd", "/usr/lib/udev"),
    *("/usr/lib/python3", "/usr/libexec", "/usr/local/include", "/usr/local/src", "/usr/src"),
    *("/usr/share/bash-completion", "/usr/share/bug", "/usr/share/debconf", "/usr/share/doc-base"),
    *("/usr/share/debianutils", "/usr/share/dpkg", "/usr/share/info", "/usr/share/lintian"),
    *("/usr/share/locale", "/usr/share/man", "/usr/share/menu", "/usr/share/perl5"),
    *("/usr/share/pixmaps", "/usr/share/python-wheels", "/usr/share/python3", "/usr/local/share"),
    *("/usr/lib/x86_64-linux-gnu/perl-base", "/usr/lib/aarch64-linux-gnu/perl-base"),
    *("/var/backups", "/var/cache", "/var/lib/apt", "/var/lib/dpkg/info", "/var/log"),
    *("/run/lock", "/var/local", "/var/lock", "/var/mail", "/var/opt", "/var/spool"),
    *("/etc/apt", "/etc/cron.daily", "/etc/default", "/etc/dpkg", "/etc/init.d", "/etc/kernel"),
    *("/etc/logrotate.d", "/etc/pam.d", "/etc/python3", "/etc/python3.11", "/etc/rc0.d"),
    *("/etc/rc1.d", "/etc/rc2.d", "/etc/rc3.d", "/etc/rc4.d", "/etc/rc5.d", "/etc/rc6.d"),
    *("/etc/rcS.d", "/etc/security", "/etc/selinux", "/etc/skel", "/etc/systemd"),
    *("/etc/pip.conf", "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-"),
    *("/etc/passwd-", "/etc/group-", "/etc/machine-id", "/etc/.pwd.lock"),
)
_STANDARD_LIBRARY = ("ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtledemo", "venv")
_NOBODY = "byokeep:x:65532:65532:byokeep:/:/nonexistent\n"


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _programs() -> None:
    """Keep Python and the links that lead to it."""
    python = Path(sys.executable).resolve()
    for folder in map(Path, _PROGRAMS):
        if folder.is_symlink() or not folder.is_dir():
            continue
        for path in folder.iterdir():
            if path.resolve() != python:
                _remove(path)


def _library() -> None:
    """Leave of the standard library what services import, compiled: they can't write beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in (*_STANDARD_LIBRARY, "site-packages"):
        for path in (library / name, Path("/usr/lib/python3.11") / name):
            _remove(path)
    for cache in sorted(library.rglob("__pycache__")):
        shutil.rmtree(cache)
    compileall.compile_dir(
        library, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def _documents() -> None:
    """Of documents, licences stay."""
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.name != "copyright" and not path.is_dir():
            path.unlink()


def main() -> None:
    """Prune, and name the user that the services run as."""
    _library()
    for name in _UNUSED:
        _remove(Path(name))
    _documents()
    _programs()
    Path("/etc/passwd").write_text(f"root:x:0:0:root:/:/nonexistent\n{_NOBODY}")
    Path("/etc/group").write_text("root:x:0:\nbyokeep:x:65532:\n")
    _remove(Path("/tmp"))  # noqa: S108 the image's own
    os.mkdir("/tmp", 0o777)  # noqa: S108
    os.chmod("/tmp", 0o1777)  # noqa: S103, S108 what /tmp is
    Path(__file__).unlink()


if __name__ == "__main__":
    main()
