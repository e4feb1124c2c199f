"""What became of a rollout's audits since a number of the store, for counters that only grow."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from sentei.monitors.health import read_unscored_since
from sentei.monitors.store import Store
from sentei.monitors.tables import AUDITS, REQUESTS


@dataclass(frozen=True, slots=True)
class EndedAudit:
    """One audit that has ended; of one that was not scored only the reason says something."""

    slice_id: str
    rung_id: str
    status: str
    reason: str
    lag_s: float | None  # from the end of its answer; None: the answer's record is not there
    dropped_mass: float | None  # mean over the sampled rows


@dataclass(frozen=True, slots=True)
class AuditTally:
    """The audits of one rollout between two numbers of the store."""

    upto: int  # read on from here
    chosen: dict[str, int]  # by slice
    ended: tuple[EndedAudit, ...]
    unscored_since_s: float | None  # when the first of those was due that came after the newest score


def read_audit_tally(
    store: Store, rollout_id: str, *, after: int, since_s: float, now_s: float
) -> AuditTally:
    """Read what happened above the number `after`; reading on from `upto` never counts a row twice."""
    requests, audits = REQUESTS.c, AUDITS.c
    with store.read("tally of audits") as connection:
        upto = store.last_number(connection)
        chosen = sa.select(requests.slice_id, sa.func.count()).where(
            requests.rollout_id == rollout_id,
            requests.seq > after,
            requests.seq <= upto,
            requests.chosen_for_audit,
        )
        lag_s = audits.at_s - requests.at_s
        ended = (
            sa.select(
                audits.slice_id, audits.rung_id, audits.status, audits.reason, lag_s, audits.dropped_mass_mean
            )
            .outerjoin(REQUESTS, requests.request_id == audits.request_id)
            .where(audits.rollout_id == rollout_id, audits.seq > after, audits.seq <= upto)
            .order_by(audits.seq)
        )
        return AuditTally(
            upto,
            {
                slice_id: int(count)
                for slice_id, count in connection.execute(chosen.group_by(requests.slice_id))
            },
            tuple(
                EndedAudit(slice_id, rung_id, status, reason or "", lag_s, mass)
                for slice_id, rung_id, status, reason, lag_s, mass in connection.execute(ended)
            ),
            read_unscored_since(connection, rollout_id, since_s=since_s, now_s=now_s),
        )
