"""Steps 7 to 12 of the decision: what stands between a stage and the next; `grow` is the last."""

from __future__ import annotations

import math
from dataclasses import replace

from sentei.policies.intake import start_phase
from sentei.policies.machine import Event, Phase, Wait, next_phase
from sentei.policies.schema.integrations.gate import GATE_ORDER
from sentei.policies.schema.metrics import METRICS
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Stage
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import Command, Verdict
from sentei.policies.state import SliceState
from sentei.policies.steps.tick import (
    Tick,
    active_slices,
    effective_rung,
    hold_for_good,
    is_paused,
    roll_back,
)

# In these safety, if not yet proven, is not in doubt; an approval is one over the stage's longest time.
SOUND_WAITS = (None, Wait.SIGNAL, Wait.TIME, Wait.EVIDENCE, Wait.APPROVAL)
MIN_UPPER = 20  # below so many requests of the upper half nothing is asked of it


def check_hold(tick: Tick) -> Tick:
    """Step 7: the longest and least time, the least number of units; paused or promoted stays as it is."""
    policy, state = tick.policy, tick.state
    stage = policy.stage(state.stage_id)
    if state.phase == Phase.PROMOTED:
        return tick.with_hold(Wait.TIME, "promoted; the watch goes on")
    if is_paused(state):
        return tick.with_hold(Wait.ORDER, state.reason)
    for report in tick.reports:  # what explains all that is lacking comes first
        if report.verdict is Verdict.ERROR:
            tick = tick.with_hold(Wait.EVIDENCE, f"{report.id} in {report.slice_id}: {report.reason}")
    elapsed = tick.now_s - state.stage_entered_s
    if stage.max is not None and elapsed > stage.max:
        reason = f"stage {stage.id} took longer than {format_duration(stage.max)}"
        if policy.spec.advance.on_max == "rollback":
            return roll_back(tick, "stage_max", reason)
        tick = _take_approval(tick, stage)
        if not tick.state.is_approved:
            tick = tick.with_hold(Wait.APPROVAL, f"{reason}; it goes on only when approved")
    dwell = max(stage.hold_min, stage.bake or 0.0)
    if elapsed <= 0:
        # A tick that is done again after a crash must not find the next stage open in the same moment.
        tick = tick.with_hold(Wait.TIME, f"stage {stage.id} was entered just now")
    if elapsed < dwell:
        left = format_duration(round(dwell - elapsed, 3))
        tick = tick.with_hold(Wait.TIME, f"stage {stage.id} holds for {left} more")
    return _check_units(tick, stage)


def _check_units(tick: Tick, stage: Stage) -> Tick:
    policy, state, advance = tick.policy, tick.state, tick.policy.spec.advance
    for slice_id in active_slices(policy, state):
        units = _num_units(tick, slice_id)
        if units < advance.min_units:
            tick = tick.with_hold(Wait.TIME, f"{slice_id}: {units} of {advance.min_units} units")
        own = state.slice_state(slice_id)
        served, wanted = own.served_units, upper_units_wanted(tick.policy, own)
        if policy.need(stage) == "all_safe" and own.upper_units < wanted:
            share = f"{own.upper_requests / own.requests:.0%} of its requests"
            text = f"{own.upper_units} of {wanted} units of its longer prompts, {share}"
            tick = tick.with_hold(Wait.TIME, f"{slice_id}: {text}")
        if stage.share > 0 and policy.spec.mode == "enforce" and served < advance.min_served_units:
            text = f"{slice_id}: {served} of {advance.min_served_units} units served by sparse"
            tick = tick.with_hold(Wait.TIME, text)
    return tick


def upper_units_wanted(policy: Policy, own: SliceState) -> int:
    """How many units of a proof must come from the upper half: half of its share of the served requests.

    A session with many long requests gives few units, so its full share would be too much.
    """
    if own.upper_requests < MIN_UPPER:
        return 0
    return math.ceil(policy.spec.advance.min_units * own.upper_requests / own.requests / 2)


def _num_units(tick: Tick, slice_id: str) -> int:
    """The fewest units of any quality guardrail in this slice at its rung (of any, if none is of quality)."""
    own = [item for item in tick.reports if item.slice_id == slice_id and item.is_required]
    values = {item.id: item.value for item in tick.policy.spec.guardrails.items}
    quality = [item.units for item in own if METRICS[values[item.id]].family == "quality"]
    return min(quality or [item.units for item in own], default=0)


def check_safe(tick: Tick) -> Tick:
    """Step 8: every guardrail in every routed slice must say what this stage needs; unseen never does."""
    open_reports = [item for item in tick.reports if not item.can_advance]
    if open_reports:
        first, more = open_reports[0], len(open_reports) - 1
        place = f"{first.id} in {first.slice_id}"
        rest = f" (and {more} more)" if more else ""
        text = f"{place} is {first.verdict.value}: {first.reason}{rest}"
        tick = tick.with_hold(Wait.EVIDENCE, text)
    return tick


def check_benefit(tick: Tick) -> Tick:
    """Step 9: safe but useless is also a stop: no share grows before the gain is proven in every slice.

    Where it is proven absent the rollout is held, also while time, a signal or safety would still have to be
    waited for; not while dense, sparse, the assignment or the data are in doubt: then the times are, too.
    """
    policy, state = tick.policy, tick.state
    rungs = {slice_id: effective_rung(policy, state, slice_id) for slice_id in active_slices(policy, state)}
    # Of a slice that fell in this tick the verdict is of the rung before.
    open_gains = [g for g in tick.gains if not g.can_advance and rungs.get(g.slice_id) == g.rung_id]
    for report in open_gains:
        text = f"{report.id} in {report.slice_id} at {report.rung_id}: {report.reason}"
        is_sound = tick.waits_for in SOUND_WAITS and tick.outcome is None
        if report.verdict is Verdict.NO_GAIN and is_sound and state.phase == Phase.RUNNING:
            tick = hold_for_good(tick, report.id, text)
            return replace(tick, hold=text, waits_for=Wait.BENEFIT)
        more = f" (and {len(open_gains) - 1} more)" if len(open_gains) > 1 else ""
        tick = tick.with_hold(Wait.BENEFIT, f"{text}{more}")
    return tick


def check_approval(tick: Tick) -> Tick:
    """Step 10: people and gates come after the evidence; an approval that came too early is refused."""
    stage = tick.policy.stage(tick.state.stage_id)
    if stage.approval is not None and not tick.state.is_approved:
        if tick.hold is None or stage.approval.when == "any_time":
            tick = _take_approval(tick, stage)
        if not tick.state.is_approved:
            text = f"stage {stage.id} waits for the approval of {', '.join(stage.approval.names)}"
            tick = tick.with_hold(Wait.APPROVAL, text)
    for order in tick.approvals:
        detail = f"{order.kind} by {order.by}: {tick.hold or 'no approval is needed'}"
        tick = tick.with_action("refuse", detail)
    return replace(tick, approvals=())


def _take_approval(tick: Tick, stage: Stage) -> Tick:
    """Accept the first waiting order of somebody who may give it; others stay to be refused."""
    for order in tick.approvals:
        if not _may_approve(tick, stage, order):
            continue
        rest = tuple(item for item in tick.approvals if item is not order)
        state = replace(tick.state, is_approved=True, approved_by=order.by)
        return replace(tick, state=state, approvals=rest).with_action("approve", f"approved by {order.by}")
    return tick


def _may_approve(tick: Tick, stage: Stage, order: Command) -> bool:
    if order.kind == GATE_ORDER:  # of the gate of this stage, asked about this stay in it
        gate = stage.approval.webhook if stage.approval is not None else None
        return gate is not None and (order.by, order.reason) == (gate.approver, tick.state.stay)
    allowed = stage.approval.by if stage.approval is not None else ("anyone",)
    return "anyone" in allowed or order.by in allowed


def check_freeze(tick: Tick) -> Tick:
    """Step 11: no growth in a freeze window."""
    schedule = tick.policy.spec.schedule
    for text, window in zip(schedule.freeze, schedule.windows, strict=True):
        if window.has(tick.now_s):
            tick = tick.with_hold(Wait.FREEZE, f"freeze window {text}")
    return tick


def grow(tick: Tick) -> Tick:
    """Step 12: exactly one stage further, or promoted after the last one."""
    if tick.hold is not None:
        return tick
    policy, state = tick.policy, tick.state
    index = policy.stage_index(state.stage_id)
    stage = policy.spec.stages[index]
    if index + 1 == len(policy.spec.stages):
        reason = f"promoted: safe at {stage.share:.0%} of sessions at rung {stage.rung}"
        phase = next_phase(state.phase, Event.PROMOTE)
        state = replace(
            start_phase(policy, state, is_stage=False),
            phase=phase.value,
            outcome="promoted",
            by="evidence",
            reason=reason,
            ended_s=tick.now_s,
        )
        return replace(tick, state=state).with_action("promote", reason).ended(reason)
    following = policy.spec.stages[index + 1]
    reason = f"stage {stage.id} is safe; on to {following.id}: {following.share:.0%} at rung {following.rung}"
    phase = next_phase(state.phase, Event.ADVANCE)
    state = replace(
        start_phase(policy, state),
        phase=phase.value,
        stage_id=following.id,
        stage_entered_s=tick.now_s,
        reason=reason,
        is_approved=False,
        approved_by=None,
    )
    return replace(tick, state=state).with_action("advance", reason).ended(reason)
