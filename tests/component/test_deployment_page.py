"""docs/deployment.md, "By hand, in production mode", with backend `local`."""

from __future__ import annotations

import os

import pytest

from tests.harness.walk import walk


@pytest.mark.deep
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network of its own")
def test_from_nothing_to_a_review_in_production_mode():
    walk()
