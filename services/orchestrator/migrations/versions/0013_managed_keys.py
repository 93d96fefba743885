"""Managed keys: whether a tenant's reviews run on those that the operator brought for it.

Revision 0013, after 0012.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "tenant",
        sa.Column("managed_keys", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
