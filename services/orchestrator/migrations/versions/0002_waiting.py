"""Waiting: pauses, turns, lanes; the library queue goes.

Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Procrastinate's schema has no uninstaller. Attempts that its jobs named are QUEUED in our own
# table, and are picked from there.
_DROP_QUEUE = """
DO $$
DECLARE one record;
BEGIN
    FOR one IN SELECT format('DROP TABLE IF EXISTS %I CASCADE', relname) AS command FROM pg_class
        WHERE relkind = 'r' AND relname LIKE 'procrastinate%'
            AND relnamespace = current_schema()::regnamespace
    LOOP EXECUTE one.command; END LOOP;
    FOR one IN SELECT format('DROP FUNCTION IF EXISTS %s CASCADE', oid::regprocedure) AS command
        FROM pg_proc WHERE proname LIKE 'procrastinate%'
            AND pronamespace = current_schema()::regnamespace
    LOOP EXECUTE one.command; END LOOP;
    FOR one IN SELECT format('DROP TYPE IF EXISTS %I CASCADE', typname) AS command FROM pg_type
        WHERE typname LIKE 'procrastinate%' AND typtype IN ('c', 'e')
            AND typnamespace = current_schema()::regnamespace
    LOOP EXECUTE one.command; END LOOP;
END $$
"""


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "pause",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key_id", "reason", name=op.f("pause_pkey")),
    )
    op.create_table(
        "turn",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("served", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("turn_pkey")),
    )
    _small = sa.SmallInteger()
    op.add_column(
        "review", sa.Column("attempts", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.execute("UPDATE review SET attempts = fence")
    op.add_column("review", sa.Column("priority", _small, server_default="0", nullable=False))
    op.add_column(
        "attempt", sa.Column("number", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.execute("UPDATE attempt SET number = fence")
    op.add_column("attempt", sa.Column("priority", _small, server_default="0", nullable=False))
    for name in ("wait_reason", "wait_cause", "cause", "runner_id"):
        op.add_column(
            "attempt", sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False)
        )
    op.add_column("attempt", sa.Column("wait_since", sa.DateTime(timezone=True), nullable=True))
    op.drop_column("attempt", "admitted")
    op.add_column(
        "key_validation",
        sa.Column("cause", sa.Text(), server_default=sa.text("''"), nullable=False),
    )
    op.create_index(
        "attempt_lane_idx",
        "attempt",
        ["tenant", "key_id", "priority", "due_time"],
        postgresql_where=sa.text("state = 'QUEUED' AND kind = 'REVIEW'"),
    )
    op.create_index(
        "attempt_key_check_idx",
        "attempt",
        ["due_time"],
        postgresql_where=sa.text("state = 'QUEUED' AND kind <> 'REVIEW'"),
    )
    op.create_index(
        "attempt_running_idx",
        "attempt",
        ["tenant", "heartbeat_time"],
        postgresql_where=sa.text("state = 'RUNNING'"),
    )
    op.create_index(
        "attempt_waiting_idx",
        "attempt",
        ["wait_since"],
        postgresql_where=sa.text("state = 'QUEUED' AND wait_since IS NOT NULL"),
    )
    op.execute(_DROP_QUEUE)
