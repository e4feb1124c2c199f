"""The tables of before there were revisions, as the version of 2026-11-26 made them; frozen.

A store that has some of them already keeps those: stores were made before Alembic looked after them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

METADATA = sa.MetaData()

sa.Table(
    "counters",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

sa.Table(
    "requests",
    METADATA,
    sa.Column("request_id", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("slice_id", sa.String(64), nullable=False),
    sa.Column("variant_assigned", sa.String(16), nullable=False),
    sa.Column("variant_served", sa.String(16), nullable=False),
    sa.Column("rung_id", sa.String(64), nullable=False),
    sa.Column("share", sa.Double, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("ttft_ms", sa.Double),
    sa.Column("tpot_ms", sa.Double),
    sa.Column("total_ms", sa.Double, nullable=False),
    sa.Column("outcome", sa.String(32), nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("chosen_for_audit", sa.Boolean, nullable=False),
    sa.Column("compute_s", sa.Double, nullable=False),
    sa.Column("is_arrival", sa.Boolean, nullable=False),
    sa.Column("is_unit", sa.Boolean, nullable=False),
    sa.Index("requests_by_seq", "rollout_id", "seq"),
    sa.Index("requests_by_time", "rollout_id", "at_s"),
    sa.Index("requests_by_session", "rollout_id", "session_id"),
)
sa.Table(
    "attention",
    METADATA,
    sa.Column("request_id", sa.String(128), primary_key=True),
    sa.Column("attention", sa.Text, nullable=False),
)

sa.Table(
    "audits",
    METADATA,
    sa.Column("request_id", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("slice_id", sa.String(64), nullable=False),
    sa.Column("rung_id", sa.String(64), nullable=False),
    sa.Column("variant_served", sa.String(16), nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("token_disagreement", sa.Double),
    sa.Column("token_disagreement_floor", sa.Double),
    sa.Column("kl", sa.Double),
    sa.Column("kl_floor", sa.Double),
    sa.Column("first_divergence", sa.Integer),
    sa.Column("dropped_mass_mean", sa.Double),
    sa.Column("dropped_mass_p99", sa.Double),
    sa.Column("dense_compute_s", sa.Double, nullable=False),
    sa.Column("sparse_compute_s", sa.Double, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("is_unit", sa.Boolean, nullable=False),
    sa.Index("audits_by_seq", "rollout_id", "seq"),
    sa.Index("audits_by_time", "rollout_id", "at_s"),
    sa.Index("audits_by_session", "rollout_id", "session_id"),
)

sa.Table(
    "drift",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("signal_id", sa.String(64), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("threshold", sa.Double),
    sa.Column("window_units", sa.Integer, nullable=False),
    sa.Column("window_id", sa.Integer, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("html_path", sa.Text, nullable=False),
    sa.Index("drift_by_signal", "rollout_id", "signal_id", "seq"),
)

sa.Table(
    "commands",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

sa.Table(
    "rollouts",
    METADATA,
    sa.Column("rollout_id", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("policy_text", sa.Text, nullable=False),
    sa.Column("created_at_s", sa.Double, nullable=False),
    sa.Column("about_json", sa.Text, nullable=False),
)
sa.Table(
    "revisions",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("policy_text", sa.Text, nullable=False),
    sa.Index("revisions_by_rollout", "rollout_id", "seq"),
)

sa.Table(
    "routing",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("table_json", sa.Text, nullable=False),
    sa.Column("renewals", sa.BigInteger, nullable=False),
    sa.Column("renewed_at_s", sa.Double, nullable=False),
)

sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("expires_at_s", sa.Double, nullable=False),
)

sa.Table(
    "events",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("payload_json", sa.Text, nullable=False),
    sa.Column("state_json", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("prev_hash", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Index("events_by_rollout", "rollout_id", "seq"),
)

sa.Table(
    "kv",
    METADATA,
    sa.Column("name", sa.String(256), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


def upgrade() -> None:
    """Make the tables that are not there."""
    METADATA.create_all(op.get_bind())
