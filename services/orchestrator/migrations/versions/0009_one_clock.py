"""One clock for all that a review waits for.

Revision 0009, after 0008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("attempt", sa.Column("stalled_since", sa.DateTime(timezone=True)))
    op.execute("UPDATE attempt SET stalled_since = wait_since WHERE state = 'QUEUED'")
    op.drop_index("attempt_waiting_idx", "attempt")
    op.create_index(
        "attempt_waiting_idx",
        "attempt",
        ["stalled_since"],
        postgresql_where=sa.text("state = 'QUEUED' AND stalled_since IS NOT NULL"),
    )
