"""Request records, audit scores and drift results: written once, numbered, read since a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.database import Database
from sentei.monitors.records import (
    Arrival,
    AuditScore,
    AuditStatus,
    DriftResult,
    MetricResult,
    Missing,
    RequestRecord,
)
from sentei.monitors.tables import ARRIVALS, ATTENTION, AUDITS, DRIFT, METRICS, REQUESTS

Row = Mapping[str, Any]


class Measurements(Database):
    """What was measured; a record that is there already is left alone, so a writer may safely try again."""

    def add_request(self, record: RequestRecord) -> bool:
        """Write one request; False if it was there already."""
        with self.write(f"request {record.request_id!r}") as connection:
            if _has_row(connection, REQUESTS, record.request_id):
                return False
            values = dataclasses.asdict(record)
            values["at_s"] = self.not_ahead(connection, record.at_s)
            if attention := values.pop("attention"):
                connection.execute(
                    sa.insert(ATTENTION).values(request_id=record.request_id, attention=attention)
                )
            values["is_arrival"] = not _exists(
                connection, REQUESTS, _same(REQUESTS, record, "rollout_id", "session_id", "slice_id")
            )
            values["is_unit"] = not _exists(
                connection,
                REQUESTS,
                _same(REQUESTS, record, "rollout_id", "session_id", "slice_id", "rung_id", "share"),
            )
            connection.execute(sa.insert(REQUESTS).values(seq=self.next_number(connection), **values))
        return True

    def add_arrival(self, arrival: Arrival) -> bool:
        """Write a session's arrival in a slice; False if it was there already."""
        with self.write(f"arrival of session in slice {arrival.slice_id!r}") as connection:
            same = _same(ARRIVALS, arrival, "rollout_id", "session_id", "slice_id")
            if _exists(connection, ARRIVALS, same):
                return False
            values = dataclasses.asdict(arrival) | {"at_s": self.not_ahead(connection, arrival.at_s)}
            connection.execute(sa.insert(ARRIVALS).values(seq=self.next_number(connection), **values))
        return True

    def add_audit(self, score: AuditScore) -> bool:
        """Write one score; False if this request has one already, also if it was given up as missing."""
        with self.write(f"audit of request {score.request_id!r}") as connection:
            return self._insert_audit(connection, score)

    def expire_audits(self, rollout_id: str, *, older_than_s: float, now_s: float) -> int:
        """Write a missing score for each chosen request that ended before `older_than_s` and has none."""
        with self.read("requests that wait for their audit") as connection:
            waiting = _waiting_for_audit(connection, rollout_id, older_than_s)
        if not waiting:
            return 0
        with self.write("missing audits") as connection:
            return sum(self._insert_audit(connection, _missing(row, now_s)) for row in waiting)

    def add_drift(self, result: DriftResult) -> int:
        """Write one drift result and return its number."""
        with self.write(f"drift of {result.signal_id!r}") as connection:
            seq = self.next_number(connection)
            connection.execute(sa.insert(DRIFT).values(seq=seq, **dataclasses.asdict(result)))
        return seq

    def read_drift(self, rollout_id: str, *, after: int = 0) -> list[tuple[int, DriftResult]]:
        """Return the drift results numbered above `after`, oldest first."""
        query = (
            sa.select(DRIFT)
            .where(DRIFT.c.rollout_id == rollout_id, DRIFT.c.seq > after)
            .order_by(DRIFT.c.seq)
        )
        with self.read("drift results") as connection:
            rows = connection.execute(query).mappings().all()
        return [(int(row["seq"]), DriftResult(**_without(dict(row), "seq"))) for row in rows]

    def add_metric(self, result: MetricResult) -> int:
        """Write what a metric of one's own was and return its number."""
        with self.write(f"metric {result.metric_id!r}") as connection:
            seq = self.next_number(connection)
            connection.execute(sa.insert(METRICS).values(seq=seq, **dataclasses.asdict(result)))
        return seq

    def read_metrics(self, rollout_id: str, *, after: int = 0) -> list[tuple[int, MetricResult]]:
        """Return what metrics were, numbered above `after`, oldest first."""
        query = (
            sa.select(METRICS)
            .where(METRICS.c.rollout_id == rollout_id, METRICS.c.seq > after)
            .order_by(METRICS.c.seq)
        )
        with self.read("metrics") as connection:
            rows = connection.execute(query).mappings().all()
        return [(int(row["seq"]), MetricResult(**_without(dict(row), "seq"))) for row in rows]

    def read_requests(self, rollout_id: str, *, after: int = 0) -> list[Row]:
        """Return request rows with their `seq`, oldest first, for reports."""
        query = _requests().where(REQUESTS.c.rollout_id == rollout_id, REQUESTS.c.seq > after)
        with self.read("requests") as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def read_request(self, request_id: str) -> Row | None:
        """Return one request's row, or None."""
        with self.read(f"request {request_id!r}") as connection:
            row = (
                connection.execute(_requests().where(REQUESTS.c.request_id == request_id)).mappings().first()
            )
        return dict(row) if row else None

    def read_audits(self, rollout_id: str, *, after: int = 0) -> list[Row]:
        """Return audit rows with their `seq`, oldest first, for reports and drift windows."""
        return self._read_rows(AUDITS, rollout_id, after)

    def _read_rows(self, table: sa.Table, rollout_id: str, after: int) -> list[Row]:
        query = (
            sa.select(table)
            .where(table.c.rollout_id == rollout_id, table.c.seq > after)
            .order_by(table.c.seq)
        )
        with self.read(table.name) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _insert_audit(self, connection: Connection, score: AuditScore) -> bool:
        if _has_row(connection, AUDITS, score.request_id):
            return False
        earlier = _same(AUDITS, score, "rollout_id", "session_id", "slice_id", "rung_id") & AUDITS.c.is_unit
        if score.status == AuditStatus.SCORED:
            earlier &= AUDITS.c.status == AuditStatus.SCORED.value
        is_unit = not _exists(connection, AUDITS, earlier)
        values = dataclasses.asdict(score) | {"at_s": self.not_ahead(connection, score.at_s)}
        connection.execute(
            sa.insert(AUDITS).values(seq=self.next_number(connection), is_unit=is_unit, **values)
        )
        return True


def _requests() -> sa.Select[Any]:
    kept = sa.func.coalesce(ATTENTION.c.attention, "").label("attention")
    return (
        sa.select(REQUESTS, kept)
        .outerjoin(ATTENTION, ATTENTION.c.request_id == REQUESTS.c.request_id)
        .order_by(REQUESTS.c.seq)
    )


def _same(table: sa.Table, record: object, *names: str) -> sa.ColumnElement[bool]:
    return sa.and_(*(table.c[name] == getattr(record, name) for name in names))


def _exists(connection: Connection, table: sa.Table, condition: sa.ColumnElement[bool]) -> bool:
    query = sa.select(sa.literal(1)).select_from(table).where(condition).limit(1)
    return connection.execute(query).first() is not None


def _has_row(connection: Connection, table: sa.Table, request_id: str) -> bool:
    return _exists(connection, table, table.c.request_id == request_id)


def _waiting_for_audit(connection: Connection, rollout_id: str, older_than_s: float) -> Sequence[Row]:
    query = (
        sa.select(REQUESTS)
        .outerjoin(AUDITS, AUDITS.c.request_id == REQUESTS.c.request_id)
        .where(
            REQUESTS.c.rollout_id == rollout_id,
            REQUESTS.c.chosen_for_audit,
            REQUESTS.c.at_s < older_than_s,
            AUDITS.c.request_id.is_(None),
        )
        .order_by(REQUESTS.c.seq)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def _missing(request: Row, now_s: float) -> AuditScore:
    return AuditScore(
        request_id=request["request_id"],
        session_id=request["session_id"],
        rollout_id=request["rollout_id"],
        at_s=now_s,
        slice_id=request["slice_id"],
        rung_id=request["rung_id"],
        variant_served=request["variant_served"],
        status=AuditStatus.MISSING.value,
        prompt_tokens=request["prompt_tokens"],
        share=request["share"],
        audit_probability=request["audit_probability"] or 0.0,
        reason=Missing.TIMEOUT.value,
    )


def _without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
