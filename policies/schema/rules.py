"""The rules that tie fields of a policy together; each gives the path, what was found and what is allowed.

A rule names the sections it needs as its parameters and runs only when those are well formed, so one broken
section never hides what is wrong with another.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sentei.policies.schema.faults import Fault, Path, dotted_path, nearest
from sentei.policies.schema.integrations.gate import GATE_NAME, gate_faults
from sentei.policies.schema.integrations.notify import receivers_are_sound
from sentei.policies.schema.integrations.prometheus import prometheus_faults
from sentei.policies.schema.metrics import COLUMNS, METRICS
from sentei.policies.schema.operations import Breaker, Data, Schedule
from sentei.policies.schema.proofs import (
    family,
    last_stage_is_proven,
    no_harm_is_no_empty_gate,
    promotion_is_proven,
    shadow_proves_something,
)
from sentei.policies.schema.sections import (
    Assignment,
    Audit,
    Benefit,
    Bound,
    Guardrail,
    Guardrails,
    LadderRung,
    Signal,
    Slices,
    Stage,
)
from sentei.policies.schema.units import format_duration, why_no_person

__all__ = ["Fault", "Path", "dotted_path", "find_faults", "nearest"]

BOUND_LEAST, BOUND_MOST = 1e-4, 0.5  # of a value's range: less is never proven, more lets nearly all pass
KL_CAP_MOST = 20.0  # nats; two next-token distributions rarely differ by more
SHORTEST_S, LONGEST_LEASE_S = 0.1, 3600.0  # between two looks, and of a routing table nobody renews
RATIO_LIMIT = 2.0  # audit.compute_ratio is capped at twice dense
RESERVED_IDS = frozenset({"breaker", "no_data", "stage_max", "operator", "evidence", "dense", "artifact"})
_TEST_OF_BOUND = {
    "excess_over_floor": ("betting_paired",),
    "ratio": ("event_split",),
    "max": ("betting", "beta_binomial"),
}


def find_faults(sections: Mapping[str, Any]) -> list[Fault]:
    """Every broken rule among the sections that are there, in the order of the rules."""
    faults: list[Fault] = []
    for rule in RULES:
        names = list(inspect.signature(rule).parameters)
        if all(sections.get(name) is not None for name in names):
            faults += rule(*(sections[name] for name in names))
    return faults


def _unknown(path: Path, word: str, known: Iterable[str], what: str) -> Fault:
    names = sorted(known)
    return Fault(path, word, f"no {what} of this name; allowed: {', '.join(names)}{nearest(word, names)}")


def _twice(path: Path, ids: Iterable[str], what: str) -> Iterator[Fault]:
    for word, count in Counter(ids).items():
        if count > 1:
            yield Fault(path, word, f'{what} id "{word}" is used {count} times; ids are unique')


def ladder_is_ordered(ladder: tuple[LadderRung, ...]) -> Iterator[Fault]:
    """Rung ids are unique, and dense is not one of them."""
    yield from _twice(("ladder",), (rung.id for rung in ladder), "rung")
    for index, rung in enumerate(ladder):
        if rung.id == "dense":
            yield Fault(("ladder", index, "id"), rung.id, "dense is rung 0 of every ladder and is not listed")


def slices_partition(slices: Slices) -> Iterator[Fault]:
    """Buckets start at 0 and follow each other without gap or overlap; at least one is routed."""
    yield from _twice(("slices", "buckets"), (item.id for item in slices.buckets), "slice")
    end = 0
    for index, item in enumerate(slices.buckets):
        path: Path = ("slices", "buckets", index)
        if item.range[0] != end:
            kind = "gap" if item.range[0] > end else "overlap"
            yield Fault((*path, "range"), list(item.range), f"{kind}: this bucket must start at {end}")
        if item.range[1] <= item.range[0]:
            yield Fault((*path, "range"), list(item.range), "a range is [from, to) with to above from")
        if item.is_pinned and item.max_rung is not None:
            yield Fault((*path, "max_rung"), item.max_rung, "a pinned slice is always dense and has no rung")
        end = item.range[1]
    if all(item.is_pinned for item in slices.buckets):
        yield Fault(
            ("slices", "buckets"), len(slices.buckets), "all slices are pinned; nothing could be rolled out"
        )


def slice_rungs_exist(slices: Slices, ladder: tuple[LadderRung, ...]) -> Iterator[Fault]:
    """max_rung is a rung of the ladder."""
    known = [rung.id for rung in ladder]
    for index, item in enumerate(slices.buckets):
        if item.max_rung is not None and item.max_rung not in known:
            yield _unknown(("slices", "buckets", index, "max_rung"), item.max_rung, known, "rung")


def stages_climb(stages: tuple[Stage, ...]) -> Iterator[Fault]:
    """Shares never fall, and some dense traffic stays as concurrent control."""
    yield from _twice(("stages",), (stage.id for stage in stages), "stage")
    for index, stage in enumerate(stages):
        path: Path = ("stages", index)
        if stage.share >= 1:
            yield Fault(
                (*path, "share"), stage.share, "must stay below 1: dense remains as concurrent control"
            )
        if index and stage.share < stages[index - 1].share:
            yield Fault(
                (*path, "share"),
                stage.share,
                f"falls below the {stages[index - 1].share} of the stage before",
            )
        if index and stage.share != stages[index - 1].share and stage.rung != stages[index - 1].rung:
            yield Fault(path, stage.id, "share and rung both change; one of them at a time")
        if index and stage.share == stages[index - 1].share and stage.rung == stages[index - 1].rung:
            yield Fault(path, stage.id, "neither share nor rung changes; use hold_min or bake to wait")
        if stage.bake is not None and index + 1 != len(stages):
            yield Fault((*path, "bake"), stage.bake, "only the last stage bakes; use hold_min")
        if stage.max is not None and stage.max <= max(stage.hold_min, stage.bake or 0.0):
            yield Fault((*path, "max"), stage.max, "must be longer than hold_min and bake")
    if stages[-1].share == 0:
        yield Fault(("stages", len(stages) - 1, "share"), 0.0, "the last stage must route some traffic")


def stage_rungs_climb(stages: tuple[Stage, ...], ladder: tuple[LadderRung, ...]) -> Iterator[Fault]:
    """Each stage's rung is on the ladder, and later stages are never milder."""
    known = [rung.id for rung in ladder]
    last = -1
    for index, stage in enumerate(stages):
        if stage.rung not in known:
            yield _unknown(("stages", index, "rung"), stage.rung, known, "rung")
            continue
        place = known.index(stage.rung)
        if place < last:
            yield Fault(
                ("stages", index, "rung"), stage.rung, f'is milder than "{known[last]}" of an earlier stage'
            )
        last = max(last, place)


def stages_are_audited(stages: tuple[Stage, ...], audit: Audit, guardrails: Guardrails) -> Iterator[Fault]:
    """A stage that needs quality evidence audits somebody."""
    if not any(family(item) == "quality" for item in guardrails.items):
        return
    for index, stage in enumerate(stages):
        share = audit.select.fraction if stage.audit is None else stage.audit
        if share == 0:
            yield Fault(
                ("stages", index, "audit"), share, "no session is audited, so quality could never be proven"
            )


def ids_are_unique(
    guardrails: Guardrails, signals: tuple[Signal, ...], benefit: tuple[Benefit, ...]
) -> Iterator[Fault]:
    """Guardrails, signals and benefits share one name space: an id says who rolled back."""
    ids = [*(g.id for g in guardrails.items), *(s.id for s in signals), *(b.id for b in benefit)]
    ids += [item.id for item in guardrails.prometheus]
    yield from _twice(("guardrails", "items"), ids, "guardrail, signal or benefit")
    for word in sorted(RESERVED_IDS.intersection(ids)):
        yield Fault(("guardrails", "items"), word, f'"{word}" is reserved; choose another id')


def guardrails_are_sound(guardrails: Guardrails, audit: Audit) -> Iterator[Fault]:
    """Each gate watches a known value, with one bound, a fitting test and a fitting action."""
    for index, item in enumerate(guardrails.items):
        path: Path = ("guardrails", "items", index)
        if item.value not in METRICS or family(item) == "benefit":
            known = [name for name, metric in METRICS.items() if metric.family != "benefit"]
            yield _unknown((*path, "value"), item.value, known, "metric")
        elif family(item) == "assignment":
            yield from _assignment_faults(path, item)
        elif item.bound is None:
            yield Fault(
                (*path, "bound"), None, "every guardrail needs a bound: max, excess_over_floor or ratio"
            )
        else:
            yield from _bound_faults(path, item, item.bound, audit)
            yield from _action_faults(path, item)


def _assignment_faults(path: Path, item: Guardrail) -> Iterator[Fault]:
    if item.bound is not None:
        yield Fault((*path, "bound"), item.id, "the sample-ratio test has no bound; its alpha is its limit")
    if item.test != "split_ramp":
        yield Fault((*path, "test"), item.test, "assignment is tested by split_ramp")
    if item.alpha is None:
        yield Fault((*path, "alpha"), None, "the sample-ratio test needs its own alpha, such as 0.001")
    if item.action not in ("freeze", "rollback"):
        yield Fault((*path, "action"), item.action, "assignment can freeze or rollback")
    if item.advance is not None:
        yield Fault(
            (*path, "advance"), item.advance, "a sample ratio cannot be proven right; leave advance out"
        )


def _bound_faults(path: Path, item: Guardrail, bound: Bound, audit: Audit) -> Iterator[Fault]:
    metric, where = METRICS[item.value], (*path, "bound")
    kinds = [name for name in _TEST_OF_BOUND if getattr(bound, name) is not None]
    if len(kinds) != 1:
        yield Fault(where, kinds, "give exactly one of max, excess_over_floor and ratio")
        return
    kind = kinds[0]
    value = float(getattr(bound, kind))
    if item.test not in _TEST_OF_BOUND[kind]:
        allowed = " or ".join(_TEST_OF_BOUND[kind])
        yield Fault((*path, "test"), item.test, f"a bound on {kind} is tested by {allowed}")
    if kind == "excess_over_floor" and not metric.has_floor:
        yield Fault(where, item.value, f"{item.value} has no noise floor; use max")
    if bound.floor_cap is not None and kind != "excess_over_floor":
        yield Fault((*where, "floor_cap"), bound.floor_cap, "only goes with excess_over_floor")
    is_time = metric.unit == "ms"
    if is_time != (bound.over is not None):
        text = "needs `over`, such as over: 2s" if is_time else "is no time and takes no `over`"
        yield Fault((*where, "over"), bound.over, f"{item.value} {text}")
    is_event = metric.is_event or is_time
    if item.test in ("beta_binomial", "event_split") and not is_event:
        yield Fault((*path, "test"), item.test, f"{item.value} is no event; use betting or betting_paired")
    limit = audit.values.kl.cap if item.value == "audit.kl" else 1.0
    if kind != "ratio" and not BOUND_LEAST * limit <= value <= BOUND_MOST * limit:
        allowed = f"{BOUND_LEAST * limit:g} to {BOUND_MOST * limit:g}"
        unit = "of the sessions" if is_event else metric.unit
        message = f"must lie in {allowed} {unit}: less is never proven, with more nearly all passes"
        yield Fault((*where, kind), value, message)
    if kind != "ratio" and bound.floor_cap is not None and bound.floor_cap >= limit:
        yield Fault((*where, "floor_cap"), bound.floor_cap, f"must lie below {limit:g} {metric.unit}")


def _action_faults(path: Path, item: Guardrail) -> Iterator[Fault]:
    if item.action == "freeze":
        yield Fault(
            (*path, "action"), item.action, "only the sample-ratio test may freeze; harm must fall back"
        )
    if item.per == "all" and item.action in ("previous_rung", "rollback_slice"):
        yield Fault((*path, "action"), item.action, "a guardrail over all slices can only rollback")
    if item.per == "all" and METRICS[item.value].family == "quality":
        yield Fault((*path, "per"), item.per, "quality belongs to a slice; use per: slice")


def alpha_fits(guardrails: Guardrails) -> Iterator[Fault]:
    """Own alphas leave something of alpha_total to those without one."""
    own = sum(item.alpha or 0.0 for item in guardrails.items)
    has_rest = any(item.alpha is None for item in guardrails.items)
    if own > guardrails.alpha_total or (has_rest and own >= guardrails.alpha_total):
        message = f"own alphas sum to {own:g}, which leaves nothing of alpha_total {guardrails.alpha_total:g}"
        yield Fault(("guardrails", "alpha_total"), guardrails.alpha_total, message)


def signals_are_sound(signals: tuple[Signal, ...]) -> Iterator[Fault]:
    """Signals watch known columns, and only quality columns may roll back."""
    for index, signal in enumerate(signals):
        if signal.column not in COLUMNS:
            yield _unknown(("signals", index, "column"), signal.column, COLUMNS, "column")
        elif signal.action == "rollback" and COLUMNS[signal.column] == "input":
            message = f"{signal.column} is an input: users changed, not quality; it may only hold"
            yield Fault(("signals", index, "action"), signal.action, message)


def benefit_is_reachable(benefit: tuple[Benefit, ...]) -> Iterator[Fault]:
    """The wanted gain lies within what can be measured."""
    for index, item in enumerate(benefit):
        if item.want.max >= RATIO_LIMIT:
            yield Fault(("benefit", index, "want", "max"), item.want.max, f"must lie below {RATIO_LIMIT:g}")


def times_are_ordered(data: Data) -> Iterator[Fault]:
    """Silence first waits, then acts."""
    if data.no_data.after <= data.no_data.grace:
        yield Fault(("data", "no_data", "after"), data.no_data.after, "must be longer than grace")


def times_protect(breaker: Breaker, data: Data, schedule: Schedule) -> Iterator[Fault]:
    """Looks, leases and windows are long enough to be kept and short enough to protect somebody."""
    for path, value, longest in (
        (("breaker", "variant", "window"), breaker.variant.window, None),
        (("data", "max_age"), data.max_age, None),
        (("data", "monitor_lease"), data.monitor_lease, LONGEST_LEASE_S),
        (("schedule", "check_every"), schedule.check_every, LONGEST_LEASE_S),
    ):
        if value < SHORTEST_S or (longest is not None and value > longest):
            rest = "" if longest is None else f" and at most {format_duration(longest)}"
            yield Fault(path, format_duration(value), f"must be at least {format_duration(SHORTEST_S)}{rest}")
    if breaker.variant.failure_share == 0:
        path = ("breaker", "variant", "failure_share")
        yield Fault(path, 0.0, "must be above 0: no request at all would be too many failures")


def kl_is_capped(audit: Audit) -> Iterator[Fault]:
    """The cap of KL is a number that real answers come near; else no mean is ever far from 0."""
    if audit.values.kl.cap > KL_CAP_MOST:
        path = ("audit", "values", "kl", "cap")
        yield Fault(path, audit.values.kl.cap, f"must be at most {KL_CAP_MOST:g} nats")


def approvers_are_plain(stages: tuple[Stage, ...]) -> Iterator[Fault]:
    """Somebody may approve, and each is a name that nobody takes for another."""
    for index, stage in enumerate(stages):
        path: Path = ("stages", index, "approval")
        if stage.approval is None:
            continue
        if not stage.approval.names:
            yield Fault((*path, "by"), [], "nobody could approve; name people in by, or a webhook")
        if stage.approval.webhook is not None:
            yield from gate_faults((*path, "webhook"), stage.approval.webhook)
        for place, name in enumerate(stage.approval.by):
            reason = why_no_person(name)
            if name.startswith(GATE_NAME):
                reason = f'"{GATE_NAME}" is how the log names a webhook'
            if reason:
                yield Fault((*path, "by", place), name, reason)


def audits_have_time(audit: Audit) -> Iterator[Fault]:
    """A period and a window are long enough to hold something."""
    if audit.select.period < 1:
        yield Fault(("audit", "select", "period"), audit.select.period, "must be at least 1s")
    if audit.missing.window < 60:
        yield Fault(("audit", "missing", "window"), audit.missing.window, "must be at least 1m")


def metrics_are_sound(guardrails: Guardrails) -> Iterator[Fault]:
    """A metric of one's own can be asked for, and its window holds some answers."""
    for index, item in enumerate(guardrails.prometheus):
        yield from prometheus_faults(("guardrails", "prometheus", index), item)


def salt_is_plain(assignment: Assignment) -> Iterator[Fault]:
    """A salt is printable, so that two people mean the same one."""
    if not assignment.salt.isprintable():
        yield Fault(("assignment", "salt"), assignment.salt, "must be printable text")


RULES: tuple[Callable[..., Iterator[Fault]], ...] = (
    ladder_is_ordered,
    slices_partition,
    slice_rungs_exist,
    stages_climb,
    stage_rungs_climb,
    stages_are_audited,
    shadow_proves_something,
    promotion_is_proven,
    last_stage_is_proven,
    no_harm_is_no_empty_gate,
    ids_are_unique,
    guardrails_are_sound,
    alpha_fits,
    signals_are_sound,
    benefit_is_reachable,
    times_are_ordered,
    times_protect,
    kl_is_capped,
    approvers_are_plain,
    audits_have_time,
    salt_is_plain,
    receivers_are_sound,
    metrics_are_sound,
)
