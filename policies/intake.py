"""Observations to evidence: clean a value, scale it to [0, 1], feed it to its guardrail, slice and arm.

Harm of quality belongs to (rung, slice) and is collected from shadow on; safety is proven by the units of
the present phase alone, and operational values count from the moment a stage began (F15). A gain is proven
by all units of a rung in a slice, and where sparse serves by what it served in this phase (F17). Units that
sparse served are a second arm of quality, with evidence of its own (F16). A value that is not a number, or
out of its metric's range, is a missing audit: the worst case for promotion, left out for rollback (F12). It
is never read as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sentei.policies.evidence import (
    PAIRED_CUT,
    RATIO_TILTS,
    SRM_TILTS,
    BetaBinomial,
    Betting,
    Detector,
    Interval,
    Split,
    paired_bound,
    paired_excess,
)
from sentei.policies.schema.budget import harm_alpha, no_gain_alpha, try_alpha
from sentei.policies.schema.metrics import METRICS, Metric
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Benefit, Guardrail, Stage
from sentei.policies.signals import Observation, SliceLengths, SliceTraffic
from sentei.policies.state import ALL, ALL_SLICES, SERVED, Cell, CellKey, Recent, RolloutState, SliceState

RATIO_CAP = 2.0  # of audit.compute_ratio: twice dense is as bad as it gets
GAIN_CUT = PAIRED_CUT  # both times are of one request, so ratios vary little
_ROUNDING = 1e-6  # how far outside its range a value may lie by rounding alone

RECENT_PARTS = 6  # of the window in which missing audits count

Cells = dict[CellKey, Cell]


def fold_observations(
    policy: Policy, state: RolloutState, observations: Iterable[Observation]
) -> RolloutState:
    """All units above the state's cursor, fed to their cells; the cursor itself is moved by the caller."""
    cells: Cells = {cell.key: cell for cell in state.cells}
    slices = {item.slice_id: item for item in state.slices}
    by_value = policy.gates_by_value
    first_quality = next((name for name in by_value if METRICS[name].family == "quality"), None)
    for item in observations:
        if item.seq <= state.cursor or item.slice_id not in slices:
            continue
        if item.share is None:  # a record of before shares were read
            item = replace(item, share=policy.stage(state.stage_id).share)
        for gate in by_value.get(item.value_name, ()):
            for key in _keys(policy, state, gate, item):
                cell = cells.get(key) or new_cell(
                    policy, gate, key[1], key[2], arm=key[3], try_number=state.try_number
                )
                cells[key] = _feed(policy, gate, cell, item, is_present=item.at_s >= state.since_s)
        if item.value_name == first_quality and not item.missing and item.at_s >= state.since_s:
            slices[item.slice_id] = _count(policy, state, slices[item.slice_id], item)
    return replace(state, slices=tuple(slices.values()), cells=tuple(cells[key] for key in sorted(cells)))


def fold_lengths(state: RolloutState, lengths: Iterable[SliceLengths]) -> RolloutState:
    """Served requests of either half of each slice: how much of the proof must come from the upper one."""
    found = {item.slice_id: item for item in lengths}
    slices = tuple(
        replace(
            item,
            requests=item.requests + found[item.slice_id].requests,
            upper_requests=item.upper_requests + found[item.slice_id].upper,
        )
        if item.slice_id in found
        else item
        for item in state.slices
    )
    return replace(state, slices=slices)


def deciding_arm(policy: Policy, stage: Stage, need: str) -> str:
    """Whose units must be safe: those that sparse served, wherever it serves and proof is asked (F16)."""
    is_served = stage.share > 0 and policy.spec.mode == "enforce" and need == "all_safe"
    return SERVED if is_served else ALL


def start_phase(policy: Policy, state: RolloutState, *, is_stage: bool = True) -> RolloutState:
    """The state as a phase begins: quality is proven afresh, its harm goes on (F15).

    A new stage also starts the evidence of what depends on the share, and its counts, afresh.
    """
    gates: dict[str, Guardrail | Benefit] = {item.id: item for item in policy.spec.guardrails.items}
    gates |= {item.id: item for item in policy.spec.benefit}
    cells: list[Cell] = []
    for cell in state.cells:
        gate = gates[cell.guardrail_id]
        family = METRICS[gate.value].family
        if family == "assignment" or (family == "benefit" and cell.arm == ALL):
            cells.append(cell)
        elif family in ("quality", "benefit"):
            fresh = new_cell(
                policy, gate, cell.slice_id, cell.rung_id, arm=cell.arm, try_number=state.try_number
            )
            cells.append(replace(cell, safe=fresh.safe, interval=fresh.interval))
        elif not is_stage:
            cells.append(cell)
    slices = tuple(
        replace(item, served_units=0, upper_units=0, requests=0, upper_requests=0) for item in state.slices
    )
    return replace(state, cells=tuple(cells), slices=slices)


def _count(policy: Policy, state: RolloutState, own: SliceState, item: Observation) -> SliceState:
    """One more unit of this phase: was it served by sparse, and is it one of the proof's upper half?"""
    stage = policy.stage(state.stage_id)
    is_served = item.variant == "sparse"
    is_proof = is_served or deciding_arm(policy, stage, policy.need(stage)) == ALL
    return replace(
        own,
        served_units=own.served_units + int(is_served),
        upper_units=own.upper_units + int(is_proof and item.half == "upper"),
    )


def fold_traffic(policy: Policy, state: RolloutState, traffic: Iterable[SliceTraffic]) -> RolloutState:
    """New sessions and where they went, fed to the sample-ratio test; it outlives stages."""
    cells: Cells = {cell.key: cell for cell in state.cells}
    routed = {item.id for item in policy.routed_slices}
    gates = [gate for gate in policy.spec.guardrails.items if gate.metric.family == "assignment"]
    for item in traffic:
        for gate in gates:
            if item.slice_id not in routed or item.total <= 0:
                continue
            slice_id = ALL_SLICES if gate.per == "all" else item.slice_id
            cell = cells.get((gate.id, slice_id, "", ALL)) or new_cell(policy, gate, slice_id, "")
            assert isinstance(cell.harm, Split)
            harm = cell.harm.update(item.candidate, item.total, item.share)
            cells[cell.key] = replace(
                cell,
                harm=harm,
                candidate_units=cell.candidate_units + item.candidate,
                control_units=cell.control_units + item.total - item.candidate,
            )
    return replace(state, cells=tuple(cells[key] for key in sorted(cells)))


def new_cell(
    policy: Policy,
    gate: Guardrail | Benefit,
    slice_id: str,
    rung_id: str,
    *,
    arm: str = ALL,
    try_number: int = 1,
) -> Cell:
    """A cell without units; its bets are tuned to the error it may make."""
    bound = scaled_bound(policy, gate)
    if isinstance(gate, Benefit):
        lost, proof_alpha = no_gain_alpha(policy, try_number), try_alpha(policy, try_number)
        absent = Betting(bound, "harm", lost, GAIN_CUT)
        proof = Betting(bound, "safe", proof_alpha, GAIN_CUT)
        return Cell(gate.id, slice_id, rung_id, absent, proof, interval=Interval(), arm=arm)
    if gate.test == "split_ramp":
        return Cell(gate.id, slice_id, rung_id, Split.start(SRM_TILTS))
    if gate.test == "event_split":
        safe = Split.start(tuple(-tilt for tilt in RATIO_TILTS))
        return Cell(gate.id, slice_id, rung_id, Split.start(RATIO_TILTS), safe)
    if gate.test == "beta_binomial":
        harm, safe_count = BetaBinomial(bound, "harm"), BetaBinomial(bound, "safe")
        return Cell(gate.id, slice_id, rung_id, harm, safe_count, Detector(bound), Interval())
    cut = PAIRED_CUT if gate.test == "betting_paired" else 0.5
    alpha, total = harm_alpha(policy, gate, try_number), try_alpha(policy, try_number)
    return Cell(
        gate.id,
        slice_id,
        rung_id,
        Betting(bound, "harm", alpha, cut),
        Betting(bound, "safe", total, cut),
        Detector(bound, cut),
        Interval(),
        arm=arm,
    )


def restart_alarm(policy: Policy, state: RolloutState) -> tuple[Cell, ...]:
    """The cells after an operator has resumed what an alarm paused: the alarm starts afresh.

    Evidence that a gain is there goes on: a second start of a proof would spend its alpha again.
    """
    benefits = {item.id: item for item in policy.spec.benefit}
    cells: list[Cell] = []
    for cell in state.cells:
        if cell.guardrail_id != state.by:
            cells.append(cell)
        elif (gate := benefits.get(cell.guardrail_id)) is not None:
            fresh = new_cell(policy, gate, cell.slice_id, cell.rung_id, try_number=state.try_number)
            cells.append(replace(cell, harm=fresh.harm))
    return tuple(cells)


def scaled_bound(policy: Policy, gate: Guardrail | Benefit) -> float:
    """The bound on the scale of the evidence, in (0, 1); a ratio stays one, an assignment has none."""
    scale = _scale(policy, gate)
    if isinstance(gate, Benefit):
        return gate.want.max / scale
    bound = gate.bound
    if bound is None:
        return 0.0
    if bound.excess_over_floor is not None:
        return paired_bound(bound.excess_over_floor / scale, _floor_cap(gate, scale))
    return (bound.max or 0.0) / scale if bound.ratio is None else bound.ratio


def own_mean(policy: Policy, gate: Guardrail | Benefit, cell: Cell | None) -> float | None:
    """The mean in the metric's own unit (for a paired gate: the mean excess over the floor)."""
    if cell is None:
        return None
    mean = cell.harm.mean if cell.interval is None else cell.interval.mean
    if mean is None or (isinstance(gate, Guardrail) and (gate.bound is None or gate.test == "event_split")):
        return mean
    return _to_own(policy, gate, mean)


def own_move(policy: Policy, gate: Guardrail, cell: Cell) -> float | None:
    """The mean of the units that raised the watch, in the metric's own unit."""
    mean = cell.watch.peak_mean if cell.watch else None
    return None if mean is None else _to_own(policy, gate, mean)


def own_range(policy: Policy, gate: Guardrail | Benefit, cell: Cell | None) -> tuple[float, float] | None:
    """Where the mean lies with 95 % at all times, in the metric's own unit; None where nothing says so."""
    if cell is None or cell.interval is None or not cell.interval.units:
        return None
    return _to_own(policy, gate, cell.interval.low), _to_own(policy, gate, cell.interval.high)


def _to_own(policy: Policy, gate: Guardrail | Benefit, mean: float) -> float:
    scale = _scale(policy, gate)
    if isinstance(gate, Guardrail) and gate.bound is not None and gate.bound.excess_over_floor is not None:
        cap = _floor_cap(gate, scale)
        return (mean * (1 + cap) - cap) * scale
    return mean * scale


def _floor_cap(gate: Guardrail, scale: float) -> float:
    assert gate.bound is not None
    return 1.0 if gate.bound.floor_cap is None else gate.bound.floor_cap / scale


def _scale(policy: Policy, gate: Guardrail | Benefit) -> float:
    if isinstance(gate, Benefit):
        return RATIO_CAP
    if gate.value == "audit.kl":
        return policy.spec.audit.values.kl.cap
    return 1.0


def _keys(
    policy: Policy, state: RolloutState, gate: Guardrail | Benefit, item: Observation
) -> Iterator[CellKey]:
    """The cells that this unit belongs to; none if it says nothing to this gate now."""
    if isinstance(gate, Benefit) or gate.metric.family == "quality":
        if item.rung_id in policy.rung_ids:
            yield (gate.id, item.slice_id, item.rung_id, ALL)
            if item.variant == "sparse" and policy.spec.mode == "enforce":
                yield (gate.id, item.slice_id, item.rung_id, SERVED)
        return
    share = policy.stage(state.stage_id).share
    is_old = item.at_s < state.stage_entered_s
    if is_old or share == 0 or item.share == 0 or state.slice_state(item.slice_id).is_dense:
        return
    if item.variant == "sparse" or gate.test == "event_split":
        yield (gate.id, ALL_SLICES if gate.per == "all" else item.slice_id, "", ALL)


def _feed(
    policy: Policy, gate: Guardrail | Benefit, cell: Cell, item: Observation, *, is_present: bool
) -> Cell:
    """One unit more; only a unit of the present phase says anything of safety."""
    is_present |= isinstance(gate, Benefit) and cell.arm == ALL
    value = None if item.missing else _clean(policy, gate, item)
    if isinstance(gate, Guardrail) and gate.test == "event_split":
        assert item.share is not None  # filled in by fold_observations
        return _feed_arms(gate, cell, value, item.variant == "sparse", item.share)
    if isinstance(gate, Guardrail) and gate.metric.family == "quality":
        cell = replace(cell, recent=_note_recent(policy, cell.recent, item, is_missing=value is None))
    harm, safe, watch = cell.harm, cell.safe, cell.watch
    assert not isinstance(harm, Split)
    assert not isinstance(safe, Split)
    proof = safe if is_present else None
    if value is None:
        worst = safe if proof is None else proof.update(1.0)
        return replace(cell, safe=worst, missing=cell.missing + 1)
    return replace(
        cell,
        harm=harm.update(value),
        safe=safe if proof is None else proof.update(value),
        watch=None if watch is None else watch.update(value, item.at_s),
        interval=cell.interval.update(value) if cell.interval is not None and is_present else cell.interval,
    )


def recent_number(policy: Policy, at_s: float) -> int:
    """Which part of the window of missing audits a moment lies in, counted since the epoch."""
    return math.floor(at_s / (policy.spec.audit.missing.window / RECENT_PARTS))


def _note_recent(
    policy: Policy, recent: tuple[Recent, ...], item: Observation, *, is_missing: bool
) -> tuple[Recent, ...]:
    """One more chosen audit in its part of the window; parts that are too old to count go."""
    number = recent_number(policy, item.at_s)
    parts = {part.number: part for part in recent}
    part = parts.get(number) or Recent(number)
    reasons = dict(part.reasons)
    if is_missing:
        word = item.reason or ("not scored" if item.missing else "no number")
        reasons[word] = reasons.get(word, 0) + 1
    parts[number] = Recent(number, part.chosen + 1, tuple(sorted(reasons.items())))
    return tuple(parts[key] for key in sorted(parts))[-RECENT_PARTS:]


def _feed_arms(gate: Guardrail, cell: Cell, value: float | None, is_candidate: bool, share: float) -> Cell:
    """One request of either arm: only events move the evidence (F6); any request shows its arm is seen."""
    assert gate.bound is not None
    assert gate.bound.ratio is not None
    assert isinstance(cell.harm, Split)
    assert isinstance(cell.safe, Split)
    harm, safe = cell.harm, cell.safe
    if value:
        weight = share * gate.bound.ratio
        probability = weight / (weight + 1 - share)
        harm = harm.update(int(is_candidate), 1, probability)
        safe = safe.update(int(is_candidate), 1, probability)
    return replace(
        cell,
        harm=harm,
        safe=safe,
        missing=cell.missing + int(value is None),
        candidate_units=cell.candidate_units + int(is_candidate),
        control_units=cell.control_units + int(not is_candidate),
    )


def _clean(policy: Policy, gate: Guardrail | Benefit, item: Observation) -> float | None:
    """The unit's value in [0, 1]; None if it is no usable number."""
    metric: Metric = METRICS[gate.value]
    bound = gate.bound if isinstance(gate, Guardrail) else None
    if bound is not None and bound.over is not None:
        return None if math.isnan(item.value) or item.value < 0 else float(item.value > bound.over * 1000)
    if metric.is_event:
        return item.value if item.value in (0.0, 1.0) else None
    scale = _scale(policy, gate)
    value = _to_unit(item.value, scale, metric)
    if value is None or bound is None or bound.excess_over_floor is None:
        return value
    assert isinstance(gate, Guardrail)
    floor = None if item.floor is None else _to_unit(item.floor, scale, metric)
    return None if floor is None else paired_excess(value, floor, _floor_cap(gate, scale))


def _to_unit(value: float, scale: float, metric: Metric) -> float | None:
    if not math.isfinite(value) or value < -_ROUNDING:
        return None
    if metric.upper is not None and value > metric.upper + _ROUNDING:
        return None
    return min(max(value, 0.0) / scale, 1.0)
