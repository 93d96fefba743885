"""Fixtures that every test may use: a real PostgreSQL, and a whole stack."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator

import pytest
from byokeep.testing import Stack

from deploy.local.postgres import ROLES, EmbeddedPostgres, new_password
from tests.harness import scratch


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One server for the whole run."""
    directory = scratch.folder()
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


def _fresh(
    server: EmbeddedPostgres, passwords: dict[str, str], zone: str, template: str = "template1"
) -> Iterator[str]:
    role = f"byokeep_{zone}"
    name = f"{zone}_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    yield server.create_database(name, role, passwords[role], template=template)
    server.drop_database(name)


def _migrated(
    server: EmbeddedPostgres, passwords: dict[str, str], zone: str, migrate: Callable[[str], None]
) -> str:
    role, name = f"byokeep_{zone}", f"{zone}_migrated_{os.getpid()}"
    migrate(server.create_database(name, role, passwords[role]))
    return name


@pytest.fixture(scope="session")
def _keyvault_template(postgres: EmbeddedPostgres, database_passwords: dict[str, str]) -> str:
    from services.keyvault.migrate import upgrade

    return _migrated(postgres, database_passwords, "keyvault", upgrade)


@pytest.fixture(scope="session")
def _orchestrator_template(postgres: EmbeddedPostgres, database_passwords: dict[str, str]) -> str:
    from services.orchestrator.migrate import migrate

    return _migrated(postgres, database_passwords, "orchestrator", migrate)


@pytest.fixture
def empty_database_url(
    postgres: EmbeddedPostgres, database_passwords: dict[str, str]
) -> Iterator[Callable[[str], str]]:
    """Makes an empty database of a zone's role, and returns its `postgresql://` URL."""
    with contextlib.ExitStack() as databases:
        yield lambda zone: databases.enter_context(
            contextlib.contextmanager(_fresh)(postgres, database_passwords, zone)
        )


@pytest.fixture
def keyvault_database_url(
    postgres: EmbeddedPostgres, database_passwords: dict[str, str], _keyvault_template: str
) -> Iterator[str]:
    """A fresh migrated database of keyvault's role: a `postgresql://` URL."""
    yield from _fresh(postgres, database_passwords, "keyvault", _keyvault_template)


@pytest.fixture
def orchestrator_database_url(
    postgres: EmbeddedPostgres, database_passwords: dict[str, str], _orchestrator_template: str
) -> Iterator[str]:
    """A fresh migrated database of orchestrator's role: a `postgresql://` URL."""
    yield from _fresh(postgres, database_passwords, "orchestrator", _orchestrator_template)


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
