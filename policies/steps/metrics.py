"""Metrics of one's own: samples to a stretch of time, and a stretch to pass, hold or rollback.

A sample is what somebody's Prometheus answered, written down before it is read here. It is held against a
bound, not proven: unlike the audits a threshold has no promised error, so it must hold for a whole window.
Nothing but a fresh stretch within the bound, of this stage, is a pass: no number, none lately, or a query
that failed holds, and is an alert in the log.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sentei.policies.machine import Phase, Wait
from sentei.policies.schema.integrations.prometheus import PrometheusGuardrail
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import MetricSample
from sentei.policies.state import MetricTrack, RolloutState
from sentei.policies.steps.tick import Tick, roll_back

WITHIN, OUT = "within", "out"
LOST = "lost_metric"  # the kind of the alert


def fold_samples(policy: Policy, state: RolloutState, samples: Iterable[MetricSample]) -> RolloutState:
    """Each sample once, in its order: does it go on with the stretch before it?"""
    items = {item.id: item for item in policy.spec.guardrails.prometheus}
    tracks = {track.metric_id: track for track in state.metrics}
    for sample in samples:
        track = tracks.get(sample.metric_id)
        if track is not None and sample.seq > track.seq:
            tracks[sample.metric_id] = _follow(items[sample.metric_id], track, sample)
    return replace(state, metrics=tuple(tracks[track.metric_id] for track in state.metrics))


def _follow(item: PrometheusGuardrail, track: MetricTrack, sample: MetricSample) -> MetricTrack:
    status = sample.status
    if sample.value is not None:
        status = WITHIN if item.bound.keeps(sample.value) else OUT
    goes_on = status == track.status and sample.at_s - track.at_s <= item.stale_s
    return MetricTrack(
        metric_id=track.metric_id,
        status=status,
        since_s=track.since_s if goes_on else sample.at_s,
        at_s=sample.at_s,
        value=sample.value,
        seq=sample.seq,
        detail=sample.detail,
        is_lost=track.is_lost,
    )


def check_metrics(tick: Tick) -> Tick:
    """Step 6: a metric that is out of its bound for its window acts; one that is not surely within holds."""
    if tick.state.phase == Phase.ROLLED_BACK:
        return tick
    for item, track in zip(tick.policy.spec.guardrails.prometheus, tick.state.metrics, strict=True):
        tick = _check(tick, item, track)
        if tick.is_done:
            return tick
    return tick


def _check(tick: Tick, item: PrometheusGuardrail, track: MetricTrack) -> Tick:
    age_s = tick.now_s - track.at_s
    is_fresh = track.seq > 0 and age_s <= item.stale_s
    if not is_fresh or track.status not in (WITHIN, OUT):
        return _lose(tick, item, track, is_fresh=is_fresh)
    tick = _set(tick, replace(track, is_lost=False))
    value = 0.0 if track.value is None else track.value
    # What was measured before this stage says nothing of it.
    lasted_s = max(0.0, track.at_s - max(track.since_s, tick.state.stage_entered_s))
    where = "within" if track.status == WITHIN else "out of"
    lasted = f"{where} it for {format_duration(round(lasted_s, 3))} of {format_duration(item.window)}"
    text = f"{item.id}: {value:g}, bound {item.bound}, {lasted}"
    is_whole = lasted_s >= item.window
    if track.status == OUT and is_whole and item.action == "rollback" and _is_served(tick):
        return roll_back(tick, item.id, text)
    return tick if track.status == WITHIN and is_whole else tick.with_hold(Wait.SIGNAL, text)


def _lose(tick: Tick, item: PrometheusGuardrail, track: MetricTrack, *, is_fresh: bool) -> Tick:
    """No number: never a pass; an alert once, as soon as there could have been one."""
    asked_s = max(track.since_s, tick.state.stage_entered_s) if track.seq == 0 else track.at_s
    age_s = tick.now_s - asked_s
    detail = f": {track.detail}" if track.detail else ""
    if track.seq == 0:
        text = f"{item.id}: no answer from {item.place} yet"
    elif not is_fresh:
        text = f"{item.id}: the newest sample is {format_duration(round(age_s))} old"
    else:
        text = f"{item.id}: {track.status.replace('_', ' ')}{detail}"
    is_late = age_s > item.stale_s or (is_fresh and track.status not in (WITHIN, OUT))
    if is_late and not track.is_lost:
        tick = _set(tick, replace(track, is_lost=True)).with_action(LOST, text)
    return tick.with_hold(Wait.SIGNAL, text)


def _is_served(tick: Tick) -> bool:
    """Whether sparse serves anybody: else no metric is out of its bound because of it."""
    return tick.policy.spec.mode == "enforce" and tick.policy.stage(tick.state.stage_id).share > 0


def _set(tick: Tick, changed: MetricTrack) -> Tick:
    metrics = tuple(changed if item.metric_id == changed.metric_id else item for item in tick.state.metrics)
    return replace(tick, state=replace(tick.state, metrics=metrics))
