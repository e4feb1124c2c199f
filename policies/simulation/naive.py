"""Threshold rules in the style of Argo Rollouts and of Flagger, on the sessions that the policy is judged by.

Each looks at the mean of every guardrail in every slice over a window and compares it with the bound, as a
successCondition or a thresholdRange does. Argo's metrics each may fail `limit` times; Flagger counts failed
checks over the whole run, and a failed check does not move the weight on. Both promote when the planned
number of windows has passed. A window without a unit is passed over; the tools themselves would fail it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sentei.policies.evidence.base import Bools, Floats, Ints
from sentei.policies.simulation.plan import Gate, Plan
from sentei.policies.simulation.world import Batch

WATCHING, PASSED, ABORTED = range(3)


@dataclass(frozen=True, slots=True)
class NaiveRule:
    """One rule: `argo` or `flagger`, how many failures it bears, how many windows it plans."""

    name: str
    style: str
    limit: int
    units: int = 20  # sessions per slice and window, about
    windows: int = 24


RULES = (
    NaiveRule("argo, failureLimit 0", "argo", 0),
    NaiveRule("argo, failureLimit 3", "argo", 3),
    NaiveRule("flagger, threshold 10", "flagger", 10),
)


class NaiveFleet:
    """One rule over many rollouts."""

    def __init__(self, rule: NaiveRule, plan: Plan, num_rollouts: int, units_per_tick: float) -> None:
        self.rule, self._plan = rule, plan
        self.outcome = np.zeros(num_rollouts, dtype=np.int64)
        self.wrong = np.zeros(num_rollouts, dtype=np.bool_)  # aborted without harm, passed at or over a bound
        self._gates = tuple(gate for gate in plan.gates if gate.kind in ("betting", "count"))
        num_slices = len(plan.slice_ids)
        shape = (len(self._gates), num_rollouts, num_slices)
        self._total, self._count = np.zeros(shape), np.zeros(shape)
        self._failures = np.zeros(shape, dtype=np.int64)
        self._failed_checks = np.zeros(num_rollouts, dtype=np.int64)
        self._passed = np.zeros(num_rollouts, dtype=np.int64)
        self._ticks_per_window = max(1, round(rule.units / units_per_tick))
        self._num_ticks = 0

    def tick(self, batch: Batch, *, is_harm: bool, is_at_bound: bool) -> None:
        """Add the sessions of one tick; at the end of a window, compare; note what was true."""
        for index, gate in enumerate(self._gates):
            total, count = _sums(gate, batch)
            self._total[index] += total
            self._count[index] += count
        self._num_ticks += 1
        if self._num_ticks % self._ticks_per_window == 0:
            aborts, passes = self._compare()
            self.wrong |= (aborts & (not is_harm)) | (passes & is_at_bound)
            self._total[...] = self._count[...] = 0

    def counts(self) -> tuple[int, int, int, int]:
        """How many aborted, passed, wrongly aborted and wrongly passed."""
        aborted, passed = self.outcome == ABORTED, self.outcome == PASSED
        both = (aborted, passed, aborted & self.wrong, passed & self.wrong)
        return tuple(int(flags.sum()) for flags in both)  # type: ignore[return-value]

    def _compare(self) -> tuple[Bools, Bools]:
        bounds = np.array([gate.bound for gate in self._gates])[:, None, None]
        failed: Bools = (self._total > bounds * self._count) & (self._count > 0)
        is_on = self.outcome == WATCHING
        any_failed = failed.any(axis=(0, 2))
        self._failures += failed
        self._failed_checks += any_failed
        if self.rule.style == "argo":
            aborts = (self._failures > self.rule.limit).any(axis=(0, 2)) & is_on
            self._passed += 1
        else:
            aborts = (self._failed_checks >= self.rule.limit) & is_on
            self._passed += ~any_failed
        passes = (self._passed >= self.rule.windows) & is_on & ~aborts
        self.outcome[aborts] = ABORTED
        self.outcome[passes] = PASSED
        return aborts, passes


def _sums(gate: Gate, batch: Batch) -> tuple[Floats, Ints]:
    """The sum of a guardrail's values in a tick, on the scale of its bound, and of how many sessions."""
    if gate.kind == "count":
        hits = batch.hits[(gate.value, gate.over_s)]
        is_unit = np.arange(hits.shape[-1]) < batch.candidates[..., None]
        return (hits & is_unit).sum(axis=-1).astype(np.float64), batch.candidates
    if gate.value not in batch.values:
        return np.zeros(batch.audits.shape), np.zeros_like(batch.audits)
    values = batch.values[gate.value]
    if gate.floor_cap is not None:
        floor = np.minimum(batch.floors[gate.value], gate.floor_cap)
        values = (values - floor + gate.floor_cap) / (1 + gate.floor_cap)
    is_unit = np.arange(values.shape[-1]) < batch.audits[..., None]
    if batch.missing is not None:
        is_unit = is_unit & ~batch.missing
    return (values * is_unit).sum(axis=-1), is_unit.sum(axis=-1)
