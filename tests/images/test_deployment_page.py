"""docs/deployment.md: the images are built and signed by its own commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deploy.docker import images
from deploy.docker.layout import IMAGES
from tests.harness.pages import ROOT, block

PAGE = "docs/deployment.md"
pytestmark = pytest.mark.timeout(900)


def _shell(commands: str, folder: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", "-euc", commands], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_images_are_built_and_signed_as_the_page_says(trees, tmp_path: Path):
    # The second line is what runs this.
    make, tests = block(PAGE, "images").splitlines()
    assert tests.startswith("make test-images ")
    built = [line for line in _shell(make, ROOT).splitlines() if line.startswith("byokeep/")]
    assert len(built) == len(IMAGES)
    for zone, tree in trees.items():
        assert f"{images.reference(zone, 'dev')} {tree.digest}" in built
    # In a folder of our own, since it writes a private key.
    for name in ("deploy", ".venv"):
        os.symlink(ROOT / name, tmp_path / name)
    said = _shell(block(PAGE, "sign"), tmp_path)
    assert said.endswith("byokeep/runner:dev: as it was signed\n")
