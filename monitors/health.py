"""What each variant did lately: requests and failures in the breaker's window, by assigned variant."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.records import FAILED_OUTCOMES, AuditStatus
from sentei.monitors.tables import AUDITS, REQUESTS
from sentei.policies.signals import SliceTraffic, VariantHealth

VARIANTS = ("dense", "sparse")
CLOCK_SKEW_S = 5.0  # how far ahead of us the clock of another machine may be


def read_health(
    connection: Connection, rollout_id: str, *, window_s: float, now_s: float, replicas: Mapping[str, int]
) -> tuple[VariantHealth, ...]:
    """Count requests and failures per assigned variant in the window; a rescue counts as a failure."""
    failed = sa.case((REQUESTS.c.outcome.in_([o.value for o in FAILED_OUTCOMES]), 1), else_=0)
    query = (
        sa.select(REQUESTS.c.variant_assigned, sa.func.count(), sa.func.sum(failed))
        .where(REQUESTS.c.rollout_id == rollout_id, REQUESTS.c.at_s > now_s - window_s)
        .group_by(REQUESTS.c.variant_assigned)
    )
    counts = {variant: (int(n), int(bad)) for variant, n, bad in connection.execute(query)}
    return tuple(
        VariantHealth(
            variant, window_s, *counts.get(variant, (0, 0)), replicas_ready=replicas.get(variant, 0)
        )
        for variant in VARIANTS
    )


def read_traffic(
    connection: Connection, rollout_id: str, *, after: int, upto: int
) -> tuple[SliceTraffic, ...]:
    """Count how new sessions were assigned per slice and intended share: a session counts once per slice."""
    is_candidate = sa.case((REQUESTS.c.variant_assigned == "sparse", 1), else_=0)
    query = (
        sa.select(REQUESTS.c.slice_id, REQUESTS.c.share, sa.func.sum(is_candidate), sa.func.count())
        .where(
            REQUESTS.c.rollout_id == rollout_id,
            REQUESTS.c.is_arrival,
            REQUESTS.c.seq > after,
            REQUESTS.c.seq <= upto,
        )
        .group_by(REQUESTS.c.slice_id, REQUESTS.c.share)
        .order_by(REQUESTS.c.slice_id, REQUESTS.c.share)
    )
    rows = connection.execute(query)
    return tuple(
        SliceTraffic(slice_id, share, int(hits), int(total)) for slice_id, share, hits, total in rows
    )


def read_newest_at(connection: Connection, rollout_id: str, *, now_s: float) -> float | None:
    """Return when the newest record or score was written; a score given up as missing is no news.

    A record stamped further ahead than CLOCK_SKEW_S is no news either: one wrong clock must not end silence.
    """
    latest_s = now_s + CLOCK_SKEW_S
    newest_request = sa.select(sa.func.max(REQUESTS.c.at_s)).where(
        REQUESTS.c.rollout_id == rollout_id, REQUESTS.c.at_s <= latest_s
    )
    newest_audit = sa.select(sa.func.max(AUDITS.c.at_s)).where(
        AUDITS.c.rollout_id == rollout_id, AUDITS.c.status != "missing", AUDITS.c.at_s <= latest_s
    )
    times = [connection.execute(query).scalar() for query in (newest_request, newest_audit)]
    return max((float(t) for t in times if t is not None), default=None)


def read_unscored_since(connection: Connection, rollout_id: str, *, since_s: float) -> float | None:
    """Return when the first request was chosen for an audit since the newest score; None if none waits."""
    audits, requests = AUDITS.c, REQUESTS.c
    newest = connection.execute(
        sa.select(sa.func.max(audits.at_s)).where(
            audits.rollout_id == rollout_id, audits.status == AuditStatus.SCORED.value
        )
    ).scalar()
    begin_s = since_s if newest is None else max(float(newest), since_s)
    found = connection.execute(
        sa.select(sa.func.min(requests.at_s)).where(
            requests.rollout_id == rollout_id, requests.chosen_for_audit, requests.at_s > begin_s
        )
    ).scalar()
    return None if found is None else float(found)
