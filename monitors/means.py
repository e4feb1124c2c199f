"""Means of what was measured between two numbers of the store: the points of a chart over time."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sentei.monitors.records import FAILED_OUTCOMES, AuditStatus
from sentei.monitors.store import Store
from sentei.monitors.tables import AUDITS, REQUESTS

_QUALITY = ("kl", "kl_floor", "token_disagreement", "token_disagreement_floor", "dropped_mass_mean")
_LATENCY = ("ttft_ms", "tpot_ms", "total_ms")


def read_means(store: Store, rollout_id: str, *, after: int, upto: int) -> dict[str, float | None]:
    """Return `quality/*` means of scored audits and `latency/*`, `serve/*` means per assigned variant."""
    values: dict[str, float | None] = {}
    with store.read("means") as connection:
        audits = connection.execute(_audit_query(rollout_id, after, upto)).one()
        for name, value in zip(_QUALITY, audits[1:], strict=True):
            values[f"quality/{name}"] = value
        values["quality/audits"] = float(audits[0])
        for row in connection.execute(_request_query(rollout_id, after, upto)).all():
            variant, num_requests, num_failed, *means = row
            values[f"serve/requests_{variant}"] = float(num_requests)
            values[f"serve/failed_share_{variant}"] = num_failed / num_requests
            for name, value in zip(_LATENCY, means, strict=True):
                values[f"latency/{name}_{variant}"] = value
    return values


def _audit_query(rollout_id: str, after: int, upto: int) -> sa.Select[Any]:
    means = (sa.func.avg(AUDITS.c[name]) for name in _QUALITY)
    return sa.select(sa.func.count(), *means).where(
        AUDITS.c.rollout_id == rollout_id,
        AUDITS.c.seq > after,
        AUDITS.c.seq <= upto,
        AUDITS.c.status == AuditStatus.SCORED.value,
    )


def _request_query(rollout_id: str, after: int, upto: int) -> sa.Select[Any]:
    failed = sa.case((REQUESTS.c.outcome.in_([o.value for o in FAILED_OUTCOMES]), 1), else_=0)
    means = (sa.func.avg(REQUESTS.c[name]) for name in _LATENCY)
    return (
        sa.select(REQUESTS.c.variant_assigned, sa.func.count(), sa.func.sum(failed), *means)
        .where(REQUESTS.c.rollout_id == rollout_id, REQUESTS.c.seq > after, REQUESTS.c.seq <= upto)
        .group_by(REQUESTS.c.variant_assigned)
    )
