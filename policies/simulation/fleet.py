"""The steps of `decide`, walked for all rollouts together; each method names the step that it is.

Two things of the world are taken as given: an operator approves as soon as he may (or never), and every
window of Evidently is clear. Nobody resumes what was paused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sentei.policies.evidence.base import Bools, Floats, Ints
from sentei.policies.simulation.cells import (
    ArmCells,
    Audits,
    BettingCells,
    CountCells,
    Findings,
    RatioCells,
    TwoArms,
)
from sentei.policies.simulation.plan import Gate, Plan, any_of, is_frozen, used_rungs
from sentei.policies.simulation.world import Batch

RUNNING, PAUSED, PROMOTED, ROLLED_BACK = range(4)
NOBODY, BREAKER, NO_DATA, STAGE_MAX = -1, -2, -3, -4  # who acted, where it was no guardrail

Cells = BettingCells | TwoArms | CountCells | ArmCells | RatioCells


@dataclass(frozen=True, slots=True)
class Fall:
    """One protective act in some rollouts: who, where, and whether all traffic went back."""

    rows: Ints
    by: int  # number of the guardrail, or one of the names above
    place: Ints  # slice of each row; -1 for all of them
    is_watch: Bools


class Fleet:
    """Many rollouts of one policy; `tick` takes them one decision further."""

    def __init__(self, plan: Plan, num_rollouts: int, max_units: int, *, approves: bool = True) -> None:
        self.plan, self._approves = plan, approves
        num_slices = len(plan.slice_ids)
        self.phase = np.zeros(num_rollouts, dtype=np.int64)
        self.stage = np.zeros(num_rollouts, dtype=np.int64)
        self.entered_s = np.zeros(num_rollouts)
        self.is_approved = np.zeros(num_rollouts, dtype=np.bool_)
        self.ceiling = np.full((num_rollouts, num_slices), plan.num_rungs - 1)
        self.is_dense = np.zeros((num_rollouts, num_slices), dtype=np.bool_)
        self.served = np.zeros((num_rollouts, num_slices), dtype=np.int64)
        self.news_s = 0.0
        self.falls: list[Fall] = []
        self._rows, self._cols = (np.asarray(axis) for axis in np.ogrid[:num_rollouts, :num_slices])
        self._cells = [self._start(gate, max_units) for gate in (*plan.gates, *plan.benefits)]
        self._window: list[tuple[float, Ints, Ints]] = []  # of the breaker: when, requests, failures

    def _start(self, gate: Gate, max_units: int) -> Cells:
        num_rollouts, num_slices = self.is_dense.shape
        shape = (num_rollouts, 1 if gate.is_over_all else num_slices)
        if gate.is_audited:
            kind = BettingCells if self.plan.is_advice else TwoArms
            return kind(gate, (*shape, self.plan.num_rungs), self.plan.missing_limit)
        if gate.kind == "count":
            return CountCells(gate, shape, max_units)
        return ArmCells(gate, shape) if gate.kind == "arms" else RatioCells(gate, shape)

    @property
    def is_live(self) -> Bools:
        """The slices that are routed, [rollouts, slices]."""
        return np.asarray(~self.is_dense & (self.phase != ROLLED_BACK)[:, None])

    @property
    def rung(self) -> Ints:
        """The rung of each slice; of one that went dense, the rung it had."""
        return used_rungs(self.plan, self.stage, self.ceiling)

    def shares(self) -> tuple[Floats, Floats, Floats]:
        """The candidate's share, and how likely audits of either arm are, [rollouts, slices] each."""
        plan, wide = self.plan, np.ones(self.is_dense.shape)
        share = plan.share * (not plan.is_advice)
        by_stage = (share, plan.audit, plan.audit_sparse)
        return tuple(values[self.stage][:, None] * wide for values in by_stage)  # type: ignore[return-value]

    def tick(self, batch: Batch, now_s: float) -> None:
        """One decision in every rollout."""
        self.falls = []
        is_live = self.is_live
        if batch.sessions.sum():
            self._observe(batch, is_live, now_s)
            self.news_s = now_s
        findings = [self._judge(gate, cells, now_s) for gate, cells in self._all()]
        gains = [self._judge(gate, cells, now_s) for gate, cells in self._gains()]
        rung = self.rung
        is_open = self.phase != ROLLED_BACK  # not ended in this tick
        is_open = self._check_breaker(batch, is_live, is_open, now_s)
        is_held, is_open = self._check_harm(findings, is_open)
        is_held, is_open = self._check_srm(findings, is_held, is_open)
        is_held, is_open = self._check_data(is_held, is_open, now_s)
        is_held, is_open = self._check_hold(findings, is_held, is_open, now_s)
        is_held |= self._find_unsafe(findings, now_s)
        is_held |= self._find_useless(gains, ~self.is_dense & (self.rung == rung), is_open, now_s)
        is_held = self._check_approval(is_held, is_open)
        if not is_frozen(self.plan, now_s):
            self._grow(is_open & ~is_held, now_s)

    def _all(self) -> list[tuple[Gate, Cells]]:
        return list(zip(self.plan.gates, self._cells, strict=False))

    def _gains(self) -> list[tuple[Gate, Cells]]:
        return list(zip(self.plan.benefits, self._cells[len(self.plan.gates) :], strict=True))

    def _where(self, gate: Gate) -> tuple[Ints, ...]:
        if gate.is_audited:
            return (self._rows, self._cols, self.rung)
        return (self._rows, self._cols[:, :1] if gate.is_over_all else self._cols)

    # observe: new units become evidence
    def _observe(self, batch: Batch, is_live: Bools, now_s: float) -> None:
        for gate, cells in zip((*self.plan.gates, *self.plan.benefits), self._cells, strict=True):
            if isinstance(cells, RatioCells):
                live = np.broadcast_to((self.phase != ROLLED_BACK)[:, None], is_live.shape)
                share, hits = np.where(is_live, batch.share, 0.0), np.where(is_live, batch.candidates, 0)
                cells.feed(hits, np.broadcast_to(batch.sessions, is_live.shape), share, live)
            elif isinstance(cells, BettingCells | TwoArms):
                self._feed_audits(gate, cells, batch, is_live, self._part(now_s))
            elif isinstance(cells, CountCells):
                hits = batch.hits[(gate.value, gate.over_s)]
                is_unit = (np.arange(hits.shape[-1]) < batch.candidates[..., None]) & is_live[..., None]
                if gate.is_over_all:
                    hits, is_unit = (a.reshape(a.shape[0], 1, -1) for a in (hits, is_unit))
                if hits.shape[-1]:
                    cells.feed(self._where(gate), hits, is_unit)
            else:
                self._feed_arms(gate, cells, batch, is_live)
        if any(gate.family == "quality" for gate in self.plan.gates):
            self.served += _scored_sparse(batch) * is_live

    def _part(self, now_s: float) -> int:
        return int(now_s // self.plan.missing_part_s)

    def _feed_audits(
        self, gate: Gate, cells: BettingCells | TwoArms, batch: Batch, is_live: Bools, part: int
    ) -> None:
        if gate.value not in batch.values:
            return
        values = batch.values[gate.value]
        if gate.floor_cap is not None:
            floor = np.minimum(batch.floors[gate.value], gate.floor_cap)
            values = (values - floor + gate.floor_cap) / (1 + gate.floor_cap)
        order = np.arange(values.shape[-1])
        is_unit = (order < batch.audits[..., None]) & is_live[..., None]
        if isinstance(cells, BettingCells):
            cells.feed(self._where(gate), values, is_unit, batch.missing, part)
            return
        is_sparse = order < batch.sparse_audits[..., None]
        cells.feed(self._where(gate), values, is_unit, Audits(is_sparse, batch.missing, part))

    def _feed_arms(self, gate: Gate, cells: ArmCells, batch: Batch, is_live: Bools) -> None:
        order, total = batch.events[gate.id]
        is_fed = is_live & (self.plan.share[self.stage] > 0)[:, None]
        is_event = (np.arange(order.shape[-1]) < total[..., None]) & is_fed[..., None]
        arms = (batch.candidates * is_fed, (batch.sessions - batch.candidates) * is_fed)
        share = np.broadcast_to(self.plan.share[self.stage][:, None], is_live.shape)
        if gate.is_over_all:
            order, is_event = (a.reshape(a.shape[0], 1, -1) for a in (order, is_event))
            arms = (arms[0].sum(axis=1, keepdims=True), arms[1].sum(axis=1, keepdims=True))
            share = share[:, :1]
        cells.feed(order, is_event, share, arms)

    def _judge(self, gate: Gate, cells: Cells, now_s: float) -> Findings:
        if isinstance(cells, TwoArms):
            wants_proof = self.plan.proves[self.stage] if gate.kind == "benefit" else self._wants_proof(gate)
            by_served = (self.plan.share[self.stage] > 0) & wants_proof
            return cells.judge(self._where(gate), by_served[:, None], self._part(now_s))
        if isinstance(cells, BettingCells):
            return cells.judge(self._where(gate), self._part(now_s))
        return cells.judge(self._where(gate)) if isinstance(cells, CountCells) else cells.judge()

    def _wants_proof(self, gate: Gate) -> Bools:
        """In which rollouts the present stage asks for proof of safety."""
        return np.array([need == "all_safe" for need in gate.needs])[self.stage]

    # step 2
    def _check_breaker(self, batch: Batch, is_live: Bools, is_open: Bools, now_s: float) -> Bools:
        plan, failed = self.plan, batch.hits.get(("serve.failed", None))
        requests = (batch.candidates * is_live).sum(axis=1)
        failures = np.zeros_like(requests)
        if failed is not None:
            is_unit = np.arange(failed.shape[-1]) < batch.candidates[..., None]
            failures = (failed & is_unit & is_live[..., None]).sum(axis=(1, 2))
        self._window = [item for item in self._window if item[0] > now_s - plan.breaker_window_s]
        self._window.append((now_s, requests, failures))
        total = np.sum([item[1] for item in self._window], axis=0)
        bad = np.sum([item[2] for item in self._window], axis=0)
        is_routed = plan.share[self.stage] > 0
        trips = is_open & is_routed & (total >= plan.breaker_requests) & (total > 0)
        trips &= bad / np.maximum(total, 1) >= plan.breaker_share
        self._roll_back(trips, BREAKER)
        return np.asarray(is_open & ~trips)

    # step 3
    def _check_harm(self, findings: list[Findings], is_open: Bools) -> tuple[Bools, Bools]:
        shape = self.is_dense.shape
        ended, by_slice, worst_dense = np.zeros(shape[0], dtype=np.bool_), [], []
        for number, (gate, found) in enumerate(zip(self.plan.gates, findings, strict=True)):
            if gate.kind == "ratio":
                continue
            active = np.ones((shape[0], 1), dtype=np.bool_) if gate.is_over_all else ~self.is_dense
            harm = found.harm & active & is_open[:, None]
            if gate.action == "rollback":
                rows = harm.any(axis=1) & ~ended
                place = np.where(gate.is_over_all, -1, harm.argmax(axis=1))
                self._roll_back(rows, number, place, np.asarray((found.by_watch & harm).any(axis=1)))
                ended |= rows
            else:
                by_slice.append((number, harm, found.by_watch))
                worst_dense.append(harm if gate.action == "rollback_slice" else np.zeros_like(harm))
        falls = any_of([harm for _, harm, _ in by_slice], shape) & ~ended[:, None]
        if falls.any():
            self._fall_back(falls, any_of(worst_dense, shape), by_slice)
        return np.asarray(falls.any(axis=1)), np.asarray(is_open & (self.phase != ROLLED_BACK))

    def _fall_back(self, falls: Bools, dense: Bools, by_slice: list[tuple[int, Bools, Bools]]) -> None:
        for number, harm, watch in by_slice:
            for place in range(falls.shape[1]):
                rows = np.flatnonzero(harm[:, place] & falls[:, place])
                if len(rows):
                    self.falls.append(Fall(rows, number, np.full(len(rows), place), watch[rows, place]))
        rung = self.rung
        to_dense = falls & (dense | (rung == 0))
        down = falls & ~to_dense
        self.ceiling = np.where(down, rung - 1, self.ceiling)
        self.served = np.where(down, 0, self.served)
        self.is_dense |= to_dense
        self._clear_operational(falls)
        self._end(np.asarray(self.is_dense.all(axis=1) & falls.any(axis=1)))

    # step 4
    def _check_srm(self, findings: list[Findings], is_held: Bools, is_open: Bools) -> tuple[Bools, Bools]:
        for number, (gate, found) in enumerate(zip(self.plan.gates, findings, strict=True)):
            if gate.kind != "ratio":
                continue
            active = np.ones_like(found.harm) if gate.is_over_all else ~self.is_dense
            rows = (found.harm & active).any(axis=1) & is_open
            place = np.where(gate.is_over_all, -1, (found.harm & active).argmax(axis=1))
            if gate.action == "rollback":
                self._roll_back(rows, number, place)
                is_open = is_open & ~rows
                continue
            paused = rows & (self.phase == RUNNING)
            self.phase[paused] = PAUSED
            self._note(paused, number, place)
            is_held = is_held | rows
        return is_held, is_open

    # step 5
    def _check_data(self, is_held: Bools, is_open: Bools, now_s: float) -> tuple[Bools, Bools]:
        silent_s = now_s - self.news_s
        for limit, action in self.plan.silence:
            if silent_s > limit:
                if action == "rollback":
                    self._roll_back(is_open, NO_DATA)
                    return is_held, np.zeros_like(is_open)
                return np.ones_like(is_held), is_open
        return is_held | (silent_s > self.plan.max_age_s), is_open

    # step 7
    def _check_hold(
        self, findings: list[Findings], is_held: Bools, is_open: Bools, now_s: float
    ) -> tuple[Bools, Bools]:
        plan, elapsed = self.plan, now_s - self.entered_s
        is_running = is_open & (self.phase == RUNNING)
        is_held = is_held | ~is_running
        is_late = is_running & (elapsed > plan.max_s[self.stage])
        if plan.rolls_back_on_max:
            self._roll_back(is_late, STAGE_MAX)
            is_open = is_open & ~is_late
        else:
            self.is_approved |= is_late & self._approves
            is_held |= is_late & ~self.is_approved
        is_held |= elapsed < plan.dwell_s[self.stage]
        is_routed = plan.share[self.stage] > 0
        units = self._fewest_units(findings, is_routed)
        too_few = (units < plan.min_units) & ~self.is_dense
        if not plan.is_advice:
            too_few |= (self.served < plan.min_served) & is_routed[:, None] & ~self.is_dense
        return is_held | too_few.any(axis=1), is_open

    def _fewest_units(self, findings: list[Findings], is_routed: Bools) -> Ints:
        big, shape = np.iinfo(np.int64).max, self.is_dense.shape
        quality, others = np.full(shape, big), np.full(shape, big)
        for gate, found in zip(self.plan.gates, findings, strict=True):
            if gate.is_over_all:
                continue
            if gate.family == "quality":
                units = np.where(self._wants_proof(gate)[:, None], found.proof, found.units)
                quality = np.minimum(quality, units)
            else:
                is_asked = (is_routed & (not self.plan.is_advice))[:, None]
                others = np.where(is_asked, np.minimum(others, found.units), others)
        units = np.where(quality < big, quality, others)
        return np.asarray(np.where(units < big, units, 0))

    # step 8
    def _find_unsafe(self, findings: list[Findings], now_s: float) -> Bools:
        is_stale = now_s - self.news_s > self.plan.max_age_s
        is_routed = (self.plan.share[self.stage] > 0) & (not self.plan.is_advice)
        found_unsafe = np.zeros(self.phase.shape, dtype=np.bool_)
        for gate, found in zip(self.plan.gates, findings, strict=True):
            passes = found.undecided & ~self._wants_proof(gate)[:, None]
            if found.candidates is not None and gate.least:
                passes &= found.candidates >= np.array(gate.least)[self.stage][:, None]
            can = found.safe | passes
            if is_stale:
                can = np.zeros_like(can)
            active = np.ones_like(can) if gate.is_over_all else ~self.is_dense
            is_asked = is_routed if gate.family != "quality" else np.ones_like(is_routed)
            found_unsafe |= (~can & active).any(axis=1) & is_asked
        return found_unsafe

    # step 9
    def _find_useless(self, gains: list[Findings], judged: Bools, is_open: Bools, now_s: float) -> Bools:
        """`judged` [rollouts, slices] are those that are still at the rung of these findings."""
        is_stale = now_s - self.news_s > self.plan.max_age_s
        is_asked = self.plan.asks_gain[self.stage] & (self.phase != PROMOTED)
        unproven, absent = (np.zeros(self.phase.shape, dtype=np.bool_) for _ in range(2))
        for gate, found in zip(self.plan.benefits, gains, strict=True):
            absent |= (found.harm & judged).any(axis=1) & is_asked
            if gate.needs[0] == "proven":
                is_proven = found.safe & (not is_stale)
                unproven |= (~is_proven & judged).any(axis=1) & is_asked
        self.phase[absent & is_open & (self.phase == RUNNING)] = PAUSED
        return np.asarray(unproven | absent)

    # step 10
    def _check_approval(self, is_held: Bools, is_open: Bools) -> Bools:
        code = self.plan.approval[self.stage]
        if self._approves:
            is_offered = is_open & (self.phase <= PAUSED) & (code > 0)  # running or paused
            self.is_approved |= is_offered & (~is_held | (code == 2))
        return is_held | ((code > 0) & ~self.is_approved)

    # step 12
    def _grow(self, grows: Bools, now_s: float) -> None:
        is_last = self.stage + 1 == len(self.plan.stage_ids)
        self.phase[grows & is_last] = PROMOTED
        self._start_proof(grows)
        climbs = grows & ~is_last
        if not climbs.any():
            return
        self.stage[climbs] += 1
        self.entered_s[climbs] = now_s
        self.is_approved[climbs] = False
        self._clear_operational(np.broadcast_to(climbs[:, None], self.is_dense.shape), is_all=True)

    def _start_proof(self, chosen: Bools) -> None:
        """F15: a new phase proves its own safety."""
        self.served[chosen] = 0
        places = np.broadcast_to(chosen[:, None], self.is_dense.shape)
        for _, cells in self._all():
            if isinstance(cells, TwoArms | BettingCells):
                cells.start_proof(places)
        for _, cells in self._gains():
            if isinstance(cells, TwoArms):
                cells.start_proof(places, is_gain=True)

    def _clear_operational(self, chosen: Bools, *, is_all: bool = False) -> None:
        """F15: operational evidence starts afresh; that over all slices only with a new stage."""
        for gate, cells in self._all():
            if isinstance(cells, CountCells | ArmCells) and (is_all or not gate.is_over_all):
                cells.clear(chosen[:, :1] if gate.is_over_all else chosen)

    def _roll_back(self, rows: Bools, by: int, place: Ints | None = None, watch: Bools | None = None) -> None:
        self._note(rows, by, place, watch)
        self._end(rows)

    def _end(self, rows: Bools) -> None:
        self.phase[rows] = ROLLED_BACK

    def _note(self, rows: Bools, by: int, place: Ints | None = None, watch: Bools | None = None) -> None:
        chosen = np.flatnonzero(rows)
        if len(chosen):
            places = np.full(len(chosen), -1) if place is None else place[chosen]
            by_watch = np.zeros(len(chosen), dtype=np.bool_) if watch is None else watch[chosen]
            self.falls.append(Fall(chosen, by, places, by_watch))


def _scored_sparse(batch: Batch) -> Ints:
    if batch.missing is None:
        return batch.sparse_audits
    is_sparse = np.arange(batch.missing.shape[-1]) < batch.sparse_audits[..., None]
    return np.asarray((is_sparse & ~batch.missing).sum(axis=-1))
