"""Plans are data: a tenant's is a name, spelt as an operator spells it.

Revision 0004, after 0003.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.execute("UPDATE tenant SET plan = lower(plan)")
