"""Where the replicas of serving apps answer."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("demand", sa.Column("addresses", sa.JSON(), nullable=False, server_default="[]"))
