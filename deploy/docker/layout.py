"""What is in each zone's image. Imported by the tests; run inside the build, with Python alone.

layout.py packages ZONE   makes /opt/byokeep, with the zone's pinned packages
layout.py code ZONE       and its code, its entry point and its bill of materials
"""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TARGET = Path("/opt/byokeep")
SITE = TARGET / "lib/python3.11/site-packages"
SBOM = TARGET / "sbom.cdx.json"
_CLIENT = "clients/python/src/byokeep"
_SERVICE_WITHOUT = ("cli", "testing", "auditlog", "client.py")


@dataclass(frozen=True, slots=True)
class Zone:
    """An image: its lock file, the folders of code, what of the client package stays out, and
    the module that it runs (none: the first argument names it)."""

    requirements: str
    code: tuple[str, ...]
    without: tuple[str, ...] = _SERVICE_WITHOUT
    module: str = ""


ZONES: Mapping[str, Zone] = {
    "keyvault": Zone(
        "keyvault", ("services/common", "services/keyvault"), module="services.keyvault"
    ),
    "keyvault-aws-kms": Zone(
        "aws_kms", ("services/common", "services/keyvault"), module="services.keyvault"
    ),
    "orchestrator": Zone(
        "orchestrator",
        ("services/common", "services/orchestrator"),
        # Nor has it the code that could open a sealed key or a lease.
        (*_SERVICE_WITHOUT, "hpke.py", "sealing.py", "leasing.py"),
        module="services.orchestrator",
    ),
    "runner": Zone(
        "llm_runner", ("services/common", "services/llm_runner"), module="services.llm_runner"
    ),
    # No zone of production: the command, and what a development stack needs beside the services.
    "tools": Zone(
        "tools",
        ("services/common", "deploy/local", "deploy/dev"),
        without=(),
    ),
}

# Beside them, for tests alone: all zones in one, with PostgreSQL and the emulator. It is made by a
# Dockerfile of its own, since initdb wants a shell.
IMAGES: Mapping[str, Zone] = {
    **ZONES,
    "all-in-one": Zone(
        "local", ("services", "deploy/local"), without=(), module="deploy.local.control"
    ),
}


def _packages(zone: Zone) -> None:
    lock = f"requirements/{zone.requirements}.txt"
    _run("-m", "venv", "--without-pip", str(TARGET))
    pip = ("-m", "pip", "--python", f"{TARGET}/bin/python", "install", "--quiet", "--no-compile")
    _run(*pip, "--require-hashes", "-r", lock)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def _code(zone: Zone) -> None:
    client = SITE / "byokeep"
    shutil.copytree(_CLIENT, client, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    for name in zone.without:
        path = client / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for folder in zone.code:
        shutil.copytree(folder, SITE / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy("LICENSE", TARGET)
    module = f'"{zone.module}"' if zone.module else "sys.argv.pop(1)"
    (TARGET / "bin/service").write_text(
        f"#!{TARGET}/bin/python\nimport runpy\nimport sys\n\n"
        f'runpy.run_module({module}, run_name="__main__", alter_sys=True)\n'
    )


def _bill_of_materials() -> None:
    tool = ("-m", "cyclonedx_py", "environment", "--output-reproducible")
    _run(*tool, "--pyproject=pyproject.toml", f"--output-file={SBOM}", f"{TARGET}/bin/python")


def _settle() -> None:
    """Make two builds alike: scripts that nobody runs go, modes are the same, code is compiled."""
    for path in (TARGET / "bin").iterdir():
        if path.name not in ("service", "python", "python3", "python3.11"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    compileall.compile_dir(
        SITE, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    for folder, _, names in os.walk(TARGET):
        os.chmod(folder, 0o755)  # noqa: S103 nothing in an image is secret
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                runs = path.parent.name == "bin" or ".so" in path.suffixes
                path.chmod(0o755 if runs else 0o644)


def main() -> None:
    """Run one step of the build."""
    step, name = sys.argv[1:]
    zone = IMAGES[name]
    if step == "packages":
        _packages(zone)
        return
    _code(zone)
    _bill_of_materials()
    _settle()


if __name__ == "__main__":
    main()
