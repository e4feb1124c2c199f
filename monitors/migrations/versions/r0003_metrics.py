"""What metrics of one's own were when they were asked for: Prometheus queries as guardrails (ADR 0022)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table of samples."""
    op.create_table(
        "metrics",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("rollout_id", sa.String(128), nullable=False),
        sa.Column("metric_id", sa.String(64), nullable=False),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_index("metrics_by_metric", "metrics", ["rollout_id", "metric_id", "seq"])
