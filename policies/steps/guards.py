"""Steps 1 to 6 of the decision: orders, and all that protects users. None of them ever raises a share."""

from __future__ import annotations

from dataclasses import replace

from sentei.policies.intake import (
    RECENT_PARTS,
    deciding_arm,
    fold_lengths,
    fold_observations,
    fold_traffic,
    recent_number,
    restart_alarm,
)
from sentei.policies.judge import GuardrailReport, View, judge, judge_gain
from sentei.policies.machine import Event, IllegalEventError, Phase, Wait, is_possible, next_phase
from sentei.policies.schema.integrations.gate import GATE_ORDER
from sentei.policies.schema.sections import Benefit, Guardrail
from sentei.policies.schema.units import format_duration
from sentei.policies.signals import Command, DriftSignal, Verdict
from sentei.policies.state import ALL, ALL_SLICES, ARTIFACT, SERVED, DriftTrack, MetricTrack, SliceState
from sentei.policies.steps.dense import describe_failures, is_failing
from sentei.policies.steps.metrics import fold_samples
from sentei.policies.steps.tick import (
    AUDITS_BLIND,
    Tick,
    active_slices,
    effective_rung,
    fall_back,
    pause,
    roll_back,
)


def observe(tick: Tick) -> Tick:
    """New units become evidence, evidence becomes verdicts; what is rolled back learns nothing more."""
    state, signals = tick.state, tick.signals
    if state.phase == Phase.ROLLED_BACK:
        return tick
    if signals.read_error is None:
        if signals.cursor > state.cursor:
            state = fold_lengths(fold_traffic(tick.policy, state, signals.traffic), signals.lengths)
        state = fold_observations(tick.policy, state, signals.observations)
        state = fold_samples(tick.policy, state, signals.samples)
        newest = min(signals.newest_data_at_s or state.waiting_since_s, tick.now_s)
        state = replace(
            state,
            cursor=max(state.cursor, signals.cursor, *(item.seq for item in signals.observations)),
            waiting_since_s=max(state.waiting_since_s, newest),
            drift=tuple(_follow(track, signals.drift) for track in state.drift),
        )
    return _judged(replace(tick, state=state))


def _judged(tick: Tick) -> Tick:
    """The same tick with the verdicts of its state."""
    return replace(tick, reports=_judge_all(tick), gains=_judge_gains(tick))


def _follow(track: DriftTrack, drift: tuple[DriftSignal, ...]) -> DriftTrack:
    """Count distinct windows: drift adds one, clear starts again, and no answer changes nothing."""
    found = next((item for item in drift if item.id == track.signal_id), None)
    if found is None:
        return track
    if found.status not in ("clear", "drift"):
        return replace(track, status=found.status, detail=found.detail)
    if found.window_id <= track.window_id:
        return track
    streak = track.streak + 1 if found.status == "drift" else 0
    return DriftTrack(track.signal_id, found.status, found.window_id, streak, found.detail)


def _judge_all(tick: Tick) -> tuple[GuardrailReport, ...]:
    policy, state = tick.policy, tick.state
    reports = []
    for gate in policy.spec.guardrails.items:
        places = (ALL_SLICES,) if gate.per == "all" else active_slices(policy, state)
        reports += [_judge_one(tick, gate, slice_id) for slice_id in places]
    return tuple(reports)


def _judge_gains(tick: Tick) -> tuple[GuardrailReport, ...]:
    slices = active_slices(tick.policy, tick.state)
    return tuple(
        _judge_gain(tick, item, slice_id) for item in tick.policy.spec.benefit for slice_id in slices
    )


def _judge_gain(tick: Tick, benefit: Benefit, slice_id: str) -> GuardrailReport:
    policy, state = tick.policy, tick.state
    stage = policy.stage(state.stage_id)
    rung = effective_rung(policy, state, slice_id)
    view = View(
        slice_id=slice_id,
        rung_id=rung,
        need=benefit.need,
        try_number=state.try_number,
        is_stale=tick.now_s - state.waiting_since_s > policy.spec.data.max_age,
    )
    first = deciding_arm(policy, stage, policy.need(stage))
    arms = (first, *({ALL, SERVED} - {first}))
    cells = tuple(state.cell(benefit.id, slice_id, rung, arm) for arm in arms)
    is_asked = state.phase != Phase.PROMOTED and policy.asks_gain(stage)
    return judge_gain(policy, benefit, cells, view, is_required=is_asked)


def _judge_one(tick: Tick, gate: Guardrail, slice_id: str) -> GuardrailReport:
    """The verdict of one guardrail in one place; of quality, harm in either arm, safety in one (F16)."""
    policy, state = tick.policy, tick.state
    stage = policy.stage(state.stage_id)
    need = policy.need(stage, gate)
    is_quality = gate.metric.family == "quality"
    rung = effective_rung(policy, state, slice_id) if is_quality else ""
    view = View(
        slice_id=slice_id,
        rung_id=rung,
        share=stage.share if policy.spec.mode == "enforce" else 0.0,
        need=need,
        try_number=state.try_number,
        is_stale=tick.now_s - state.waiting_since_s > policy.spec.data.max_age,
        recent_from=recent_number(policy, tick.now_s) - RECENT_PARTS + 1,
        is_left=stage.need is not None,
    )
    first = deciding_arm(policy, stage, need) if is_quality else ALL
    arms = (first, *({ALL, SERVED} - {first})) if is_quality else (first,)
    cells = [state.cell(gate.id, slice_id, rung, arm) for arm in arms]
    found = [judge(policy, gate, cell, view) for cell in cells]
    grave = (item for item in found if item.verdict in (Verdict.HARM, Verdict.ERROR))
    return min(grave, key=lambda item: item.verdict is not Verdict.HARM, default=found[0])


def handle_commands(tick: Tick) -> Tick:
    """Step 1: an abort acts at once; other orders act, wait for their gate, or are refused with a reason."""
    orders = sorted(
        (item for item in tick.signals.commands if item.seq > tick.state.command_seq),
        key=lambda item: item.seq,
    )
    for order in orders:
        tick = replace(tick, state=replace(tick.state, command_seq=order.seq))
        try:
            tick = _obey(tick, order)
        except IllegalEventError as error:
            tick = tick.with_action("refuse", f"{order.kind} by {order.by}: {error}")
    if tick.state.phase == Phase.ROLLED_BACK and not tick.is_done:
        return tick.ended(tick.state.reason)
    return tick


def _obey(tick: Tick, order: Command) -> Tick:
    why = f" ({order.reason})" if order.reason else ""
    if order.kind == "abort":
        is_second = tick.state.phase == Phase.SHELTERED  # who aborts again does not want to wait for dense
        return roll_back(tick, f"operator:{order.by}", f"aborted by {order.by}{why}", is_forced=is_second)
    if order.kind == "pause":
        return pause(tick, f"operator:{order.by}", f"paused by {order.by}{why}")
    if order.kind == "resume":
        return _resume(tick, order)
    if order.kind == "retry":
        return _retry(tick, order)
    if order.kind in ("approve", "promote", GATE_ORDER):
        next_phase(tick.state.phase, Event.APPROVE)
        return replace(tick, approvals=(*tick.approvals, order))
    return tick.with_action("refuse", f'{order.kind} by {order.by}: there is no order "{order.kind}"')


def _resume(tick: Tick, order: Command) -> Tick:
    """Go on: the pause does not count as time in the stage, and an alarm that paused it starts afresh."""
    state = tick.state
    phase = next_phase(state.phase, Event.RESUME)
    paused_s = tick.now_s - (state.paused_at_s if state.paused_at_s is not None else tick.now_s)
    reason = f"resumed by {order.by}"
    state = replace(
        state,
        phase=phase.value,
        by=None,
        reason=reason,
        paused_at_s=None,
        stage_entered_s=state.stage_entered_s + paused_s,
        waiting_since_s=max(state.waiting_since_s, tick.now_s),
        outcome=None,
        ended_s=None,
        cells=restart_alarm(tick.policy, state),
    )
    return _judged(replace(tick, state=state).with_action("resume", reason).with_hold(Wait.ORDER, reason))


def _retry(tick: Tick, order: Command) -> Tick:
    """Start again at the first stage with nothing carried over; the order releases the quarantine."""
    state, retry = tick.state, tick.policy.spec.rollback.retry
    phase = next_phase(state.phase, Event.RETRY)
    waited = tick.now_s - (state.ended_s if state.ended_s is not None else tick.now_s)
    if state.retries >= retry.max:
        return tick.with_action("refuse", f"retry by {order.by}: {state.retries} of {retry.max} retries used")
    if waited < retry.cool_off:
        left = format_duration(round(retry.cool_off - waited))
        return tick.with_action("refuse", f"retry by {order.by}: cool-off ends in {left}")
    reason = f"retried by {order.by}"
    own = {*state.former_digests, state.policy_digest, f"{ARTIFACT}{state.artifact}"}
    state = replace(
        state,
        phase=phase.value,
        stage_id=tick.policy.spec.stages[0].id,
        stage_entered_s=tick.now_s,
        waiting_since_s=tick.now_s,
        outcome=None,
        by=None,
        reason=reason,
        ended_s=None,
        is_approved=False,
        approved_by=None,
        retries=state.retries + 1,
        cursor=max(state.cursor, tick.signals.cursor),
        sparse_down_since_s=None,
        dense_down_since_s=None,
        is_blind=False,
        slices=tuple(SliceState(item.slice_id) for item in state.slices),
        cells=(),
        drift=tuple(DriftTrack(item.signal_id, window_id=_newest(tick, item)) for item in state.drift),
        metrics=tuple(MetricTrack(item.metric_id) for item in state.metrics),
        quarantine=tuple(item for item in state.quarantine if item.digest not in own),
    )
    return replace(tick, state=state).with_action("retry", reason).ended(reason)


def _newest(tick: Tick, track: DriftTrack) -> int:
    """The newest window there is, so that a retry is not judged by windows of before."""
    ids = [item.window_id for item in tick.signals.drift if item.id == track.signal_id]
    return max([track.window_id, *ids])


def check_artifact(tick: Tick) -> Tick:
    """After the orders: what is proven is one artifact; another one goes dense, and is another rollout."""
    found, known = tick.signals.artifact, tick.state.artifact
    if not found or found == known or tick.state.phase == Phase.SHELTERED:
        return tick
    if known:
        text = f"sparse runs artifact {found[:12]}, but {known[:12]} is what was proven; start a new rollout"
        return roll_back(tick, "artifact", text)
    tick = replace(tick, state=replace(tick.state, artifact=found))
    return tick.with_action("bind", f"from now on what is proven is artifact {found[:12]}")


def check_breaker(tick: Tick) -> Tick:
    """Step 2: no statistics; a candidate that mostly fails, or has long no replica, goes dense at once."""
    rule = tick.policy.spec.breaker.variant
    if tick.policy.stage(tick.state.stage_id).share == 0:
        return tick
    health = {item.variant: item for item in tick.signals.health}
    sparse, dense = health.get("sparse"), health.get("dense")
    if sparse is None:
        return tick
    if is_failing(sparse, rule):
        return roll_back(tick, "breaker", f"breaker: {describe_failures(sparse, rule)}")
    # No replica of either side means that nobody counted them.
    is_down = sparse.replicas_ready == 0 and dense is not None and dense.replicas_ready > 0
    since = tick.state.sparse_down_since_s
    since = (tick.now_s if since is None else since) if is_down else None
    tick = replace(tick, state=replace(tick.state, sparse_down_since_s=since))
    if since is None:
        return tick
    if tick.now_s - since >= rule.no_replica_for:
        limit = format_duration(rule.no_replica_for)
        return roll_back(tick, "breaker", f"breaker: sparse has had no ready replica for {limit}")
    return tick.with_hold(Wait.REPLICAS, "sparse has no ready replica")


def check_harm(tick: Tick) -> Tick:
    """Step 3: proven harm acts in the tick that proves it, in every slice it is proven in.

    A slice that falls ends no walk: the steps that follow may still roll everything back, and nothing grows.
    """
    owing = {item.slice_id: item.by for item in tick.state.slices if item.owes_dense}
    harms = [report for report in tick.reports if report.verdict is Verdict.HARM]
    for report in harms:
        if report.slice_id in owing:
            text = f"{report.slice_id} waits for dense, by {owing[report.slice_id]}"
            tick = tick.with_hold(Wait.DENSE, text)
    harms = [report for report in harms if report.slice_id not in owing or report.action == "rollback"]
    if not harms or tick.state.phase == Phase.SHELTERED:
        return tick
    for report in harms:
        if report.action == "rollback":
            return roll_back(tick, report.id, f"{report.id} in {report.slice_id}: {report.reason}")
    for slice_id in {report.slice_id: None for report in harms}:
        of_slice = [report for report in harms if report.slice_id == slice_id]
        worst = next((report for report in of_slice if report.action == "rollback_slice"), of_slice[0])
        tick = fall_back(tick, worst)
    reason = tick.actions[-1].detail
    if not active_slices(tick.policy, tick.state):
        return roll_back(tick, harms[-1].id, f"no slice is left on sparse; {reason}")
    tick = replace(tick, state=replace(tick.state, reason=reason), outcome=reason)
    return tick.with_hold(Wait.EVIDENCE, reason)


def check_srm(tick: Tick) -> Tick:
    """Step 4: sessions that do not go where they should spoil every comparison: freeze, or roll back."""
    routed = (ALL_SLICES, *active_slices(tick.policy, tick.state))  # not what fell to dense in this tick
    for report in tick.reports:
        if report.verdict is not Verdict.SRM or report.slice_id not in routed:
            continue
        reason = f"{report.id} in {report.slice_id}: {report.reason}"
        if report.action == "rollback":
            return roll_back(tick, report.id, reason)
        if is_possible(tick.state.phase, Event.PAUSE):
            tick = pause(tick, report.id, reason)
        tick = tick.with_hold(Wait.ASSIGNMENT, reason)
    return tick


def check_data(tick: Tick) -> Tick:
    """Step 5: silence is not safety; it holds, and after the policy's time it rolls back."""
    rule = tick.policy.spec.data
    silent_s = tick.now_s - tick.state.waiting_since_s
    text = f"no news for {format_duration(round(silent_s, 3))}"
    if tick.signals.read_error is not None:
        text = f"the store cannot be read ({tick.signals.read_error}), {text}"
        tick = tick.with_hold(Wait.DATA, text)
    blind_s = _blind_s(tick)
    blind = f"requests are chosen, but no audit was scored for {format_duration(round(blind_s))}"
    limits = ((rule.no_data.after, rule.no_data.last), (rule.no_data.grace, rule.no_data.then))
    for limit, action in limits:
        for seconds, words in ((silent_s, text), (blind_s, blind)):
            if seconds > limit:
                return _act_on_silence(tick, action, f"{words}, over {format_duration(limit)}")
    tick = replace(tick, state=replace(tick.state, is_blind=False))
    if silent_s > rule.max_age:
        return tick.with_hold(Wait.DATA, f"{text}: stale after {format_duration(rule.max_age)}")
    return tick


def _blind_s(tick: Tick) -> float:
    """For how long audits have been due without one that was scored; quality is watched in every phase."""
    since_s = tick.signals.unscored_since_s
    if since_s is None or tick.signals.read_error is not None:
        return 0.0
    is_watched = any(item.metric.family == "quality" for item in tick.policy.spec.guardrails.items)
    return tick.now_s - max(since_s, tick.state.since_s) if is_watched else 0.0


def _act_on_silence(tick: Tick, action: str, reason: str) -> Tick:
    if action == "rollback":
        return roll_back(tick, "no_data", reason)
    if not tick.state.is_blind:  # somebody must hear
        tick = replace(tick, state=replace(tick.state, is_blind=True)).with_alert(AUDITS_BLIND, reason)
    return tick.with_hold(Wait.DATA, reason)


def check_signals(tick: Tick) -> Tick:
    """Step 6: drift of a quality column rolls back after enough windows in a row; all other trouble holds."""
    for signal, track in zip(tick.policy.spec.signals, tick.state.drift, strict=True):
        windows = f"drift in {track.streak} of {signal.consecutive} windows in a row"
        detail = f": {track.detail}" if track.detail else ""
        if signal.action == "rollback" and track.streak >= signal.consecutive:
            return roll_back(tick, signal.id, f"{signal.id}: {windows}{detail}")
        if track.streak > 0 and (signal.action == "rollback" or track.streak >= signal.consecutive):
            tick = tick.with_hold(Wait.SIGNAL, f"{signal.id}: {windows}{detail}")
        elif track.status == "error":
            tick = tick.with_hold(Wait.SIGNAL, f"{signal.id}: the check failed{detail}")
        elif track.status == "no_data" and signal.no_data == "hold":
            tick = tick.with_hold(Wait.SIGNAL, f"{signal.id}: no full window yet{detail}")
    return tick
