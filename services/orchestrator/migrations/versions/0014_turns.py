"""A pick looks at tenants for which there may be something to do, and at no others.

Revision 0014, after 0013.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

# An attempt that waits from now on, or for another time, or that gave its place back. At the end of
# its transaction: the row of its tenant's turn is locked after all others.
_TRIGGER = """
CREATE FUNCTION call_for_turn() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO turn (tenant, called) VALUES (NEW.tenant, pg_current_xact_id()::text::bigint)
    ON CONFLICT (tenant) DO UPDATE SET due = least(turn.due, now()), called = excluded.called
        WHERE turn.called <> excluded.called;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER attempt_waits AFTER INSERT ON attempt
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.kind = 'REVIEW' AND NEW.state = 'QUEUED')
    EXECUTE FUNCTION call_for_turn();
CREATE CONSTRAINT TRIGGER attempt_turns AFTER UPDATE OF state, due_time ON attempt
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.kind = 'REVIEW' AND (
        (NEW.state = 'QUEUED'
            AND (OLD.state, OLD.due_time) IS DISTINCT FROM (NEW.state, NEW.due_time))
        OR (OLD.state = 'RUNNING' AND NEW.state <> 'RUNNING')))
    EXECUTE FUNCTION call_for_turn();
"""


def upgrade() -> None:
    """Go to this revision."""
    op.alter_column("turn", "served", server_default=sa.text("'-infinity'"))
    op.add_column(
        "turn",
        sa.Column(
            "due", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
    )
    op.add_column(
        "turn", sa.Column("called", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
    op.create_index(
        "turn_due_idx", "turn", ["served", "tenant"], postgresql_where=sa.text("due < 'infinity'")
    )
    op.execute(
        "INSERT INTO turn (tenant) SELECT DISTINCT tenant FROM attempt"
        " WHERE state = 'QUEUED' AND kind = 'REVIEW' ON CONFLICT DO NOTHING"
    )
    op.execute(_TRIGGER)
