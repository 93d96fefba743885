"""Builds the package `byokeep`, whole or not at all.

Its stubs are made from protos/ and stand in no repository. A checkout has the protos, so a build
makes the stubs, in a copy; an sdist has the stubs. setuptools alone would pack whatever it finds,
and call that a success.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_HERE = Path(__file__).resolve().parent
_GENERATOR = _HERE.parents[1] / "protos" / "generate.py"
# Old on purpose: stubs run on the protobuf and grpcio that they were made with, and on newer ones.
_TOOLS = ["grpcio-tools==1.62.3", "mypy-protobuf==3.6.0"]
_STUBS = (
    "common/v1/options_pb2.py",
    "keyvault/v1/custody_pb2_grpc.py",
    "orchestrator/v1/review_pb2_grpc.py",
    "runner/v1/runner_pb2_grpc.py",
    "_buf/validate/validate_pb2.py",
)

_Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """Return what a build needs: the generators, where there is something to generate from."""
    wanted: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    return wanted + (_TOOLS if _GENERATOR.exists() else [])


def get_requires_for_build_sdist(config_settings: _Settings = None) -> list[str]:
    """Return what a build needs, as for a wheel."""
    wanted: list[str] = build_meta.get_requires_for_build_sdist(config_settings)
    return wanted + (_TOOLS if _GENERATOR.exists() else [])


def build_wheel(
    wheel_directory: str,
    config_settings: _Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel. Raises SystemExit where it would not be whole."""
    target = os.path.abspath(wheel_directory)
    metadata = os.path.abspath(metadata_directory) if metadata_directory else None
    with _whole():
        name: str = build_meta.build_wheel(target, config_settings, metadata)
    return name


def build_sdist(sdist_directory: str, config_settings: _Settings = None) -> str:
    """Build an sdist, with the stubs. Raises SystemExit where it would not be whole."""
    target = os.path.abspath(sdist_directory)
    with _whole():
        name: str = build_meta.build_sdist(target, config_settings)
    return name


@contextmanager
def _whole() -> Iterator[None]:
    """Work in a copy that has its stubs: the checkout's own are another generator's."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "byokeep")
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
        shutil.copytree(_HERE, copy, ignore=left_out)
        package = copy / "src" / "byokeep"
        if _GENERATOR.exists():
            command = [sys.executable, str(_GENERATOR), f"--package={package}"]
            subprocess.run(command, check=True)
        if missing := [stub for stub in _STUBS if not (package / stub).exists()]:
            sys.exit(
                f"byokeep: {missing[0]} is not there, and neither is protos/ to make it from:"
                " build from a checkout or from an sdist"
            )
        with chdir(copy):
            yield
