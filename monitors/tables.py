"""The store's tables: plain SQL types only, so that SQLite and Postgres run the same statements.

A change here needs a revision in `monitors/migrations/versions` and the new HEAD beside them.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

DECISIONS = "kind <> 'evidence'"  # of events, as it stands in the index: what was decided, not what was seen

COUNTERS = sa.Table(
    "counters",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

REQUESTS = sa.Table(
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
    sa.Column("audit_probability", sa.Double),  # NULL: written before it was recorded
    # First request of its session in this slice.
    sa.Column("is_arrival", sa.Boolean, nullable=False),
    # First request of its session in this slice, rung and share: the unit of serve.* evidence.
    sa.Column("is_unit", sa.Boolean, nullable=False),
    sa.Index("requests_by_seq", "rollout_id", "seq"),
    sa.Index("requests_by_time", "rollout_id", "at_s"),
    sa.Index("requests_by_session", "rollout_id", "session_id"),
)

# Sessions as they were assigned: the units of the sample-ratio test, each once per slice.
ARRIVALS = sa.Table(
    "arrivals",
    METADATA,
    sa.Column("rollout_id", sa.String(128), primary_key=True),
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("slice_id", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("share", sa.Double, nullable=False),
    sa.Column("variant_assigned", sa.String(16), nullable=False),
    sa.Index("arrivals_by_seq", "rollout_id", "seq"),
)

# A table beside REQUESTS, not a column: most requests were not thinned.
ATTENTION = sa.Table(
    "attention",
    METADATA,
    sa.Column("request_id", sa.String(128), primary_key=True),
    sa.Column("attention", sa.Text, nullable=False),
)

AUDITS = sa.Table(
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
    # NULL in what follows: written before it was recorded.
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("share", sa.Double),
    sa.Column("audit_probability", sa.Double),
    sa.Column("span_start", sa.Integer),
    sa.Column("reason", sa.Text),
    sa.Column("artifact", sa.String(64)),
    # First score of its session in this slice and rung; a missing one counts until a score arrives.
    sa.Column("is_unit", sa.Boolean, nullable=False),
    sa.Index("audits_by_seq", "rollout_id", "seq"),
    sa.Index("audits_by_time", "rollout_id", "at_s"),
    sa.Index("audits_by_session", "rollout_id", "session_id"),
)

DRIFT = sa.Table(
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

# What metrics of one's own were when they were asked for.
METRICS = sa.Table(
    "metrics",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("metric_id", sa.String(64), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Index("metrics_by_metric", "rollout_id", "metric_id", "seq"),
)

COMMANDS = sa.Table(
    "commands",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

ROLLOUTS = sa.Table(
    "rollouts",
    METADATA,
    sa.Column("rollout_id", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("policy_text", sa.Text, nullable=False),
    sa.Column("created_at_s", sa.Double, nullable=False),
    sa.Column("about_json", sa.Text, nullable=False),
)

# Edits of a running rollout's policy, as they were asked for; the controller takes or refuses each.
REVISIONS = sa.Table(
    "revisions",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("policy_text", sa.Text, nullable=False),
    sa.Index("revisions_by_rollout", "rollout_id", "seq"),
)

ROUTING = sa.Table(
    "routing",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("rollout_id", sa.String(128), nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("table_json", sa.Text, nullable=False),
    sa.Column("renewals", sa.BigInteger, nullable=False),
    sa.Column("renewed_at_s", sa.Double, nullable=False),
)

LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("expires_at_s", sa.Double, nullable=False),
)

EVENTS = sa.Table(
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
    sa.Index("events_by_kind", "rollout_id", "kind", "seq"),
    # Decisions are few among events: a page of them costs the same however much evidence lies in between.
    sa.Index(
        "events_decisions",
        "rollout_id",
        "seq",
        sqlite_where=sa.text(DECISIONS),
        postgresql_where=sa.text(DECISIONS),
    ),
)

VALUES = sa.Table(
    "kv",
    METADATA,
    sa.Column("name", sa.String(256), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
