"""Deletions of tenants are finished by the sweeper.

Revision 0008, after 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("tenant", sa.Column("delete_time", sa.DateTime(timezone=True)))
    op.execute("UPDATE tenant SET delete_time = now() WHERE state = 'DELETED'")
    op.add_column(
        "tenant",
        sa.Column("erased", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.create_index(
        "tenant_unerased_idx",
        "tenant",
        ["delete_time"],
        postgresql_where=sa.text("state = 'DELETED' AND NOT erased"),
    )
