"""Models for paths inside of repositories.

Revision 0012, after 0011.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "model_override",
        sa.Column("path_pattern", sa.Text(), server_default=sa.text("''"), nullable=False),
    )
    op.drop_constraint(op.f("model_override_pkey"), "model_override", type_="primary")
    op.create_primary_key(
        op.f("model_override_pkey"), "model_override", ["tenant", "pattern", "path_pattern"]
    )
