"""How long a policy takes at best and at worst, and how many sessions each stage needs.

At best: nothing is wrong anywhere, every session is clean, people approve at once. The time for units is
counted only where the traffic is known. At worst: every stage takes as long as it may before it is rolled
back; a stage without an end, or one that waits for a person, has no worst time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sentei.policies.evidence import (
    BETTING_CUT,
    PAIRED_CUT,
    Direction,
    beta_binomial_boundary,
    log_threshold,
    units_to_prove,
)
from sentei.policies.intake import GAIN_CUT, RATIO_CAP, scaled_bound
from sentei.policies.judge import least_served
from sentei.policies.schema.budget import harm_alpha, try_alpha
from sentei.policies.schema.policy import Policy
from sentei.policies.schema.sections import Benefit, Guardrail, Stage

COUNT_LIMIT = 20_000  # sessions after which a count that proves nothing is said to prove nothing


@dataclass(frozen=True, slots=True)
class Expected:
    """The traffic of the routed slices; None: unknown."""

    sessions_per_hour: float | None = None
    mix: tuple[float, ...] = ()  # by routed slice; empty: evenly

    def per_slice(self, policy: Policy) -> tuple[float, ...]:
        """Sessions per hour of each routed slice."""
        given = self.mix or (1.0,) * len(policy.routed_slices)
        if len(given) != len(policy.routed_slices) or min(given) < 0 or sum(given) <= 0:
            names = ", ".join(item.id for item in policy.routed_slices)
            raise ValueError(f"the mix needs one number of at least 0 for each of {names}")
        return tuple((self.sessions_per_hour or 0.0) * part / sum(given) for part in given)


@dataclass(frozen=True, slots=True)
class Need:
    """What one slice of a stage must see before the stage may end."""

    slice_id: str
    audits: int  # of this stage where it proves safety, else at this rung so far
    served: int  # by sparse, in this stage
    sessions: int | None  # of the slice, in this stage; None where none are enough

    @property
    def has_end(self) -> bool:
        """Whether any number of sessions is enough."""
        return self.sessions is not None


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage."""

    stage_id: str
    share: float
    rung: str
    audit: float
    needs: tuple[Need, ...]
    best_s: float
    worst_s: float | None
    max_s: float | None

    @property
    def is_too_short(self) -> bool:
        """Whether its end comes before its evidence can."""
        return self.max_s is not None and self.best_s > self.max_s


def forecast(policy: Policy, expected: Expected) -> tuple[StageForecast, ...]:
    """Every stage in its order."""
    found: list[StageForecast] = []
    audits: dict[tuple[str, str], float] = {}  # so far, by slice and rung
    for index, stage in enumerate(policy.spec.stages):
        needs = tuple(_need(policy, index, place, audits) for place in range(len(policy.routed_slices)))
        rates = expected.per_slice(policy)
        best = _best_s(policy, stage, needs, rates if expected.sessions_per_hour else None)
        for need, rate in zip(needs, rates, strict=True):
            key = (need.slice_id, slice_rung(policy, stage, need.slice_id))
            audits[key] = max(
                audits.get(key, 0.0) + rate * _audited(policy, stage) * best / 3600, need.audits
            )
        found.append(
            StageForecast(
                stage.id,
                stage.share,
                stage.rung,
                policy.audit_share(stage),
                needs,
                best,
                _worst_s(policy, stage),
                stage.max,
            )
        )
    return tuple(found)


def best_s(stages: tuple[StageForecast, ...]) -> float:
    """The whole rollout at best."""
    return sum(stage.best_s for stage in stages)


def worst_s(stages: tuple[StageForecast, ...]) -> float | None:
    """The whole rollout at worst; None: it has no end of its own."""
    known = [stage.worst_s for stage in stages if stage.worst_s is not None]
    return sum(known) if len(known) == len(stages) else None


def slice_rung(policy: Policy, stage: Stage, slice_id: str) -> str:
    """The rung that a slice has in a stage, before any fallback."""
    limit = next(item.max_rung for item in policy.routed_slices if item.id == slice_id)
    both = [rung for rung in (stage.rung, limit) if rung is not None]
    return min(both, key=policy.rung_ids.index)


def clean_units(policy: Policy, gate: Guardrail) -> int | None:
    """Clean sessions in a row that prove a guardrail safe; None where counting sessions says nothing."""
    return _units(policy, gate, "safe", 0.0)


def gain_units(policy: Policy, item: Benefit, ratio: float) -> int | None:
    """Sessions of one constant ratio of model times that prove the gain; None: that is no such gain."""
    bound, alpha = scaled_bound(policy, item), try_alpha(policy)
    return units_to_prove(ratio / RATIO_CAP, bound=bound, direction="safe", alpha=alpha, cut=GAIN_CUT)


def bad_units(policy: Policy, gate: Guardrail) -> int | None:
    """The worst sessions in a row that prove it harmful."""
    return _units(policy, gate, "harm", 1.0)


def bearable_missing(policy: Policy, gate: Guardrail) -> float | None:
    """The share of missing audits from which clean sessions prove nothing: each counts as the worst (F12)."""
    if gate.metric.family != "quality":
        return None
    clean, bound = _scaled(policy, gate, 0.0), scaled_bound(policy, gate)
    return (bound - clean) / (1 - clean)


def _scaled(policy: Policy, gate: Guardrail, value: float) -> float:
    """A value over its floor, on the scale of the evidence."""
    if gate.bound is None or gate.bound.excess_over_floor is None:
        return value
    scale = policy.spec.audit.values.kl.cap if gate.value == "audit.kl" else 1.0
    cap = 1.0 if gate.bound.floor_cap is None else gate.bound.floor_cap / scale
    return (value + cap) / (1 + cap)


def _units(policy: Policy, gate: Guardrail, direction: Direction, value: float) -> int | None:
    if gate.test in ("event_split", "split_ramp"):
        return None
    alpha = try_alpha(policy) if direction == "safe" else harm_alpha(policy, gate)
    bound = scaled_bound(policy, gate)
    if gate.test == "beta_binomial":
        return _counted(bound, direction, alpha)
    scaled = _scaled(policy, gate, value)  # a clean session is as good as its floor
    cut = PAIRED_CUT if gate.test == "betting_paired" else BETTING_CUT
    return units_to_prove(scaled, bound=bound, direction=direction, alpha=alpha, cut=cut)


@lru_cache(maxsize=256)
def _counted(bound: float, direction: Direction, alpha: float) -> int | None:
    boundary = beta_binomial_boundary(
        bound=bound, direction=direction, threshold=log_threshold(alpha), max_units=COUNT_LIMIT
    )
    units = np.arange(COUNT_LIMIT + 1)
    enough = boundary >= 0 if direction == "safe" else boundary <= units
    return int(enough.argmax()) if enough.any() else None


def _need(policy: Policy, index: int, place: int, audits: dict[tuple[str, str], float]) -> Need:
    spec, item = policy.spec, policy.routed_slices[place]
    stage = spec.stages[index]
    rung = slice_rung(policy, stage, item.id)
    is_routed = stage.share > 0 and spec.mode == "enforce"
    quality, served, asks_anything, has_proof = 0, 0, False, False
    for gate in spec.guardrails.items:
        family = gate.metric.family
        if family != "quality" and not is_routed:
            continue
        asks_anything |= gate.per == "slice"
        is_proven = policy.need(stage, gate) == "all_safe"
        has_proof |= is_proven and family == "quality"
        units = (clean_units(policy, gate) if is_proven else _unharmed(policy, stage, gate)) or 1
        if family == "quality":
            quality = max(quality, units, spec.advance.min_units)
        elif family == "operational":
            served = max(served, units)
    has_quality = any(gate.metric.family == "quality" for gate in spec.guardrails.items)
    if not has_quality:
        served = max(served, spec.advance.min_units)
    of_sparse = stage.share * policy.audit_odds(stage)[1]
    if has_proof:  # by this stage's units, and where sparse serves by those that it served
        rates = [(float(quality), of_sparse if is_routed else _audited(policy, stage))]
    else:
        rates = [(max(0.0, quality - audits.get((item.id, rung), 0.0)), _audited(policy, stage))]
    rates.append((served, stage.share))
    if is_routed and has_quality:
        rates.append((spec.advance.min_served_units, of_sparse))
    sessions: int | None = 0
    for units_needed, rate in rates:
        if units_needed > 0 and sessions is not None:
            sessions = max(sessions, math.ceil(units_needed / rate - 1e-9)) if rate > 0 else None
    return Need(item.id, quality, served, sessions if asks_anything else None)


def _unharmed(policy: Policy, stage: Stage, gate: Guardrail) -> int:
    """Clean units of sparse that end a stage which asks only for no harm: a proof is enough, too.

    What is counted over all slices together says nothing of one of them.
    """
    if stage.need is not None or gate.per == "all":
        return 1
    least = least_served(policy, gate, stage.share)
    return min(least, clean_units(policy, gate) or least)


def _audited(policy: Policy, stage: Stage) -> float:
    """The share of requests that are audited, whoever serves them."""
    dense, sparse = policy.audit_odds(stage)
    share = stage.share if policy.spec.mode == "enforce" else 0.0
    return share * sparse + (1 - share) * dense


def _best_s(policy: Policy, stage: Stage, needs: tuple[Need, ...], rates: tuple[float, ...] | None) -> float:
    tick = policy.spec.schedule.check_every
    if not all(need.has_end for need in needs):
        return math.inf
    windows = [item.window for item in policy.spec.guardrails.prometheus]
    seconds = max(stage.hold_min, stage.bake or 0.0, *windows)
    for need, rate in zip(needs, rates or (), strict=False):
        if need.sessions and rate > 0:
            seconds = max(seconds, need.sessions / rate * 3600)
        elif need.sessions:
            seconds = math.inf
    return max(tick, math.ceil(seconds / tick - 1e-9) * tick) if math.isfinite(seconds) else math.inf


def _worst_s(policy: Policy, stage: Stage) -> float | None:
    """A stage that is rolled back at its end has one; approval or `on_max: hold` wait for a person."""
    return stage.max if policy.spec.advance.on_max == "rollback" else None
