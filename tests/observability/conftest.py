"""Prometheus and its promtool, as Debian has them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

_INSTALL = "needs promtool and prometheus on PATH, or apt-get, which gives them"


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return where `prometheus` or `promtool` is; Debian's package is unpacked into the cache.

    No source, no test: it raises, and is never a skip.
    """
    base = Path(os.environ.get("BYOKEEP_CACHE") or Path.home() / ".cache" / "byokeep")
    unpacked = base / "prometheus-debian"

    def find(name: str) -> str:
        found = shutil.which(name) or str(unpacked / "usr/bin" / name)
        if not Path(found).exists():
            _unpack(unpacked)
        return found

    return find


def _unpack(folder: Path) -> None:
    apt = shutil.which("apt-get")
    if apt is None:
        raise RuntimeError(_INSTALL)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([apt, "-qq", "update"], check=True)
        subprocess.run([apt, "-qq", "download", "prometheus"], cwd=work, check=True)
        [package] = Path(work).glob("prometheus_*.deb")
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        subprocess.run(["dpkg", "-x", str(package), str(new)], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
