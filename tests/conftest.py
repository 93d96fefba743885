"""Fixtures that every test may use: a real PostgreSQL, and a whole stack."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from byokeep.testing import Stack

from deploy.local.postgres import ROLES, EmbeddedPostgres, new_password


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One server for the whole run; below /tmp, for pytest's own folders are closed to
    the system user that PostgreSQL runs as where the tests run as root."""
    directory = Path(tempfile.mkdtemp(prefix="byokeep-test-", dir="/tmp"))
    server = EmbeddedPostgres(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop(discard=True)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def database_passwords() -> dict[str, str]:
    """The password of each zone's role."""
    return {role: new_password() for role in ROLES}


def _fresh(server: EmbeddedPostgres, passwords: dict[str, str], zone: str) -> Iterator[str]:
    role = f"byokeep_{zone}"
    name = f"{zone}_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    yield server.create_database(name, role, passwords[role])
    server.drop_database(name)


@pytest.fixture
def keyvault_database_url(
    postgres: EmbeddedPostgres, database_passwords: dict[str, str]
) -> Iterator[str]:
    """A fresh empty database of keyvault's role: a `postgresql://` URL."""
    yield from _fresh(postgres, database_passwords, "keyvault")


@pytest.fixture
def orchestrator_database_url(
    postgres: EmbeddedPostgres, database_passwords: dict[str, str]
) -> Iterator[str]:
    """A fresh empty database of orchestrator's role: a `postgresql://` URL."""
    yield from _fresh(postgres, database_passwords, "orchestrator")


@pytest.fixture(scope="session")
def byokeep_stack() -> Iterator[Stack]:
    """One whole stack for the run. Its limits on trying keys are out of the way: tests of
    those limits start services of their own."""
    environment = {
        "keyvault": {"BYOKEEP_INTAKE_PER_HOUR": "10000"},
        "orchestrator": {
            "BYOKEEP_INTAKE_PER_HOUR": "10000",
            "BYOKEEP_INTAKE_PER_HOUR_OF_CALLER": "10000",
        },
    }
    with Stack(environment=environment) as stack:
        yield stack


@pytest.fixture
def stack(byokeep_stack: Stack) -> Iterator[Stack]:
    """The session's whole stack, with an emulator that nobody has scripted yet."""
    byokeep_stack.emulator.reset()
    yield byokeep_stack
    byokeep_stack.emulator.reset()
