"""The images, built once for the run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy.docker import images
from deploy.docker.images import Tree
from deploy.docker.layout import ZONES
from tests.harness import engine

TAG = "test"


@pytest.fixture(scope="session")
def docker() -> Iterator[None]:
    """A Docker engine with the base image."""
    with engine.running():
        engine.ensure(engine.PYTHON)
        yield


@pytest.fixture(scope="session")
def trees(docker: None) -> dict[str, Tree]:
    """What is in each image."""
    first, *others = ZONES
    images.build(first, TAG)  # its first steps are everybody's
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda zone: images.build(zone, TAG), others))
    return {zone: images.tree(images.reference(zone, TAG)) for zone in ZONES}
