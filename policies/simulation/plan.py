"""A policy as arrays: what the steps of `decide` read, looked up once for all rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sentei.policies.evidence import PAIRED_CUT, log_threshold
from sentei.policies.evidence.base import BETTING_CUT, Bools, Floats, Ints
from sentei.policies.intake import GAIN_CUT, RATIO_CAP, RECENT_PARTS, scaled_bound
from sentei.policies.judge import least_served
from sentei.policies.schema.budget import harm_alpha, no_gain_alpha, try_alpha
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Benefit, Guardrail, Stage
from sentei.policies.schema.units import WeeklyWindow

Kind = Literal["betting", "count", "arms", "ratio", "benefit"]
_KINDS: dict[str, Kind] = {
    "betting": "betting",
    "betting_paired": "betting",
    "beta_binomial": "count",
    "event_split": "arms",
    "split_ramp": "ratio",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """One guardrail, or one benefit, on the scale of its evidence."""

    id: str
    kind: Kind
    family: str
    value: str
    over_s: float | None  # of times: what counts as an event
    scale: float  # own unit of the metric per 1 of the evidence
    bound: float
    floor_cap: float | None  # of paired values, on the scale of the evidence
    cut: float
    needs: tuple[str, ...]  # by stage
    alpha_harm: float
    alpha_safe: float
    watch_at: float  # log e-CUSUM that is an alarm
    is_over_all: bool
    action: str
    least: tuple[int, ...] = ()  # by stage: units of sparse before which no_harm says nothing

    @property
    def harm_at(self) -> float:
        """The log evidence that proves harm."""
        return log_threshold(self.alpha_harm)

    @property
    def safe_at(self) -> float:
        """The log evidence that proves safety."""
        return log_threshold(self.alpha_safe)

    @property
    def own_bound(self) -> float:
        """The bound that a true mean is compared with: the excess itself where the value is paired."""
        if self.floor_cap is None:
            return self.bound
        return self.bound * (1 + self.floor_cap) - self.floor_cap

    @property
    def is_audited(self) -> bool:
        """Whether its values come from audits."""
        return self.family in ("quality", "benefit")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the steps need; stages, slices and rungs are numbers here."""

    gates: tuple[Gate, ...]
    benefits: tuple[Gate, ...]
    slice_ids: tuple[str, ...]
    stage_ids: tuple[str, ...]
    share: Floats  # by stage
    asks_gain: Bools  # by stage
    proves: Bools  # by stage: whether it asks for proof of safety, of what says nothing of its own
    audit: Floats  # of requests that dense serves, by stage
    audit_sparse: Floats
    rung: Ints
    dwell_s: Floats
    max_s: Floats  # inf where a stage has no end
    approval: Ints  # 0 none, 1 after the evidence, 2 at any time
    max_rung: Ints  # by slice
    num_rungs: int  # that any stage uses
    rolls_back_on_max: bool
    min_units: int
    min_served: int
    missing_limit: float
    missing_part_s: float  # of the window in which missing audits count
    is_advice: bool
    max_age_s: float
    silence: tuple[tuple[float, str], ...]  # (after so many seconds, do this), the last resort first
    breaker_window_s: float
    breaker_requests: int
    breaker_share: float
    windows: tuple[WeeklyWindow, ...]
    tick_s: float


def make_plan(policy: Policy) -> Plan:
    """The policy in numbers."""
    spec = policy.spec
    stages, rungs = spec.stages, policy.rung_ids
    data = spec.data.no_data
    num_rungs = max(rungs.index(stage.rung) for stage in stages) + 1
    limits = [num_rungs - 1 if s.max_rung is None else rungs.index(s.max_rung) for s in policy.routed_slices]
    windows = [item.window for item in spec.guardrails.prometheus]  # metrics of one's own are as they should
    return Plan(
        gates=tuple(_gate(policy, item) for item in spec.guardrails.items),
        benefits=tuple(_gate(policy, item) for item in spec.benefit),
        slice_ids=tuple(item.id for item in policy.routed_slices),
        stage_ids=tuple(stage.id for stage in stages),
        share=np.array([stage.share for stage in stages]),
        asks_gain=np.array([policy.asks_gain(stage) for stage in stages]),
        proves=np.array([policy.need(stage) == "all_safe" for stage in stages]),
        audit=np.array([policy.audit_odds(stage)[0] for stage in stages]),
        audit_sparse=np.array([policy.audit_odds(stage)[1] for stage in stages]),
        rung=np.array([rungs.index(stage.rung) for stage in stages]),
        dwell_s=np.array([max(stage.hold_min, stage.bake or 0.0, *windows) for stage in stages]),
        max_s=np.array([math.inf if stage.max is None else stage.max for stage in stages]),
        approval=np.array([_approval_code(stage) for stage in stages]),
        max_rung=np.minimum(np.array(limits), num_rungs - 1),
        num_rungs=num_rungs,
        rolls_back_on_max=spec.advance.on_max == "rollback",
        min_units=spec.advance.min_units,
        min_served=spec.advance.min_served_units,
        missing_limit=spec.audit.missing.max_share,
        missing_part_s=spec.audit.missing.window / RECENT_PARTS,
        is_advice=spec.mode == "advise",
        max_age_s=spec.data.max_age,
        silence=((data.after, data.last), (data.grace, data.then)),
        breaker_window_s=spec.breaker.variant.window,
        breaker_requests=spec.breaker.variant.min_requests,
        breaker_share=spec.breaker.variant.failure_share,
        windows=spec.schedule.windows,
        tick_s=spec.schedule.check_every,
    )


def _approval_code(stage: Stage) -> int:
    if stage.approval is None:
        return 0
    return 1 if stage.approval.when == "after_evidence" else 2


def _gate(policy: Policy, item: Guardrail | Benefit) -> Gate:
    total, num_stages = try_alpha(policy), len(policy.spec.stages)
    scaled = scaled_bound(policy, item)
    if isinstance(item, Benefit):
        return Gate(
            id=item.id,
            kind="benefit",
            family="benefit",
            value=item.value,
            over_s=None,
            scale=RATIO_CAP,
            bound=scaled,
            floor_cap=None,
            cut=GAIN_CUT,
            needs=(item.need,) * num_stages,
            alpha_harm=no_gain_alpha(policy),
            alpha_safe=total,
            watch_at=math.inf,
            is_over_all=False,
            action="held",
        )
    bound, family = item.bound, item.metric.family
    scale = policy.spec.audit.values.kl.cap if item.value == "audit.kl" else 1.0
    cap = None
    if bound is not None and bound.excess_over_floor is not None:
        cap = 1.0 if bound.floor_cap is None else bound.floor_cap / scale
    return Gate(
        id=item.id,
        kind=_KINDS[item.test],
        family=family,
        value=item.value,
        over_s=None if bound is None else bound.over,
        scale=scale,
        bound=scaled,
        floor_cap=cap,
        cut=PAIRED_CUT if item.test == "betting_paired" else BETTING_CUT,
        needs=tuple(policy.need(stage, item) for stage in policy.spec.stages),
        alpha_harm=harm_alpha(policy, item),
        alpha_safe=total,
        watch_at=log_threshold(1 / policy.spec.guardrails.detector_arl),
        is_over_all=item.per == "all",
        action=item.action,
        least=tuple(
            least_served(policy, item, stage.share)
            if stage.need is None and policy.need(stage, item) == "no_harm"
            else 0
            for stage in policy.spec.stages
        ),
    )


def used_rungs(plan: Plan, stage: Ints, ceiling: Ints) -> Ints:
    """The rung of each slice [rollouts, slices]: the mildest of the stage's, the slice's and the ceiling."""
    limit = np.minimum(plan.max_rung[None, :], ceiling)
    return np.asarray(np.minimum(plan.rung[stage][:, None], limit))


def is_frozen(plan: Plan, now_s: float) -> bool:
    """Whether a freeze window has this moment."""
    return any(window.has(now_s) for window in plan.windows)


def any_of(flags: list[Bools], shape: tuple[int, ...]) -> Bools:
    """Element-wise or of any number of arrays."""
    found = np.zeros(shape, dtype=np.bool_)
    for flag in flags:
        found |= flag
    return found
