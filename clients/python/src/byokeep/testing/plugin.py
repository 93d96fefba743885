"""Fixtures for pytest: `from byokeep.testing.plugin import byokeep_stack` in a conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from byokeep.testing.stack import Stack


@pytest.fixture(scope="session")
def byokeep_stack() -> Iterator[Stack]:
    """A whole stack for the session; whoever scripts its emulator resets it."""
    with Stack() as stack:
        yield stack
