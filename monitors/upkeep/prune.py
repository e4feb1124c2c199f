"""Delete old records of rollouts that are over; what they decided, and why, stays in the event log.

A rollout is over when another one was started after it. The newest one is a controller's: it may read any of
its records again (drift windows are counted from the first one), so all of them stay, however old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sentei.monitors.steering import PRUNED
from sentei.monitors.store import Store
from sentei.monitors.tables import ARRIVALS, ATTENTION, AUDITS, METRICS, REQUESTS, ROLLOUTS

Condition = sa.ColumnElement[bool]
ROWS_AT_A_TIME = 2_000  # in one transaction: the app's writers wait for it


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows of one rollout went, or would go; or how many old ones stay, where it is not over."""

    rollout_id: str
    is_over: bool
    requests: int
    audits: int
    arrivals: int
    attention: int
    metrics: int

    @property
    def rows(self) -> int:
        """All of them together."""
        return self.requests + self.audits + self.arrivals + self.attention + self.metrics


def prune_store(store: Store, *, before_s: float, is_dry: bool = False) -> tuple[Pruned, ...]:
    """Delete the records of before `before_s` of every rollout that is over; returns a line for each rollout.

    An audit goes with its request, so none is given up as missing for want of it. Each rollout that lost
    records is marked, so that nobody replays it as if it had all of them. Dry: only counts.
    """
    with store.read("rollouts") as connection:
        order = sa.select(ROLLOUTS.c.rollout_id).order_by(ROLLOUTS.c.seq)
        ids = list(connection.execute(order).scalars())
        found = [_count(connection, name, before_s, is_over=name != ids[-1]) for name in ids]
    if not is_dry:
        for line in found:
            if line.is_over and line.rows:
                store.save_value(f"{PRUNED}{line.rollout_id}", repr(before_s))
                _delete_all(store, line.rollout_id, before_s)
    return tuple(found)


def _count(connection: Connection, rollout_id: str, before_s: float, *, is_over: bool) -> Pruned:
    requests, arrivals, alone = _old_rows(rollout_id, before_s)
    ids = sa.select(REQUESTS.c.request_id).where(requests)
    old = {
        REQUESTS: requests,
        AUDITS: AUDITS.c.request_id.in_(ids) | alone,
        ARRIVALS: arrivals,
        ATTENTION: ATTENTION.c.request_id.in_(ids),
        METRICS: _old_samples(rollout_id, before_s),
    }
    counts = {
        table.name: int(
            connection.execute(sa.select(sa.func.count()).select_from(table).where(rows)).scalar_one()
        )
        for table, rows in old.items()
    }
    return Pruned(rollout_id=rollout_id, is_over=is_over, **counts)


def _old_rows(rollout_id: str, before_s: float) -> tuple[Condition, Condition, Condition]:
    """Which requests, arrivals, and audits without a request are old."""
    requests, arrivals, audits = (
        (table.c.rollout_id == rollout_id) & (table.c.at_s < before_s)
        for table in (REQUESTS, ARRIVALS, AUDITS)
    )
    return requests, arrivals, audits & ~sa.exists().where(REQUESTS.c.request_id == AUDITS.c.request_id)


def _old_samples(rollout_id: str, before_s: float) -> Condition:
    """Which answers to metrics of one's own are old."""
    return (METRICS.c.rollout_id == rollout_id) & (METRICS.c.at_s < before_s)


def _delete_all(store: Store, rollout_id: str, before_s: float) -> None:
    requests, arrivals, alone = _old_rows(rollout_id, before_s)
    with_them = (ATTENTION.c.request_id, AUDITS.c.request_id, REQUESTS.c.request_id)
    for condition, keys in (
        (requests, with_them),
        (arrivals, (ARRIVALS.c.seq,)),
        (alone, (AUDITS.c.request_id,)),
        (_old_samples(rollout_id, before_s), (METRICS.c.seq,)),
    ):
        while _delete_some(store, condition, keys):
            pass


def _delete_some(store: Store, old: Condition, keys: Sequence[sa.Column[Any]]) -> bool:
    """Delete a part of the old rows, found by the last key, with what hangs on them; False after the last."""
    with store.write("pruned records") as connection:
        found = list(connection.execute(sa.select(keys[-1]).where(old).limit(ROWS_AT_A_TIME)).scalars())
        for key in keys if found else ():
            connection.execute(sa.delete(key.table).where(key.in_(found)))
    return len(found) == ROWS_AT_A_TIME
