"""Findings by pages: the place of each chunk; skipped files; how far an answer is.

Revision 0005, after 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Their order was not kept: any will do, so long as each has a place of its own.
_PLACES = """
UPDATE chunk_done SET position = place.number
FROM (SELECT review_id, chunk_id,
        row_number() OVER (PARTITION BY review_id ORDER BY chunk_id) AS number
    FROM chunk_done) place
WHERE chunk_done.review_id = place.review_id AND chunk_done.chunk_id = place.chunk_id
"""


def upgrade() -> None:
    """Go to this revision."""
    for table, column, kind in (
        ("chunk_done", "position", sa.Integer()),
        ("review", "skipped_count", sa.Integer()),
        ("attempt", "answer_bytes", sa.BigInteger()),
    ):
        op.add_column(table, sa.Column(column, kind, server_default=sa.text("0"), nullable=False))
    op.execute(_PLACES)
