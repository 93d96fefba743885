"""Listed models that take the place of one that a key can't use; which a review ran on, and why.

Revision 0011, after 0010.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    for table in ("tenant", "review"):
        op.add_column(
            table,
            sa.Column(
                "fallback_models",
                postgresql.ARRAY(sa.Text()),
                server_default=sa.text("'{}'"),
                nullable=False,
            ),
        )
    for name in ("chosen_model", "model_fallback", "plan_model"):
        op.add_column(
            "review", sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False)
        )
