"""A policy in sentences, for whoever has to answer for it."""

from __future__ import annotations

from collections.abc import Iterator

from sentei.policies.review.advice import readable
from sentei.policies.review.forecast import (
    StageForecast,
    bad_units,
    bearable_missing,
    best_s,
    clean_units,
    gain_units,
    worst_s,
)
from sentei.policies.schema.budget import harm_alpha
from sentei.policies.schema.integrations.prometheus import PrometheusGuardrail
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Approval, Benefit, Guardrail, Signal
from sentei.policies.schema.units import format_duration

_ACTIONS = {
    "previous_rung": "the slice falls one rung, from the mildest to dense",
    "rollback_slice": "the slice goes back to dense",
    "rollback": "everybody goes back to dense",
    "freeze": "growth stops until a person resumes",
}


def explain(policy: Policy, stages: tuple[StageForecast, ...]) -> tuple[str, ...]:
    """What it does, in the order in which one asks."""
    return (
        *_who(policy),
        *(_stage(policy, stage, index) for index, stage in enumerate(stages)),
        _growth(policy),
        *(_guardrail(policy, gate) for gate in policy.spec.guardrails.items),
        *_others(policy),
        _silence(policy),
        _retry(policy),
        *_told(policy),
        _time(stages),
    )


def _who(policy: Policy) -> Iterator[str]:
    spec = policy.spec
    pinned = [item.id for item in spec.slices.buckets if item.is_pinned]
    routed = [
        f"{item.id} ({item.range[0]} to {item.range[1]} tokens"
        + (f", at most rung {item.max_rung})" if item.max_rung else ")")
        for item in policy.routed_slices
    ]
    yield f"Sparse attention is rolled out to {_and(routed)}" + (
        f"; {_and(pinned)} stays dense." if pinned else "."
    )
    if spec.mode == "advise":
        yield "It only advises: every decision is logged, and nobody is ever served by sparse."


def _stage(policy: Policy, stage: StageForecast, index: int) -> str:
    own = policy.spec.stages[index]
    who = (
        "users see dense, sparse is judged by replay"
        if stage.share == 0
        else f"{stage.share:.3g} of sessions"
    )
    if stage.share > 0:
        who = f"{stage.share:.0%} of the sessions are served by sparse"
    audited = f"{stage.audit:.0%} of the requests are audited"
    text = f"Stage {index + 1}, {stage.stage_id}, at rung {stage.rung}: {who}, {audited}"
    audits = max((need.audits for need in stage.needs), default=0)
    served = max((need.served for need in stage.needs), default=0)
    proves = policy.need(own) == "all_safe"
    whom = " that sparse served" if proves and own.share > 0 and policy.spec.mode == "enforce" else ""
    wants = [f"{audits} audited units{whom}"] if audits else []
    wants += [f"{served} served ones"] if served > 1 else []
    if wants:
        text += f"; each slice needs at least {_and(wants)}"
    if own.need is not None:
        text += "; it only must show no harm, a later stage proves safety"
    rest = max(own.hold_min, own.bake or 0.0)
    if rest:
        text += f"; at least {format_duration(rest)}"
    if own.approval is not None:
        text += f"; then {_and(_approvers(own.approval), 'or')} must approve"
    if own.max is not None:
        then = "it is rolled back" if policy.spec.advance.on_max == "rollback" else "it waits for an approval"
        text += f"; after {format_duration(own.max)} {then}"
    return text + "."


def _approvers(approval: Approval) -> list[str]:
    gate = approval.webhook
    return [*approval.by, *([] if gate is None else [f"{gate.approver} ({gate.place})"])]


def _growth(policy: Policy) -> str:
    alpha = policy.spec.guardrails.alpha_total
    if policy.spec.advance.need == "no_harm":
        return "A stage ends when nothing is proven harmful; safety is not proven (need: no_harm)."
    return (
        f"A stage ends only when every guardrail that is asked for it is proven safe in every slice: "
        f"a variant at its bound passes with probability at most {alpha:g}, over all its tries together. "
        f"Safety is proven in each stage anew, and where sparse serves by what it served; a session counts "
        f"again after {format_duration(policy.spec.audit.select.period)}."
    )


def _guardrail(policy: Policy, gate: Guardrail) -> str:
    where = "over all slices" if gate.per == "all" else "in each slice"
    act = _ACTIONS[gate.action]
    alpha = harm_alpha(policy, gate)
    if gate.bound is None:
        return f"{gate.id}: sessions that do not go where they should {where}: {act} (alpha {alpha:.2g})."
    bound, what = gate.bound, gate.metric.summary
    if bound.ratio is not None:
        limit = f"at most {bound.ratio:g} times dense's rate"
    elif bound.excess_over_floor is not None:
        limit = f"at most {bound.excess_over_floor:g} {gate.metric.unit} above dense's own noise"
    else:
        over = f" over {format_duration(bound.over)}" if bound.over else ""
        limit = f"at most {bound.max:g} of sessions{over}" if bound.over else f"at most {bound.max:g}"
    clean, bad = clean_units(policy, gate), bad_units(policy, gate)
    asked = (gate.advance or policy.spec.advance.need) == "all_safe"
    cost = f" Safe after {clean} clean sessions" if clean and asked else " Asked only for no harm"
    cost += f", harmful after {bad} bad ones." if bad else "."
    missing = bearable_missing(policy, gate)
    if missing is not None and asked:
        cost += f" Not provable once {missing:.1%} of its audits are missing."
    return f"{gate.id}: {what}, {limit}, {where}; proven worse, {act} (alpha {alpha:.2g}).{cost}"


def _others(policy: Policy) -> Iterator[str]:
    for item in policy.spec.benefit:
        yield _benefit(policy, item)
    for signal in policy.spec.signals:
        yield _signal(signal)
    for metric in policy.spec.guardrails.prometheus:
        yield _metric(metric)
    rule = policy.spec.breaker.variant
    yield (
        f"Breaker: {rule.failure_share:.0%} failures of at least {rule.min_requests} requests within "
        f"{format_duration(rule.window)}, or no ready replica for {format_duration(rule.no_replica_for)}: "
        "everybody goes back to dense at once."
    )
    if policy.spec.schedule.freeze:
        yield f"No growth during {_and(list(policy.spec.schedule.freeze))}; protection never sleeps."


def _benefit(policy: Policy, item: Benefit) -> str:
    text = f"{item.id}: sparse must take at most {item.want.max:g} of dense's model time for the same request"
    stop = "once that is proven false, the rollout is held until a person resumes, edits or ends it."
    if item.need == "not_disproved":
        return f"{text}; growth does not wait for proof of it, and {stop}"
    halves = (item.want.max * part for part in (0.5, 0.8))
    costs = [f"{gain_units(policy, item, ratio)} sessions at {ratio:.2g}" for ratio in halves]
    return f"{text}, proven in each slice before a share grows ({_and(costs, 'or')}); {stop}"


def _signal(signal: Signal) -> str:
    act = "everybody goes back to dense" if signal.action == "rollback" else "growth waits"
    return (
        f"{signal.id}: drift of {signal.column} in {signal.consecutive} windows of "
        f"{signal.window_units} sessions in a row: {act}."
    )


def _metric(item: PrometheusGuardrail) -> str:
    window = format_duration(item.window)
    act = "everybody goes back to dense" if item.action == "rollback" else "growth waits"
    return (
        f"{item.id}, asked of {item.place} each {format_duration(item.every)}: growth waits until it was "
        f"within its bound ({item.bound}) for {window} of the stage; out of it for {window}: {act}. "
        "No number never passes."
    )


def _silence(policy: Policy) -> str:
    data = policy.spec.data
    last = "everything goes back to dense" if data.no_data.last == "rollback" else "growth still waits"
    stale, silent = format_duration(data.max_age), format_duration(data.no_data.after)
    lease = format_duration(data.monitor_lease)
    return (
        f"No news for {stale}: growth waits; for {silent}: {last}. "
        f"A router that hears nothing for {lease} goes dense by itself."
    )


def _retry(policy: Policy) -> str:
    retry = policy.spec.rollback.retry
    if retry.max == 0:
        return "What was rolled back stays back: this policy cannot be retried."
    wait = format_duration(retry.cool_off) if retry.cool_off else "no wait"
    return f"A person may retry it {retry.max} time(s), after {wait}, with fresh evidence."


def _told(policy: Policy) -> Iterator[str]:
    for item in policy.spec.notify.webhooks:
        words = [word.replace("_", " ") for word in item.events]
        if item.hold_longer_than is not None:
            words.append(f"a stage held for {format_duration(item.hold_longer_than)}")
        shape = "a Slack message" if item.secret is None else f"JSON signed with {item.secret}"
        yield f"{item.id} ({item.place}) gets {shape} of {_and(words)}, at least once and in order."


def _time(stages: tuple[StageForecast, ...]) -> str:
    worst = worst_s(stages)
    end = (
        f"at most {readable(worst)}" if worst is not None else "no end of its own, as it may wait for people"
    )
    return f"At best it takes {readable(best_s(stages))}; at worst it has {end}."


def _and(words: list[str], word: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {word} {words[-1]}"
