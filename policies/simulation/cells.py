"""Evidence of one guardrail in many rollouts: the formulas of `policies.evidence`, over blocks of units.

A cell array has the shape [rollouts, places] (places: slices, or one for a guardrail over all of them) and,
for quality, [rollouts, slices, rungs]. Only what a verdict needs is kept: whether a threshold was ever
crossed, and how many units there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sentei.policies.evidence.base import Bools, Floats, Ints, log_mean_exp_paths
from sentei.policies.evidence.betting import Moments, betting_steps
from sentei.policies.evidence.counts import RATIO_TILTS, SRM_TILTS, beta_binomial_boundary, split_logs
from sentei.policies.evidence.watch import detector_bets, detector_steps, detector_walk
from sentei.policies.intake import RECENT_PARTS
from sentei.policies.judge import MIN_MISSING
from sentei.policies.simulation.plan import Gate

Index = tuple[Ints, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the cells say now, [rollouts, places]; neither safe nor undecided means that nothing may grow."""

    harm: Bools
    by_watch: Bools  # of the harm: found by the detector alone
    safe: Bools
    undecided: Bools
    units: Ints  # of all that may have shown harm
    proof: Ints  # of those that may prove safety
    error: Bools  # too many audits are missing
    candidates: Ints | None = None  # of what was served: units of sparse


@dataclass(frozen=True, slots=True)
class Audits:
    """What is known of a block of audits beside their values."""

    is_sparse: Bools  # served by sparse
    is_missing: Bools | None
    part: int  # of the window of missing audits


class Watch:
    """F14 in many cells."""

    def __init__(self, gate: Gate, shape: tuple[int, ...]) -> None:
        self._gate = gate
        self._bets = detector_bets(gate.bound, gate.cut)
        self._logs = np.zeros((len(self._bets), *shape))
        self.hit = np.zeros(shape, dtype=np.bool_)

    def feed(self, where: Index, values: Floats, is_unit: Bools) -> None:
        """Watch a block of units."""
        steps = detector_steps(values, is_unit, bound=self._gate.bound, bets=self._bets)
        cells: Any = (slice(None), *where)
        path = detector_walk(self._logs[cells], steps)
        self._logs[cells] = path[..., -1]
        if float(path.max()) >= self._gate.watch_at:  # the mean over bets is at most the largest
            log_e = log_mean_exp_paths(np.moveaxis(path, 0, -1))
            self.hit[where] |= ((log_e >= self._gate.watch_at) & is_unit).any(axis=-1)

    def clear(self, chosen: Bools) -> None:
        """Start afresh in the chosen cells."""
        self._logs[:, chosen] = 0.0
        self.hit[chosen] = False


class BettingCells:
    """F1 and F13 with their watch; also a benefit, which has no watch (F17)."""

    def __init__(self, gate: Gate, shape: tuple[int, int, int], missing_limit: float) -> None:
        self._gate, self._missing_limit = gate, missing_limit
        self._proof = np.zeros(shape, dtype=np.int64)  # scored units that the evidence of safety has
        self._part = np.full(RECENT_PARTS, -1)
        self._recent = np.zeros((2, RECENT_PARTS, *shape), dtype=np.int64)  # chosen, missing
        self._harm = [np.zeros(shape) for _ in range(4)]  # units, total, spread, log_e
        self._safe = [np.zeros(shape) for _ in range(4)]
        self._harm_hit, self._safe_hit = (np.zeros(shape, dtype=np.bool_) for _ in range(2))
        self._watch = None if gate.kind == "benefit" else Watch(gate, shape)

    def feed(self, where: Index, values: Floats, is_unit: Bools, is_missing: Bools | None, part: int) -> None:
        """Add a block of audits; a missing one is left out for harm and the worst case for safety (F12)."""
        scored = is_unit if is_missing is None else is_unit & ~is_missing
        self._bet(self._harm, self._harm_hit, where, values, scored)
        if self._watch is not None:
            self._watch.feed(where, values, scored)
        self._proof[where] += scored.sum(axis=-1)
        worst = values if is_missing is None else np.where(is_missing, 1.0, values)
        self._bet(self._safe, self._safe_hit, where, worst, is_unit)
        if is_missing is not None:
            self._note(where, is_unit, is_unit & is_missing, part)

    def _note(self, where: Index, chosen: Bools, missing: Bools, part: int) -> None:
        """Count the chosen and the missing in their part of the window."""
        place = part % RECENT_PARTS
        if self._part[place] != part:
            self._part[place] = part
            self._recent[:, place] = 0
        for kind, flags in enumerate((chosen, missing)):
            self._recent[kind, place][where] += flags.sum(axis=-1)

    def start_proof(self, chosen: Bools) -> None:
        """Safety is proven afresh in the chosen cells [rollouts, slices]; harm goes on (F15)."""
        for array in self._safe:
            array[chosen] = 0.0
        self._safe_hit[chosen] = False
        self._proof[chosen] = 0

    def _bet(
        self,
        store: list[Floats],
        hit: Bools,
        where: Index,
        values: Floats,
        is_unit: Bools,
    ) -> None:
        gate, is_harm = self._gate, store is self._harm
        before = Moments(store[0][where], store[1][where], store[2][where])
        after, scale = before.advance(values, is_unit)
        for array, new in zip(store, (after.units, after.total, after.spread), strict=False):
            array[where] = new
        steps = betting_steps(
            values,
            is_unit,
            scale,
            bound=gate.bound,
            direction="harm" if is_harm else "safe",
            alpha=gate.alpha_harm if is_harm else gate.alpha_safe,
            cut=gate.cut,
        )
        steps[..., 0] += store[3][where]
        path = np.cumsum(steps, axis=-1)
        store[3][where] = path[..., -1]
        hit[where] |= path.max(axis=-1) >= (gate.harm_at if is_harm else gate.safe_at)

    def judge(self, where: Index, part: int = 0) -> Findings:
        """The verdicts at the rungs in use, in that part of the window of missing audits."""
        units = self._harm[0][where].astype(np.int64)
        is_recent = (self._part > part - RECENT_PARTS) & (self._part >= 0)
        chosen, missing = (self._recent[kind][is_recent].sum(axis=0)[where] for kind in range(2))
        by_watch = self._watch.hit[where] if self._watch is not None else np.zeros_like(units, dtype=np.bool_)
        harm = self._harm_hit[where] | by_watch
        too_many = (missing / np.maximum(chosen, 1) > self._missing_limit) & (chosen >= MIN_MISSING)
        is_open = ~harm & (units > 0) & ~too_many
        safe = is_open & self._safe_hit[where]
        by_watch = by_watch & ~self._harm_hit[where]
        return Findings(harm, by_watch, safe, is_open & ~safe, units, self._proof[where], too_many & ~harm)


class CountCells:
    """F5 with its watch: evidence of counts is a comparison of the hits with a boundary."""

    def __init__(self, gate: Gate, shape: tuple[int, int], max_units: int) -> None:
        self._units, self._hits = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._harm_hit, self._safe_hit = (np.zeros(shape, dtype=np.bool_) for _ in range(2))
        self._watch = Watch(gate, shape)
        self._harm_from = beta_binomial_boundary(
            bound=gate.bound, direction="harm", threshold=gate.harm_at, max_units=max_units
        )
        self._safe_to = beta_binomial_boundary(
            bound=gate.bound, direction="safe", threshold=gate.safe_at, max_units=max_units
        )

    def feed(self, where: Index, is_hit: Bools, is_unit: Bools) -> None:
        """Add a block of sessions that were served by sparse."""
        units = self._units[where][..., None] + np.cumsum(is_unit, axis=-1)
        hits = self._hits[where][..., None] + np.cumsum(is_hit & is_unit, axis=-1)
        self._harm_hit[where] |= (hits >= self._harm_from[units]).any(axis=-1)
        self._safe_hit[where] |= (hits <= self._safe_to[units]).any(axis=-1)
        self._units[where], self._hits[where] = units[..., -1], hits[..., -1]
        self._watch.feed(where, is_hit.astype(np.float64), is_unit)

    def judge(self, where: Index) -> Findings:
        """The verdicts."""
        units = self._units[where]
        harm = self._harm_hit[where] | self._watch.hit[where]
        is_open = ~harm & (units > 0)
        safe = is_open & self._safe_hit[where]
        by_watch = self._watch.hit[where] & ~self._harm_hit[where]
        return Findings(harm, by_watch, safe, is_open & ~safe, units, units, np.zeros_like(harm), units)

    def clear(self, chosen: Bools) -> None:
        """Start afresh in the chosen cells."""
        for array in (self._units, self._hits):
            array[chosen] = 0
        for flag in (self._harm_hit, self._safe_hit):
            flag[chosen] = False
        self._watch.clear(chosen)


class TwoArms:
    """F16: quality, or gain, of every audited unit and of those that sparse served; harm of either counts."""

    def __init__(self, gate: Gate, shape: tuple[int, int, int], missing_limit: float) -> None:
        self._all, self._served = (BettingCells(gate, shape, missing_limit) for _ in range(2))

    def feed(self, where: Index, values: Floats, is_unit: Bools, audits: Audits) -> None:
        """Add a block of audits."""
        self._all.feed(where, values, is_unit, audits.is_missing, audits.part)
        is_served = is_unit & audits.is_sparse
        if is_served.any():
            self._served.feed(where, values, is_served, audits.is_missing, audits.part)

    def judge(self, where: Index, by_served: Bools, part: int) -> Findings:
        """The verdicts; safety and units are of the served arm where `by_served` [rollouts, 1] says so."""
        both, served = self._all.judge(where, part), self._served.judge(where, part)
        harm, error = both.harm | served.harm, both.error | served.error
        is_open = ~harm & ~error
        return Findings(
            harm=harm,
            by_watch=harm & (both.by_watch | ~both.harm) & (served.by_watch | ~served.harm),
            safe=np.where(by_served, served.safe, both.safe) & is_open,
            undecided=np.where(by_served, served.undecided, both.undecided) & is_open,
            units=np.where(by_served, served.units, both.units),
            proof=np.where(by_served, served.proof, both.proof),
            error=error & ~harm,
        )

    def start_proof(self, chosen: Bools, *, is_gain: bool = False) -> None:
        """Safety is proven afresh in the chosen cells [rollouts, slices]; of a gain what sparse served."""
        if not is_gain:
            self._all.start_proof(chosen)
        self._served.start_proof(chosen)


class ArmCells:
    """F6: only events move the evidence, any request shows that its arm is seen."""

    def __init__(self, gate: Gate, shape: tuple[int, int]) -> None:
        self._gate = gate
        self._harm, self._safe = (np.zeros((*shape, len(RATIO_TILTS))) for _ in range(2))
        self._harm_hit, self._safe_hit = (np.zeros(shape, dtype=np.bool_) for _ in range(2))
        self._arms = [np.zeros(shape, dtype=np.int64) for _ in range(2)]  # candidate, control

    def feed(self, is_candidate: Bools, is_event: Bools, share: Floats, arms: tuple[Ints, Ints]) -> None:
        """Add a block of events in their order, and how many requests each arm had."""
        for array, added in zip(self._arms, arms, strict=True):
            array += added
        weight = (share * self._gate.bound)[..., None]
        probability = np.broadcast_to(weight / (weight + 1 - share[..., None]), is_event.shape)
        one = is_event.astype(np.float64)
        hits = one * is_candidate
        for logs, hit, sign, at in (
            (self._harm, self._harm_hit, 1.0, self._gate.harm_at),
            (self._safe, self._safe_hit, -1.0, self._gate.safe_at),
        ):
            tilts = tuple(sign * tilt for tilt in RATIO_TILTS)
            path = logs[..., None, :] + np.cumsum(split_logs(hits, one, probability, tilts), axis=-2)
            if path.shape[-2]:
                hit |= (log_mean_exp_paths(path) >= at).any(axis=-1)
                logs[...] = path[..., -1, :]

    def judge(self) -> Findings:
        """The verdicts."""
        candidate, control = self._arms
        is_open = ~self._harm_hit & (candidate > 0) & (control > 0)
        harm = self._harm_hit & (candidate > 0) & (control > 0)
        safe = is_open & self._safe_hit
        none, units = np.zeros_like(harm), candidate + control
        return Findings(harm, none, safe, is_open & ~safe, units, units, none, candidate)

    def clear(self, chosen: Bools) -> None:
        """Start afresh in the chosen cells."""
        for logs in (self._harm, self._safe):
            logs[chosen] = 0.0
        for flag in (self._harm_hit, self._safe_hit):
            flag[chosen] = False
        for array in self._arms:
            array[chosen] = 0


class RatioCells:
    """F7: did sessions go where they should? Its harm is a sample-ratio mismatch."""

    def __init__(self, gate: Gate, shape: tuple[int, int]) -> None:
        self._gate = gate
        self._logs = np.zeros((*shape, len(SRM_TILTS)))
        self._hit = np.zeros(shape, dtype=np.bool_)
        self._units = np.zeros(shape, dtype=np.int64)

    def feed(self, candidates: Ints, sessions: Ints, share: Floats, is_live: Bools) -> None:
        """Add the arrivals of one tick [rollouts, slices]; over all slices they are added one by one."""
        hits, units = candidates * is_live, sessions * is_live
        added = split_logs(hits.astype(np.float64), units.astype(np.float64), share, SRM_TILTS)
        added *= is_live[..., None]
        if self._logs.shape[1] == added.shape[1]:
            self._logs += added
            self._hit |= log_mean_exp_paths(self._logs) >= self._gate.harm_at
            self._units += units
            return
        for place in range(added.shape[1]):
            self._logs[:, 0] += added[:, place]
            self._hit[:, 0] |= log_mean_exp_paths(self._logs[:, 0]) >= self._gate.harm_at
            self._units[:, 0] += units[:, place]

    def judge(self) -> Findings:
        """The verdicts; a mismatch is in `harm`."""
        seen = self._units > 0
        none = np.zeros_like(self._hit)
        return Findings(self._hit & seen, none, none, seen & ~self._hit, self._units, self._units, none)
