"""One consistent read of the store: everything that one tick may know of the world."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.health import read_health, read_newest_at, read_traffic, read_unscored_since
from sentei.monitors.records import FAILED_OUTCOMES, AuditStatus
from sentei.monitors.store import Store
from sentei.monitors.tables import COMMANDS, DRIFT, METRICS
from sentei.monitors.units import SignalQuery, Units, last_arrival, read_lengths, read_units
from sentei.policies.signals import Command, DriftSignal, MetricSample, Observation, Signals

__all__ = ["AUDIT_VALUES", "SERVE_VALUES", "SignalQuery", "read_signals"]

Row = Mapping[str, Any]


def _column(name: str, floor_name: str | None = None) -> Callable[[Row], tuple[float | None, float | None]]:
    return lambda row: (row[name], row[floor_name] if floor_name else None)


def _compute_ratio(row: Row) -> tuple[float | None, float | None]:
    dense_s = row["dense_compute_s"]
    return (row["sparse_compute_s"] / dense_s if dense_s else None), None


def _failed(row: Row) -> float | None:
    return float(row["outcome"] in FAILED_OUTCOMES)


def _ttft_ms(row: Row) -> float | None:
    ttft_ms: float | None = row["ttft_ms"]
    if ttft_ms is None and row["outcome"] in FAILED_OUTCOMES:
        return math.inf  # later than any limit; a user who left before the first token tells nothing
    return ttft_ms


# Of an audited request: the value and, where there is one, the same value measured dense against dense.
AUDIT_VALUES: Mapping[str, Callable[[Row], tuple[float | None, float | None]]] = {
    "audit.kl": _column("kl", "kl_floor"),
    "audit.token_disagreement": _column("token_disagreement", "token_disagreement_floor"),
    "audit.dropped_mass_mean": _column("dropped_mass_mean"),
    "audit.dropped_mass_p99": _column("dropped_mass_p99"),
    "audit.compute_ratio": _compute_ratio,
}
# Of any request, counted for the variant it was assigned to; None says nothing.
SERVE_VALUES: Mapping[str, Callable[[Row], float | None]] = {
    "serve.failed": _failed,
    "serve.ttft_ms": _ttft_ms,
    "serve.tpot_ms": lambda row: row["tpot_ms"],
    "serve.total_ms": lambda row: row["total_ms"],
}


def read_signals(
    store: Store, query: SignalQuery, *, cursor: int, command_cursor: int = 0, now_s: float
) -> Signals:
    """Read what happened since `cursor`; reading the same cursor again gives the same observations."""
    store.expire_audits(query.rollout_id, older_than_s=now_s - query.audit_limit_s, now_s=now_s)
    with store.read("signals") as connection:
        newest = store.last_number(connection)
        upto = min(newest, cursor + query.num_numbers)
        units = read_units(connection, query, after=cursor, upto=upto)
        if upto == newest:  # move only past rows that say something: a quiet tick leaves the state as it is
            upto = max(cursor, last_arrival(connection, query.rollout_id, cursor, upto), *units.numbers)
        return Signals(
            observations=_observations(query, units),
            health=read_health(
                connection,
                query.rollout_id,
                window_s=query.health_window_s,
                now_s=now_s,
                replicas=query.replicas,
            ),
            drift=_read_newest_drift(connection, query.rollout_id),
            traffic=read_traffic(connection, query.rollout_id, after=cursor, upto=upto),
            commands=_read_commands(connection, query.rollout_id, command_cursor),
            samples=_read_samples(connection, query),
            cursor=upto,
            newest_data_at_s=read_newest_at(connection, query.rollout_id, now_s=now_s),
            unscored_since_s=read_unscored_since(
                connection, query.rollout_id, since_s=query.since_s, now_s=now_s
            ),
            lengths=read_lengths(connection, query, units.borders, after=cursor, upto=upto),
            artifact=query.artifact,
        )


def _observations(query: SignalQuery, units: Units) -> tuple[Observation, ...]:
    audit_names = sorted(query.value_names & AUDIT_VALUES.keys())
    serve_names = sorted(query.value_names & SERVE_VALUES.keys())
    found: list[Observation] = []
    for row in units.audits:
        half = units.half(row)
        found += (_audit_observation(row, name, half) for name in audit_names)
    for row in units.requests:
        found += (o for name in serve_names if (o := _serve_observation(row, name)) is not None)
    return tuple(sorted(found, key=lambda observation: (observation.seq, observation.value_name)))


def _audit_observation(row: Row, name: str, half: str) -> Observation:
    value, floor = AUDIT_VALUES[name](row)
    return Observation(
        seq=row["seq"],
        value_name=name,
        slice_id=row["slice_id"],
        rung_id=row["rung_id"],
        session_id=row["session_id"],
        variant=row["variant_served"],
        at_s=row["at_s"],
        # A database keeps NaN as NULL: an absent value of a scored audit is an error, never a zero.
        value=math.nan if value is None else value,
        floor=floor,
        missing=row["status"] == AuditStatus.MISSING,
        share=row["share"],
        half=half,
        reason=row.get("reason") or "",
    )


def _serve_observation(row: Row, name: str) -> Observation | None:
    value = SERVE_VALUES[name](row)
    if value is None:
        return None
    return Observation(
        seq=row["seq"],
        value_name=name,
        slice_id=row["slice_id"],
        rung_id=row["rung_id"],
        session_id=row["session_id"],
        variant=row["variant_assigned"],
        at_s=row["at_s"],
        value=value,
        share=row["share"],
    )


def _read_newest_drift(connection: Connection, rollout_id: str) -> tuple[DriftSignal, ...]:
    newest = (
        sa.select(sa.func.max(DRIFT.c.seq))
        .where(DRIFT.c.rollout_id == rollout_id)
        .group_by(DRIFT.c.signal_id)
    )
    query = sa.select(DRIFT).where(DRIFT.c.seq.in_(newest)).order_by(DRIFT.c.signal_id)
    return tuple(
        DriftSignal(
            id=row["signal_id"],
            status=row["status"],
            score=row["score"],
            threshold=row["threshold"],
            window_units=row["window_units"],
            window_id=row["window_id"],
            detail=row["detail"],
        )
        for row in connection.execute(query).mappings()
    )


def _read_samples(connection: Connection, query: SignalQuery) -> tuple[MetricSample, ...]:
    """What metrics of one's own were since each was read last."""
    found: list[MetricSample] = []
    for metric_id, after in query.metrics.items():
        rows = connection.execute(
            sa.select(METRICS)
            .where(
                METRICS.c.rollout_id == query.rollout_id,
                METRICS.c.metric_id == metric_id,
                METRICS.c.seq > after,
            )
            .order_by(METRICS.c.seq)
            .limit(query.num_numbers)
        )
        names = ("seq", "metric_id", "at_s", "status", "value", "detail")
        found += (MetricSample(**{name: row[name] for name in names}) for row in rows.mappings())
    return tuple(sorted(found, key=lambda sample: sample.seq))


def _read_commands(connection: Connection, rollout_id: str, after: int) -> tuple[Command, ...]:
    query = (
        sa.select(COMMANDS.c.seq, COMMANDS.c.kind, COMMANDS.c.by, COMMANDS.c.reason)
        .where(COMMANDS.c.rollout_id == rollout_id, COMMANDS.c.seq > after)
        .order_by(COMMANDS.c.seq)
    )
    return tuple(Command(**row) for row in connection.execute(query).mappings())
