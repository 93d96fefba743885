"""36. no_usage, the orchestrator's schema: no place to keep token usage or cost."""

from __future__ import annotations

import re

import psycopg

USAGE = re.compile(r"token|usage|cost|price|billed|spend", re.IGNORECASE)


def test_no_column_can_hold_usage_or_cost(orchestrator_database_url: str) -> None:
    """Shown by a column `prompt_tokens` added to `attempt` in the first migration."""
    with psycopg.connect(orchestrator_database_url) as connection:
        columns = connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns"
            " WHERE table_schema = 'public'"
        ).fetchall()
    assert ("attempt", "calls_started") in columns
    assert [column for column in columns if USAGE.search(column[1])] == []
