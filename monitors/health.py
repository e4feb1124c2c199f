"""What each variant did lately: requests and failures in the breaker's window, by assigned variant.

One session can neither hide nor make a failing variant: its newest requests count, no more than three, and
failures that all come from one session are none of the variant's.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.database import AHEAD_S
from sentei.monitors.records import FAILED_OUTCOMES, AuditStatus, Outcome
from sentei.monitors.tables import ARRIVALS, AUDITS, REQUESTS
from sentei.policies.signals import SliceTraffic, VariantHealth

VARIANTS = ("dense", "sparse")
MAX_PER_SESSION = 3


def read_health(
    connection: Connection, rollout_id: str, *, window_s: float, now_s: float, replicas: Mapping[str, int]
) -> tuple[VariantHealth, ...]:
    """Count requests and failures per assigned variant in the window; a rescue counts as a failure."""
    is_failed = REQUESTS.c.outcome.in_([o.value for o in FAILED_OUTCOMES]) | (
        (REQUESTS.c.variant_assigned == "dense") & (REQUESTS.c.outcome == Outcome.UNANSWERABLE.value)
    )
    place = sa.func.row_number().over(
        partition_by=(REQUESTS.c.variant_assigned, REQUESTS.c.session_id), order_by=REQUESTS.c.seq.desc()
    )
    newest = (
        sa.select(
            REQUESTS.c.variant_assigned.label("variant"),
            sa.case((is_failed, REQUESTS.c.session_id)).label("failed_session"),
            place.label("place"),
        )
        .where(REQUESTS.c.rollout_id == rollout_id, REQUESTS.c.at_s > now_s - window_s)
        .subquery()
    )
    failed = newest.c.failed_session
    query = (
        sa.select(
            newest.c.variant, sa.func.count(), sa.func.count(failed), sa.func.count(sa.distinct(failed))
        )
        .where(newest.c.place <= MAX_PER_SESSION)
        .group_by(newest.c.variant)
    )
    counts = {
        variant: (int(n), int(bad) if sessions > 1 else 0)
        for variant, n, bad, sessions in connection.execute(query)
    }
    return tuple(
        VariantHealth(
            variant, window_s, *counts.get(variant, (0, 0)), replicas_ready=replicas.get(variant, 0)
        )
        for variant in VARIANTS
    )


def read_traffic(
    connection: Connection, rollout_id: str, *, after: int, upto: int
) -> tuple[SliceTraffic, ...]:
    """Count how new sessions were assigned per slice and intended share.

    A session counts once per slice and rollout: its place is the same each time it comes back, so a second
    arrival would tell nothing new and look like one that does.
    """
    is_candidate = sa.case((ARRIVALS.c.variant_assigned == "sparse", 1), else_=0)
    query = (
        sa.select(ARRIVALS.c.slice_id, ARRIVALS.c.share, sa.func.sum(is_candidate), sa.func.count())
        .where(ARRIVALS.c.rollout_id == rollout_id, ARRIVALS.c.seq > after, ARRIVALS.c.seq <= upto)
        .group_by(ARRIVALS.c.slice_id, ARRIVALS.c.share)
        .order_by(ARRIVALS.c.slice_id, ARRIVALS.c.share)
    )
    rows = connection.execute(query)
    return tuple(
        SliceTraffic(slice_id, share, int(hits), int(total)) for slice_id, share, hits, total in rows
    )


def read_newest_at(connection: Connection, rollout_id: str, *, now_s: float) -> float | None:
    """Return when the newest record or score was written; one given up as missing is no news.

    A stamp from the future is no news either: it would count as fresh for as long as it lies ahead.
    """
    times = []
    for table, is_news in ((REQUESTS, sa.true()), (AUDITS, AUDITS.c.status != "missing")):
        query = sa.select(sa.func.max(table.c.at_s)).where(
            table.c.rollout_id == rollout_id, table.c.at_s <= now_s + AHEAD_S, is_news
        )
        times.append(connection.execute(query).scalar())
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
