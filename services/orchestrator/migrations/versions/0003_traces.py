"""The trace that a review was submitted in: its attempts go on in it.

Revision 0003, after 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "review",
        sa.Column("trace_parent", sa.Text(), server_default=sa.text("''"), nullable=False),
    )
