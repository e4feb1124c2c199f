"""Samples for a drift check: the newest full window of a column, and what it is compared with.

Units are sessions. A window closes when `window_units` of them are there and the next one starts afresh:
no unit is judged twice. Quality windows belong to one rung; rungs that run side by side fill windows of
their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sentei.monitors.records import AuditStatus
from sentei.monitors.store import Store

Row = Mapping[str, Any]

FLOOR_COLUMNS: Mapping[str, str] = {"kl": "kl_floor", "token_disagreement": "token_disagreement_floor"}
AUDIT_COLUMNS = frozenset({*FLOOR_COLUMNS, "dropped_mass_mean", "dropped_mass_p99"})
NUM_REFERENCE_WINDOWS = (
    2  # where dense gives no reference, a rung's first windows are what later ones must equal
)


@dataclass(frozen=True, slots=True)
class DriftWindow:
    """The newest full window and its reference; `window_id` is 0 as long as there is none to judge."""

    window_id: int
    current: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Full:
    key: str
    index: int  # 0 for the first window of its key
    values: tuple[float, ...]


def read_window(
    store: Store, rollout_id: str, column: str, *, window_units: int, has_dense_reference: bool
) -> DriftWindow:
    """Read the newest full window of a column and its reference.

    With a dense reference, `kl` and `token_disagreement` are compared with the same values measured dense
    against dense, and the length of answers with that of dense-assigned sessions. Everything else is compared
    with the first windows of its own rung.
    """
    if column in AUDIT_COLUMNS:
        rows = _scored_units(store.read_audits(rollout_id), column)
        full = _fill(((row["rung_id"], _number(row[column])) for row in rows), window_units)
        if has_dense_reference and column in FLOOR_COLUMNS:
            return _against(full, (row[FLOOR_COLUMNS[column]] for row in rows))
        return _against_first(full)
    arrivals = [row for row in store.read_requests(rollout_id) if row["is_arrival"]]
    if column == "completion_tokens":
        sparse = ((r["rung_id"], r[column]) for r in arrivals if r["variant_assigned"] == "sparse")
        dense = (r[column] for r in arrivals if r["variant_assigned"] == "dense")
        return _against(_fill(sparse, window_units), dense)
    return _against_first(_fill((("", row[column]) for row in arrivals), window_units))


def _scored_units(rows: Iterable[Row], column: str) -> list[Row]:
    """The first score of each session in its slice and rung.

    A score without `kl` or `token_disagreement` is a value that was no number (a database keeps NaN as
    nothing), and stays; the dropped mass is not sampled in every answer.
    """
    seen: set[tuple[str, str, str]] = set()
    units = []
    for row in rows:
        key = (row["session_id"], row["slice_id"], row["rung_id"])
        is_there = row[column] is not None or column in FLOOR_COLUMNS
        is_scored = row["status"] == AuditStatus.SCORED and is_there
        if is_scored and key not in seen:
            seen.add(key)
            units.append(row)
    return units


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _fill(values: Iterable[tuple[str, float]], window_units: int) -> list[_Full]:
    """Cut a stream of (key, value) into windows per key, in the order in which they fill."""
    waiting: defaultdict[str, list[float]] = defaultdict(list)
    num_full: defaultdict[str, int] = defaultdict(int)
    full: list[_Full] = []
    for key, value in values:
        waiting[key].append(float(value))
        if len(waiting[key]) == window_units:
            full.append(_Full(key, num_full[key], tuple(waiting[key])))
            num_full[key] += 1
            waiting[key].clear()
    return full


def _against(full: list[_Full], reference: Iterable[float | None]) -> DriftWindow:
    values = tuple(float(value) for value in reference if value is not None)
    return DriftWindow(len(full), full[-1].values if full else (), values)


def _against_first(full: list[_Full]) -> DriftWindow:
    for position in range(len(full) - 1, -1, -1):
        newest = full[position]
        if newest.index >= NUM_REFERENCE_WINDOWS:
            first = (w for w in full if w.key == newest.key and w.index < NUM_REFERENCE_WINDOWS)
            reference = tuple(value for window in first for value in window.values)
            return DriftWindow(position + 1, newest.values, reference)
    return DriftWindow(0)
