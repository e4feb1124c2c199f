"""What is legal in a policy and yet surely not meant: stages that never end, guardrails that never fire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sentei.policies.evidence import log_threshold
from sentei.policies.evidence.base import log_mean_exp
from sentei.policies.evidence.counts import RATIO_TILTS, Split
from sentei.policies.intake import scaled_bound
from sentei.policies.review.forecast import Expected, StageForecast, best_s, forecast
from sentei.policies.schema.budget import harm_alpha
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.rules import Path, dotted_path
from sentei.policies.schema.sections import Guardrail
from sentei.policies.schema.units import format_duration

WEEK_MINUTES = 7 * 24 * 60
MANY_EVENTS = 500  # failures, all of sparse: a guardrail that needs more never fires
_SEVERITY = {"freeze": 0, "previous_rung": 1, "rollback_slice": 2, "rollback": 3}


@dataclass(frozen=True, slots=True)
class Advice:
    """One remark; the path starts at `spec`."""

    path: Path
    value: object
    message: str


@dataclass(frozen=True, slots=True)
class _Case:
    policy: Policy
    expected: Expected
    stages: tuple[StageForecast, ...]


def find_advice(policy: Policy, expected: Expected) -> tuple[Advice, ...]:
    """Every remark, in the order of the checks."""
    case = _Case(policy, expected, forecast(policy, expected))
    return tuple(remark for check in CHECKS for remark in check(case))


def _stages_end(case: _Case) -> Iterator[Advice]:
    """A stage whose slices ask for units that never come makes all later ones unreachable."""
    for index, stage in enumerate(case.stages):
        stuck = [need.slice_id for need in stage.needs if not need.has_end]
        if not stuck:
            continue
        later = ", ".join(item.stage_id for item in case.stages[index + 1 :])
        rest = f"; unreachable: {later} and promoted" if later else "; promoted is unreachable"
        message = f"can never end: no guardrail gives units of slice {', '.join(stuck)} here{rest}"
        yield Advice(("stages", index), stage.stage_id, message)
        return


def _stages_are_long_enough(case: _Case) -> Iterator[Advice]:
    for index, stage in enumerate(case.stages):
        if stage.is_too_short and stage.max_s is not None:
            needed, limit = readable(stage.best_s), format_duration(stage.max_s)
            then = "is rolled back" if case.policy.spec.advance.on_max == "rollback" else "waits for a person"
            message = f"needs {needed} at this traffic, but ends after {limit}, and then {then}"
            yield Advice(("stages", index, "max"), limit, message)


def _growth_is_possible(case: _Case) -> Iterator[Advice]:
    windows = case.policy.spec.schedule.windows
    if windows and all(any(w.has(minute * 60.0) for w in windows) for minute in range(WEEK_MINUTES)):
        yield Advice(("schedule", "freeze"), len(windows), "cover the whole week: no stage ever ends")


def _times_fit(case: _Case) -> Iterator[Advice]:
    spec = case.policy.spec
    every = spec.schedule.check_every
    if spec.data.monitor_lease <= every:
        message = f"ends before the next check ({format_duration(every)}): the router goes dense in between"
        yield Advice(("data", "monitor_lease"), format_duration(spec.data.monitor_lease), message)
    if spec.data.max_age < every:
        message = f"is shorter than check_every ({format_duration(every)}): data is stale at most checks"
        yield Advice(("data", "max_age"), format_duration(spec.data.max_age), message)


def _rungs_are_used(case: _Case) -> Iterator[Advice]:
    policy = case.policy
    used = {stage.rung for stage in policy.spec.stages}
    boldest = max(policy.rung_ids.index(rung) for rung in used)
    has_rung_down = any(gate.action == "previous_rung" for gate in policy.spec.guardrails.items)
    for index, rung in enumerate(policy.rung_ids):
        is_reachable = rung in used or (has_rung_down and index < boldest)
        is_reachable |= any(item.max_rung == rung and index <= boldest for item in policy.routed_slices)
        if not is_reachable:
            yield Advice(("ladder", index, "id"), rung, "no stage uses this rung; it is unreachable")
    for index, item in enumerate(policy.spec.slices.buckets):
        if item.max_rung is not None and policy.rung_ids.index(item.max_rung) >= boldest:
            message = f"limits nothing: no stage is bolder than {policy.rung_ids[boldest]}"
            yield Advice(("slices", "buckets", index, "max_rung"), item.max_rung, message)


def _guardrails_can_fire(case: _Case) -> Iterator[Advice]:
    policy = case.policy
    for index, gate in enumerate(policy.spec.guardrails.items):
        path: Path = ("guardrails", "items", index)
        if policy.spec.mode == "advise" and gate.metric.family != "quality":
            yield Advice(path, gate.id, "can never fire in mode advise: nobody is served by sparse")
        elif gate.test == "event_split":
            yield from _split_can_fire(policy, gate, path)


def _split_can_fire(policy: Policy, gate: Guardrail, path: Path) -> Iterator[Advice]:
    """With every event on the candidate, how many does the widest stage need?"""
    share, bound = policy.spec.stages[-1].share, scaled_bound(policy, gate)
    probability = share * bound / (share * bound + 1 - share)
    logs = Split.start(RATIO_TILTS).update(MANY_EVENTS, MANY_EVENTS, probability).logs
    if log_mean_exp(logs) < log_threshold(harm_alpha(policy, gate)):
        events = f"{MANY_EVENTS} events, all of sparse,"
        message = f"can never fire at {share:.0%}: {events} do not prove {bound:g} times"
        yield Advice((*path, "bound"), bound, message)


def _guardrails_are_not_hidden(case: _Case) -> Iterator[Advice]:
    """A weaker bound on the same thing with no stronger action is always too late."""
    items = case.policy.spec.guardrails.items
    for index, gate in enumerate(items):
        for other in items:
            if other.id != gate.id and _is_hidden_by(case.policy, gate, other):
                message = f'can never fire first: "{other.id}" has a tighter bound and acts at least as hard'
                yield Advice(("guardrails", "items", index), gate.id, message)


def _is_hidden_by(policy: Policy, gate: Guardrail, other: Guardrail) -> bool:
    same = ("value", "test", "per")
    if any(getattr(gate, name) != getattr(other, name) for name in same) or gate.bound is None:
        return False
    if other.bound is None or (gate.bound.over, gate.bound.floor_cap) != (
        other.bound.over,
        other.bound.floor_cap,
    ):
        return False
    is_wider = scaled_bound(policy, gate) > scaled_bound(policy, other)
    is_no_harder = _SEVERITY[gate.action] <= _SEVERITY[other.action]
    return is_wider and is_no_harder and harm_alpha(policy, gate) <= harm_alpha(policy, other)


def _answers_are_looked_at(case: _Case) -> Iterator[Advice]:
    """Sparse attention fails without an error: latency and failures look well while answers are wrong."""
    guardrails = case.policy.spec.guardrails.items
    if not any(gate.metric.family == "quality" for gate in guardrails):
        example = (
            "- {id: mass, value: audit.dropped_mass_mean, bound: {max: 5%}, test: betting, action: rollback}"
        )
        message = f"no guardrail is of audits, so answers that are wrong roll nothing back; add {example}"
        yield Advice(("guardrails", "items"), len(guardrails), message)


def _gain_is_asked(case: _Case) -> Iterator[Advice]:
    """Safe is not enough: a rung that saves nothing costs its risk, its audits and its memory."""
    benefit = case.policy.spec.benefit
    if not benefit:
        example = "- {id: compute, value: audit.compute_ratio, want: {max: 0.90}}"
        message = f"no gain is asked for, so a rung that saves nothing is promoted; add {example}"
        yield Advice(("benefit",), None, message)
    for index, item in enumerate(benefit):
        path: Path = ("benefit", index)
        if item.need == "not_disproved":
            message = "a share may grow before the gain is proven; leave need out to ask for proof"
            yield Advice((*path, "need"), item.need, message)
        if item.want.max >= 1:
            message = "is no gain: sparse may take as long as dense"
            yield Advice((*path, "want", "max"), item.want.max, message)


def _notices_come_when_meant(case: _Case) -> Iterator[Advice]:
    """A stay that is as long as the policy wants is no news; a person who must approve must hear of it."""
    stages, hooks = case.policy.spec.stages, case.policy.spec.notify.webhooks
    dwells = {stage.id: max(stage.hold_min, stage.bake or 0.0) for stage in stages}
    longest = max(dwells, key=lambda stage_id: dwells[stage_id])
    for index, item in enumerate(hooks):
        limit = item.hold_longer_than
        if limit is not None and limit <= dwells[longest]:
            message = (
                f"stage {longest} always takes {format_duration(dwells[longest])}: each rollout is told of it"
            )
            yield Advice(("notify", "webhooks", index, "hold_longer_than"), format_duration(limit), message)
    asks = [stage.id for stage in stages if stage.approval is not None and stage.approval.by]
    if hooks and asks and not any("approval_wanted" in item.events for item in hooks):
        message = f"stage {asks[0]} waits for an approval, and no webhook is told of approval_wanted"
        yield Advice(("notify", "webhooks"), len(hooks), message)


def _breaker_can_trip(case: _Case) -> Iterator[Advice]:
    rule, rate = case.policy.spec.breaker.variant, case.expected.sessions_per_hour
    share = case.policy.spec.stages[-1].share
    if rate is None or case.policy.spec.mode == "advise":
        return
    requests = rate * share * rule.window / 3600
    if requests < rule.min_requests:
        message = (
            f"sparse gets about {requests:.3g} sessions in {format_duration(rule.window)}: it can hardly trip"
        )
        yield Advice(("breaker", "variant", "min_requests"), rule.min_requests, message)


def _watch_is_quiet(case: _Case) -> Iterator[Advice]:
    """The detector's promise is a time between false alarms; over many cells it gets short."""
    rate, guardrails = case.expected.sessions_per_hour, case.policy.spec.guardrails
    whole_s = best_s(case.stages)
    if rate is None or whole_s == float("inf"):
        return
    audited = max(stage.audit for stage in case.stages)
    per_hour = 0.0
    for gate in guardrails.items:
        if gate.test in ("betting", "betting_paired", "beta_binomial"):
            is_quality = gate.metric.family == "quality"
            per_hour += rate * (audited if is_quality else case.stages[-1].share) / guardrails.detector_arl
    if per_hour * whole_s / 3600 > 1:
        every = readable(3600 / per_hour)
        message = f"if everything stood at its bound, the watch could raise a false alarm every {every}"
        yield Advice(("guardrails", "detector_arl"), guardrails.detector_arl, message)


def said(advice: Advice) -> str:
    """One remark in one line."""
    return f"{dotted_path(('spec', *advice.path))}: {advice.message} (found {advice.value})"


def readable(seconds: float) -> str:
    """A duration to two figures that matter, such as "about 3.5h"."""
    if seconds == float("inf"):
        return "for ever"
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds:.3g}s"


CHECKS: tuple[Callable[[_Case], Iterator[Advice]], ...] = (
    _stages_end,
    _stages_are_long_enough,
    _growth_is_possible,
    _times_fit,
    _rungs_are_used,
    _guardrails_can_fire,
    _guardrails_are_not_hidden,
    _answers_are_looked_at,
    _gain_is_asked,
    _notices_come_when_meant,
    _breaker_can_trip,
    _watch_is_quiet,
)
