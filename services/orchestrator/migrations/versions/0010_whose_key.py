"""Whose key a review runs on: keys by name, keys of repositories, an order; and which it was.

Revision 0010, after 0009.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "repository_key",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.id"], name=op.f("repository_key_tenant_fkey")),
        sa.PrimaryKeyConstraint("tenant", "pattern", "provider", name=op.f("repository_key_pkey")),
    )
    empty = sa.text("''")
    op.add_column(
        "tenant",
        sa.Column(
            "key_order",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
        ),
    )
    op.add_column(
        "key_validation", sa.Column("hint", sa.Text(), server_default=empty, nullable=False)
    )
    op.add_column("review", sa.Column("key_owner", sa.Text(), server_default=empty, nullable=False))
    op.execute("UPDATE review SET key_owner = owner WHERE owner <> ''")
    op.add_column(
        "review",
        sa.Column("named_key", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
