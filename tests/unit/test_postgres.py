"""What psycopg and its pool say of a database: as JSON, with the cause in our words, once."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import errors

from services.common import deadline, logs, postgres


def test_the_pools_own_lines_name_the_cause_once_and_show_nothing(caplog):
    """Shown to fail without the filter: the cause is in no line, and there is one for each try."""
    log = logging.getLogger("psycopg.pool")
    refused = psycopg.OperationalError("connection to 10.0.0.1 failed: Connection refused")
    wrong = psycopg.OperationalError('password authentication failed for user "secret-role"')
    for error in (refused, refused, wrong, wrong, refused):
        log.warning("error connecting in %r: %s", "pool-1", error)
    form = logs._Formatter("keyvault")
    told = [json.loads(form.format(record)) for record in caplog.records]
    assert [line["cause"] for line in told] == [
        "no database server answers at the URL's address",
        "the database refuses the role's password",
        "no database server answers at the URL's address",
    ]
    assert {line["event"] for line in told} == {"error_connecting"}
    assert "secret-role" not in json.dumps(told)
    assert "10.0.0.1" not in json.dumps(told)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.ConnectionTimeout("x"), "does not answer in time"),
        (postgres.SilentError("x"), "neither answers nor closes"),
        (psycopg.OperationalError("FATAL: the database system is starting up"), "is starting"),
        (psycopg.OperationalError("FATAL: sorry, too many clients already"), "no more connections"),
        (psycopg.OperationalError("server closed the connection unexpectedly"), "is lost"),
        (errors.InsufficientPrivilege("secret"), "refuses: InsufficientPrivilege"),
    ],
)
def test_a_cause_is_a_sentence_of_ours(error, sentence):
    assert sentence in postgres.cause(error)
    assert "secret" not in postgres.cause(error)


async def test_a_calls_deadline_ends_before_its_callers():
    """So that it can still be told who did not answer. Shown to fail without the margin."""

    async def handler() -> tuple[float, bool]:
        deadline.enter(10.0)
        return deadline.left(60), deadline.spent()

    seconds, spent = await asyncio.create_task(handler())
    assert 8 < seconds < 9.5
    assert not spent
    assert deadline.left(60) == 60  # of that call alone


async def test_what_others_wait_for_too_has_no_callers_deadline():
    """Shown to fail with `lifted` doing nothing."""
    deadline.enter(1.0)
    with deadline.lifted():
        shared = asyncio.create_task(_left())
    assert await shared == 60
    with deadline.within(0.5):
        assert deadline.left(60) <= 0.5


async def _left() -> float:
    return deadline.left(60)


async def test_a_call_that_took_most_of_its_time_is_not_to_be_tried_again(monkeypatch):
    deadline.enter(10.0)
    now = deadline.time.monotonic()
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now + 6)
    assert deadline.spent()


@pytest.mark.parametrize("zone", ["keyvault", "orchestrator"])
def test_a_zones_newest_migration_is_the_one_that_alembic_ends_at(zone):
    """Services compare revisions as texts: files are named after them, in their order."""
    folder = Path(__file__).resolve().parents[2] / "services" / zone / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == postgres.newest(folder)
    in_order = [script.revision for script in scripts.walk_revisions()]
    assert in_order == sorted(in_order, reverse=True)
