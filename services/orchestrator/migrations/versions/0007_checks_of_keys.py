"""Checks of keys on demand: the newest of a key is found without reading its other attempts.

Revision 0007, after 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_index(
        "attempt_check_idx",
        "attempt",
        ["tenant", "key_id", "id"],
        postgresql_where=sa.text("kind = 'CHECK'"),
    )
