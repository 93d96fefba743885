"""Each tenant has a budget of retries.

Revision 0015, after 0014.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "retry_budget",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("booked", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="retry_budget_pkey"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name="retry_budget_tenant_fkey"),
    )
