"""Sessions as they arrive, how audits were drawn and why they are missing, indexes for what operators read.

Until 2026-11-27 a store got these by itself when it was opened, so each is looked for first. Rows of before
have NULL in the new columns; sessions that were counted when they ended become arrivals.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

DECISIONS = "kind <> 'evidence'"
ARRIVALS = ("rollout_id", "session_id", "slice_id", "seq", "at_s", "share", "variant_assigned")
ADDED = {
    "requests": [sa.Column("audit_probability", sa.Double)],
    "audits": [
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("share", sa.Double),
        sa.Column("audit_probability", sa.Double),
        sa.Column("span_start", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("artifact", sa.String(64)),
    ],
}


def upgrade() -> None:
    """Add what is not there."""
    inspector = sa.inspect(op.get_bind())
    for table, columns in ADDED.items():
        known = {column["name"] for column in inspector.get_columns(table)}
        for column in columns:
            if column.name not in known:
                op.add_column(table, column)
    if not inspector.has_table("arrivals"):
        _add_arrivals()
    indexes = {index["name"] for index in inspector.get_indexes("events")}
    if "events_by_kind" not in indexes:
        op.create_index("events_by_kind", "events", ["rollout_id", "kind", "seq"])
    if "events_decisions" not in indexes:
        few = sa.text(DECISIONS)
        op.create_index(
            "events_decisions", "events", ["rollout_id", "seq"], sqlite_where=few, postgresql_where=few
        )
    # From here on versions of before there were revisions refuse the store.
    op.execute("UPDATE counters SET value = 2 WHERE name = 'schema'")


def _add_arrivals() -> None:
    op.create_table(
        "arrivals",
        sa.Column("rollout_id", sa.String(128), primary_key=True),
        sa.Column("session_id", sa.Text, primary_key=True),
        sa.Column("slice_id", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("variant_assigned", sa.String(16), nullable=False),
    )
    op.create_index("arrivals_by_seq", "arrivals", ["rollout_id", "seq"])
    names = ", ".join(ARRIVALS)
    op.execute(f"INSERT INTO arrivals ({names}) SELECT {names} FROM requests WHERE is_arrival")
