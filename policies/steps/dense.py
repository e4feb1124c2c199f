"""Before the orders: can dense take traffic? Where it cannot, protection must not send users there."""

from __future__ import annotations

from dataclasses import replace

from sentei.policies.machine import Phase, SliceEvent, Wait
from sentei.policies.schema.operations import VariantBreaker
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import VariantHealth
from sentei.policies.state import ALL_SLICES
from sentei.policies.steps.tick import DENSE_DOWN, Tick, active_slices, move_slice, roll_back


def check_dense(tick: Tick) -> Tick:
    """Dense that is down holds growth and alerts once; dense that is back gets what it is owed."""
    if tick.state.phase == Phase.ROLLED_BACK:
        return tick
    fault = _find_fault(tick)
    was_down = tick.state.dense_down_since_s
    since = None if fault is None else tick.now_s if was_down is None else was_down
    tick = replace(tick, state=replace(tick.state, dense_down_since_s=since))
    if fault is None:
        return _settle(tick)
    return (tick.with_alert(DENSE_DOWN, fault) if was_down is None else tick).with_hold(Wait.DENSE, fault)


def _find_fault(tick: Tick) -> str | None:
    """Why dense cannot take traffic, or None; what hits both variants alike is no fault of dense."""
    rule = tick.policy.spec.breaker.variant
    health = {item.variant: item for item in tick.signals.health}
    dense, sparse = health.get("dense"), health.get("sparse")
    if dense is None or sparse is None:
        return None
    # No replica of either side means that nobody counted them.
    if dense.replicas_ready == 0 and sparse.replicas_ready > 0:
        return "dense has no ready replica"
    if is_failing(dense, rule) and not is_failing(sparse, rule):
        return f"dense is failing: {describe_failures(dense, rule)}"
    return None


def _settle(tick: Tick) -> Tick:
    """Carry out the fallbacks that waited for dense."""
    state = tick.state
    if state.phase == Phase.SHELTERED:
        return roll_back(tick, state.by or "breaker", f"{state.owed_reason}; dense is back")
    owing = [item for item in state.slices if item.owes_dense]
    for item in owing:
        dense = replace(item, is_dense=True, owes_dense=False)
        tick = move_slice(
            tick, dense, SliceEvent.TO_DENSE, f"{item.slice_id}: dense is back; falls back to dense"
        )
    if not owing:
        return tick
    reason, left = tick.actions[-1].detail, active_slices(tick.policy, tick.state)
    tick = replace(tick, reports=tuple(r for r in tick.reports if r.slice_id in (*left, ALL_SLICES)))
    if not left:
        return roll_back(tick, owing[-1].by or "breaker", f"no slice is left on sparse; {reason}")
    return tick.with_hold(Wait.DENSE, reason)


def is_failing(item: VariantHealth, rule: VariantBreaker) -> bool:
    """Whether a variant fails as often as the breaker allows, over enough requests."""
    return item.requests >= rule.min_requests and item.failures / item.requests >= rule.failure_share


def describe_failures(item: VariantHealth, rule: VariantBreaker) -> str:
    """Both numbers of a failing variant."""
    numbers = f"{item.failures} of {item.requests} requests failed in {format_duration(item.window_s)}"
    return f"{numbers}, {item.failures / item.requests:.0%} over {rule.failure_share:.0%}"
