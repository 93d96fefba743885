"""Superseded reviews, calls that are made again, prompt versions, retention of reviews.

Revision 0006, after 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    for table, name in (("review", "superseded_by"), ("attempt", "prompt_version")):
        op.add_column(
            table, sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False)
        )
    for name in ("keep_superseded", "retry_ambiguous"):
        op.add_column(
            "tenant",
            sa.Column(name, sa.Boolean(), server_default=sa.text("false"), nullable=False),
        )
    op.create_index(
        op.f("review_tenant_repository_pull_request_id_idx"),
        "review",
        ["tenant", "repository", "pull_request", "id"],
    )
    op.create_index(
        "attempt_key_end_idx",
        "attempt",
        ["end_time"],
        postgresql_where=sa.text("kind <> 'REVIEW'"),
    )
